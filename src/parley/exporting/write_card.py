"""The model card of a run or of an export, written again."""

from __future__ import annotations

from pathlib import Path

from parley.errors import RunError
from parley.exporting.card import card_text, published
from parley.exporting.record import RECORD_FILE, ExportRecord, read_record
from parley.exporting.run_facts import run_facts
from parley.training.run_folder import RunFolder


def card_of(source: str | Path, *, trust_remote_code: bool = False) -> str:
    """The card of the export in `source`, or of a run, whose weights were compared with nothing yet.

    Raises RunError for a folder that is neither.
    """
    path = Path(source).expanduser()
    if (path / RECORD_FILE).is_file():
        return card_text(published(read_record(path)))
    if not RunFolder.is_run(path):
        raise RunError(f"{path}: neither a run nor an export; give the folder of `parley train` or `parley export`")
    run = RunFolder.open(path, trust_remote_code=trust_remote_code)
    full = run.model.is_dir()
    name = run.config.model.name
    base = None if full else Path(name).name if Path(name).expanduser().is_dir() else name
    target, facts = "merged" if full else "adapter", run_facts(run)
    record = ExportRecord(target=target, quant=None, run=run.path.resolve().name, base=base, training=facts)
    return card_text(record)


def write_text(path: Path, text: str) -> None:
    """Write a card to `path`. Raises RunError where that is not possible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None
