"""Makes the packages under tools/ importable, as they are for a script that is run from there."""

from __future__ import annotations

from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def pytest_configure(config: pytest.Config) -> None:
    import sys

    sys.path.insert(0, str(TOOLS))
