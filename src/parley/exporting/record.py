"""export.json: what an export is, of which run and base, and how it compared with the trained model."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parley.errors import RunError
from parley.exporting.comparison import Figures, Marks
from parley.exporting.run_facts import RunFacts
from parley.versions import library_versions

RECORD_FILE = "export.json"
Status = Literal["verified", "failed", "not verified"]


class ExportRecord(BaseModel):
    """The content of export.json.

    Attributes:
        run: name of the run's folder.
        base: hub id of the base model, or the name of its folder; None after full fine-tuning.
        base_fingerprint: of the weights that the adapter was merged into.
        files: size in bytes by name.
        status: "not verified" after --no-verify.
        marks: what had to be reached.
        training: what the model card says of the run.
        command: the command line that runs the export, from within its folder.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    target: str
    quant: str | None
    run: str
    base: str | None
    base_fingerprint: str | None = None
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = Field(default_factory=library_versions)
    files: dict[str, int] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    status: Status = "not verified"
    marks: Marks | None = None
    figures: Figures | None = None
    training: RunFacts | None = None
    command: str | None = None

    @property
    def name(self) -> str:
        return self.target if self.quant is None else f"{self.target}-{self.quant}"

    def write(self, folder: Path) -> None:
        """Write export.json, with the files of `folder` as they are."""
        self.files = {
            file.relative_to(folder).as_posix(): file.stat().st_size
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != RECORD_FILE
        }
        (folder / RECORD_FILE).write_text(self.model_dump_json(indent=1), encoding="utf-8")


def read_record(folder: Path) -> ExportRecord:
    """The record of an exported folder. Raises RunError where there is none, or it is not what export writes."""
    path = folder / RECORD_FILE
    try:
        return ExportRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(
            f"{folder}: no export there (no {RECORD_FILE}); give a folder that `parley export` wrote"
        ) from None
    except (OSError, ValueError, ValidationError) as error:
        raise RunError(f"{path}: not what `parley export` writes ({type(error).__name__}); export again") from None
