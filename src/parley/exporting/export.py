"""`export`: a finished run in the forms that other programs read, each proven or marked as not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from rich.console import Console

from parley.config import DEMO_MODEL
from parley.errors import ModelError, UsageError
from parley.exporting.card import write_card
from parley.exporting.comparison import Figures, compare
from parley.exporting.exporter import Exporter
from parley.exporting.record import ExportRecord
from parley.exporting.reference import Reference, measure_reference
from parley.exporting.registry import exporter_of
from parley.exporting.report_section import add_to_report
from parley.exporting.run_facts import run_facts
from parley.exporting.trained_model import TrainedModel, open_run
from parley.exporting.write_folder import refuse_existing, write_folder
from parley.text import print_text

Progress = Callable[[str, Figures | None], None]
"""Called with what is done now, and while an export is compared with the figures so far."""
EXPORTS = "exports"
"""Folder of a run that exports are written to by default, each in its own."""


@dataclass(frozen=True)
class Export:
    """A finished export: its folder, the content of its export.json, and the command line that runs it."""

    folder: Path
    record: ExportRecord
    command: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was found wrong; True also where nothing was compared."""
        return self.record.status != "failed"


def export(
    run: str | Path,
    to: str | Sequence[str] = "merged",
    quant: str | Sequence[str] = (),
    *,
    verify: bool = True,
    output: str | Path | None = None,
    base: str | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> list[Export]:
    """Export a finished run, in one or several forms; nothing half-written is left behind.

    Args:
        run: the run's folder.
        to: targets: "adapter", "merged", "gguf" ...
        quant: types of GGUF or merged weights; without one, each target's default. Each makes an export of its own.
        verify: read every export with a program that is not Parley and compare it with the trained model.
        output: folder of the export, or of several; by default `exports` in the run.
        base: a 16-bit model to merge into, where the run was trained on a quantised one.
        on_progress: see Progress.

    Returns the exports in order; one that failed the comparison is kept, its card marked UNVERIFIED.

    Raises UsageError for unknown targets and types and for folders that exist, RunError or ModelError for a run that
    cannot be exported, DeviceError where the trained model does not fit into memory for the comparison.
    """
    console = console or Console()
    jobs = plan_exports(_listed(to), _listed(quant))
    trained = open_run(run, base, trust_remote_code=trust_remote_code)
    places = _places(trained, jobs, output)
    for exporter, kind in jobs:
        exporter.check(trained, kind)
    run_exports = _Exports(trained, verify, console, on_progress)
    done: list[Export] = []
    try:
        for (exporter, kind), place in zip(jobs, places, strict=True):
            done.append(run_exports.one(exporter, kind, place))
    finally:  # those that are finished stay when a later one fails
        if len(done) < len(jobs):  # an error follows, which names the one that failed
            for each in done:
                print_text(console, f"written before that: {each.folder} ({each.record.status})", wrap=False)
        if done and (missing := add_to_report(trained.folder, [each.record for each in done])) is not None:
            print_text(console, missing)
    return done


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def plan_exports(targets: Sequence[str], quants: Sequence[str]) -> list[tuple[Exporter, str | None]]:
    """Each target with each of `quants` that it takes, or with its default.

    Raises UsageError for a target or type that is unknown, or a type that none of the targets takes.
    """
    if not targets:
        raise UsageError("--to: name at least one form to export to")
    exporters = [exporter_of(target) for target in dict.fromkeys(targets)]
    known = {name for exporter in exporters for name in exporter.quants}
    for quant in quants:
        if quant not in known:
            takes = "; ".join(f"{each.target} takes {', '.join(each.quants)}" for each in exporters if each.quants)
            raise UsageError(f"--quant {quant}: {takes or 'none of these targets takes a type'}")
    jobs: list[tuple[Exporter, str | None]] = []
    for exporter in exporters:
        taken = [quant for quant in dict.fromkeys(quants) if quant in exporter.quants]
        jobs += [(exporter, quant) for quant in taken] or [(exporter, exporter.default_quant)]
    return jobs


def _places(
    trained: TrainedModel, jobs: Sequence[tuple[Exporter, str | None]], output: str | Path | None
) -> list[Path]:
    names = [exporter.target if quant is None else f"{exporter.target}-{quant}" for exporter, quant in jobs]
    if output is not None and len(jobs) == 1:
        places = [Path(output).expanduser()]
    else:
        parent = trained.folder.path / EXPORTS if output is None else Path(output).expanduser()
        places = [parent / name for name in names]
    for place in places:
        refuse_existing(place)
    return places


class _Exports:
    """The exports of one run: its trained model is measured once, when the first is compared."""

    def __init__(
        self, trained: TrainedModel, verify: bool, console: Console, on_progress: Progress | None = None
    ) -> None:
        self.trained, self.verify, self.console = trained, verify, console
        self._on_progress = on_progress

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Say what is done inside the block."""
        if self._on_progress is not None:
            self._on_progress(text, None)
        with self.console.status(text):
            yield

    @cached_property
    def reference(self) -> Reference:
        with self.stage("measuring the trained model"):
            return measure_reference(self.trained)

    def one(self, exporter: Exporter, quant: str | None, place: Path) -> Export:
        trained = self.trained
        if self.verify:
            self.reference  # noqa: B018  (before writing: a model that does not fit into memory is refused)
        shared = list(trained.notes)
        record = ExportRecord(
            target=exporter.target,
            quant=quant,
            run=trained.name,
            base=trained.base_name if trained.adapters else None,
            base_fingerprint=trained.base_fingerprint,
            training=run_facts(trained.folder),
        )

        def write(folder: Path) -> None:
            with self.stage(f"writing {record.name}"):
                exporter.write(trained, folder, quant)
            if self.verify:
                with self.stage(f"comparing {record.name}"):
                    record.marks = exporter.marks(trained, quant)
                    record.figures = self._compared(exporter, folder, record)
                record.status = "verified" if record.figures.passed else "failed"
            record.notes = list(trained.notes)
            record.command = _portable(exporter.command(trained, folder), folder, trained)
            write_card(folder, record)
            record.write(folder)

        try:
            write_folder(place, write)
        finally:
            trained.notes = shared
        return Export(place, record, exporter.command(trained, place))

    def _compared(self, exporter: Exporter, folder: Path, record: ExportRecord) -> Figures:
        on_progress = self._on_progress
        watch = None if on_progress is None else partial(on_progress, f"comparing {record.name}")
        assert record.marks is not None
        try:
            with exporter.open(self.trained, folder, self.reference) as reader:
                return compare(self.reference, reader, record.marks, watch)
        except ModelError as error:  # the files are kept, as after any other difference
            return Figures(program="none", source=self.reference.samples.source, failure=f"cannot be read: {error}")


def _portable(command: str | None, folder: Path, trained: TrainedModel) -> str | None:
    """`command` as it is run from within the folder, on any machine."""
    if command is None:
        return None
    command = command.replace(str(folder), ".")
    local = trained.base.name == DEMO_MODEL or Path(trained.base.name).is_dir()
    return command.replace(str(trained.base_folder), trained.base_name) if local else command
