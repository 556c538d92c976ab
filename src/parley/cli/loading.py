"""What `chat` and `generate` share: a run or model by name, and settings changed one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from parley.errors import UsageError

if TYPE_CHECKING:
    from parley.config import GenerationSection
    from parley.serving.loading import Source


def open_model(name: str | None, system: str | None, changes: Iterable[str]) -> Source:
    """The run, adapter or model called `name`, the embedded one without; `changes` are KEY=VALUE of its settings."""
    from dataclasses import replace

    from parley.config import DEMO_MODEL, GenerationSection
    from parley.serving.loading import open_source

    change_settings(GenerationSection(), changes)  # a wrong key is told before anything is loaded
    source = open_source(name or DEMO_MODEL)
    return replace(
        source,
        settings=change_settings(source.settings, changes),
        system=source.system if system is None else system or None,
    )


def change_settings(settings: GenerationSection, changes: Iterable[str]) -> GenerationSection:
    """`settings` with each KEY=VALUE, a field of `generation` in a run's file. Raises UsageError in one line."""
    from parley.config import RunConfig

    changes = list(changes)
    for change in changes:
        key, equals, value = change.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"{change!r}: wanted KEY=VALUE, for example temperature=0.7")
    overrides = [f"generation.{change.strip()}" for change in changes]
    return RunConfig.create({"generation": settings.model_dump()}, overrides).generation
