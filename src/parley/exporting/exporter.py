"""The interface of an export target, and the registry that the command line and Python read.

To add a target, write a class with this interface in a module of its own and list it in `EXPORTERS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from parley.exporting.comparison import Marks
from parley.exporting.reader import Reader
from parley.exporting.reference import Reference
from parley.exporting.trained_model import TrainedModel


class Exporter(Protocol):
    """One form that a trained model is exported to. Without state: one object serves every export.

    Attributes:
        target: what --to calls it.
        description: one line for the documentation.
        quants: what --quant may ask of it; empty where nothing can be chosen.
        default_quant: what is taken without --quant; None where the trained model decides.
    """

    target: str
    description: str
    quants: tuple[str, ...]
    default_quant: str | None

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        """Raises ModelError where `trained` cannot be exported so; nothing has been written yet."""

    def size(self, trained: TrainedModel, quant: str | None) -> int:
        """Bytes of the weights that `write` would write."""

    def write(self, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        """Write the export into the empty `folder`; notes for the user go to `trained.notes`."""

    def open(self, trained: TrainedModel, folder: Path, reference: Reference) -> Reader:
        """The export in `folder`, opened by a program that is not Parley."""

    def marks(self, trained: TrainedModel, quant: str | None) -> Marks:
        """What the export has to reach to be verified."""

    def command(self, trained: TrainedModel, place: Path) -> str | None:
        """The command line that runs the finished export at `place`; None where many programs would."""
