"""What an export would take, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from parley.exporting.export import plan_exports
from parley.exporting.samples import ANSWER_WORK, SCORED_WORK
from parley.exporting.trained_model import open_run

START_SECONDS = 8.0  # importing the libraries and opening the run
WRITTEN_PER_SECOND = 60e6  # values that are merged, converted and written
LOADED_PER_SECOND = 250e6  # values that a reader loads; the trained model and the export are loaded
TOKENS = 20_000  # that are scored of small models at most, by both programs
MOST_WORK = 2 * (SCORED_WORK + ANSWER_WORK)
WORK_PER_SECOND = SCORED_WORK / 15  # on two cores


@dataclass(frozen=True)
class ExportEstimate:
    """`bytes` of the weights; `seconds` of writing and verifying, by arithmetic from this project's measurements on
    two cores: within a factor of three."""

    target: str
    quant: str | None
    bytes: int
    seconds: float


def estimate_export(run: str | Path, target: str, quant: str | None = None) -> ExportEstimate:
    """Size and time of one export. Raises what `export` raises before it writes."""
    ((exporter, kind),) = plan_exports([target], [quant] if quant else [])
    trained = open_run(run)
    exporter.check(trained, kind)
    size = exporter.size(trained, kind)
    values = sum(prod(shape) for shape in trained.weights.shapes().values())
    written = min(size, values)  # an adapter alone is written in no time
    compared = min(values * TOKENS, MOST_WORK) / WORK_PER_SECOND
    loaded = 2 * values / LOADED_PER_SECOND
    return ExportEstimate(target, kind, size, START_SECONDS + written / WRITTEN_PER_SECOND + loaded + compared)
