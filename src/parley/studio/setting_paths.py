"""The paths among a run's settings that libraries open themselves: deepspeed, fsdp_config, corda_config.cache_file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from parley.config import RunConfig
from parley.data.files import path_exists
from parley.data.values import strings_in
from parley.errors import UsageError

NAMES = frozenset({"hub_model_id", "hub_token", "run_name", "trackio_bucket_id", "trackio_space_id"})
"""Settings of TRL that may hold a slash and are never opened."""


def library_paths(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Each text of the sections for TRL and PEFT that is a path, with its setting.

    Which settings are files is the libraries' to say, and changes with them: every text that could lead out of the
    working directory counts, at any depth.
    """
    sections = {"training": config.training, "lora": config.lora}
    for section, values in sections.items():
        if values is None:
            continue
        for key, value in values.model_dump(exclude={"rewards"}).items():
            for text in strings_in(value):
                if key not in NAMES and _is_path(text):
                    yield f"{section}.{key}", Path(text).expanduser().absolute()


def check_revisions(config: RunConfig) -> None:
    """Raises UsageError for a revision, split or subset that would leave the hub's cache, where it is a file name."""
    for setting, text in (
        ("model.revision", config.model.revision),
        ("data.revision", config.data.revision),
        ("data.subset", config.data.subset),
        ("data.split", config.data.split),
    ):
        path = PurePosixPath(text or "")
        if path.is_absolute() or ".." in path.parts:
            raise UsageError(f"{setting}: got {text!r}, wanted a name, not a path")


def _is_path(text: str) -> bool:
    return "/" in text or text.startswith("~") or text == ".." or path_exists(Path(text))
