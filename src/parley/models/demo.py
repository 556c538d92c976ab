"""Location of the embedded demo model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from parley.config import DEMO_MODEL
from parley.errors import ModelError


def demo_model_path() -> Path:
    """The packaged folder of the demo model. Raises ModelError when this installation lacks it."""
    folder = Path(str(files("parley"))) / "assets" / "demo-model"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{DEMO_MODEL}: this installation lacks {folder}; reinstall parley-llm, "
            "or build it with tools/build_demo_model.py"
        )
    return folder
