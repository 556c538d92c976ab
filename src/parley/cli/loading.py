"""What `chat` and `generate` share: loading a run or model by name, and changing single generation settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from parley.errors import UsageError

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model's repository ships.")
]

if TYPE_CHECKING:
    from parley.config import GenerationSection
    from parley.serving.loading import LoadedModel


def open_model(
    name: str | None, system: str | None, changes: Iterable[str], *, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a run, adapter or model, the embedded one without `name`; `changes` are KEY=VALUE of its settings."""
    from dataclasses import replace

    from parley.config import DEMO_MODEL, GenerationSection
    from parley.data.values import text_of
    from parley.serving.loading import load_for_inference

    text_of(system, "--system")
    change_settings(GenerationSection(), changes)  # a wrong key fails before anything is loaded
    loaded = load_for_inference(name or DEMO_MODEL, trust_remote_code=trust_remote_code)
    return replace(
        loaded,
        settings=change_settings(loaded.settings, changes),
        system=loaded.system if system is None else system or None,
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
