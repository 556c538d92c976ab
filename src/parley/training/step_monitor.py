"""The loss and gradient norm of each optimizer step, judged on the device and read by the host when it logs.

A step whose loss or gradient is not finite is recognised where it is computed, so that its update can be masked without
waiting for it. The host learns of it with the next log, checkpoint or evaluation.

Loss spikes are steps far above the losses before them, by the median and the median absolute deviation of a window:
both ignore earlier spikes (Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from parley.data.packing import Document
from parley.data.summary import RowGroup
from parley.errors import TrainingError

WINDOW = 50  # losses before a step that it is compared with
LEAST_WINDOW = 10
DEVIATIONS = 6.0  # beyond which a loss is a spike
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.05  # of the median: losses that barely vary have no spikes of a few percent
MAX_PENDING = 100  # steps that the host has not read: their rows are kept until then


@dataclass
class StepRecord:
    """One optimizer step: what it was computed on and what came out. `typical`: of a spike, the median before it."""

    step: int
    documents: Sequence[Document]
    loss: float
    grad_norm: float
    finite: bool
    typical: float | None = None

    @property
    def rows(self) -> list[str]:
        return [document.origin or "a row without a name" for document in self.documents]

    @property
    def fault(self) -> str:
        return "the gradient is not finite" if isfinite(self.loss) else "the loss is not finite"


class StepListener(Protocol):
    """Receives the records of steps that were not as usual."""

    def nonfinite(self, record: StepRecord) -> None: ...

    def spike(self, record: StepRecord) -> None: ...


class NonfiniteStepError(TrainingError):
    """Training was stopped at a step that is not finite. Its update, and those of later steps, were not applied."""

    def __init__(self, record: StepRecord, skipped: int) -> None:
        self.record, self.skipped = record, skipped
        rows = RowGroup()
        for row in record.rows:
            rows.add(row)
        steps = f"{skipped} skipped step{'s' * (skipped != 1)}"
        before = f" (after {steps}, training.nonfinite_limit)" if skipped else ""
        fault = f"{record.fault}; its update was not applied; its rows: {rows}"
        super().__init__(f"training stopped at step {record.step}{before}: {fault}")


@dataclass
class StepMonitor:
    """Judges steps, keeps what the host has not read, and follows `policy`.

    With "stop" a step that is not finite, and every one after it, is masked; with "skip" it alone, at most `limit`
    times.
    """

    policy: Literal["stop", "skip"] = "stop"
    limit: int = 10
    listeners: list[StepListener] = field(default_factory=list)
    skipped: int = 0
    watches_spikes: bool = True
    _loss: Tensor | None = None  # of the step whose micro-batches are arriving
    _documents: Sequence[Document] = ()
    _sound: Tensor | None = None  # whether no step was masked so far
    _pending: list[tuple[int, Sequence[Document], Tensor, Tensor, Tensor]] = field(default_factory=list)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _logged: int = 0  # steps since the last log
    _logged_finite: int = 0  # those of them with a finite loss

    def add_loss(self, loss: Tensor, documents: Sequence[Document] = ()) -> Tensor:
        """Note a micro-batch, or all of a step. Returns what Trainer may add to its sum: 0 for a loss not finite."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss
        self._documents = [*self._documents, *documents]
        return torch.where(loss.isfinite(), loss, 0)

    def judge(self, step: int, norm: Tensor | float, *, loss_alone: bool = False) -> Tensor:
        """Whether the update of `step` is to be applied, as a 0-dim bool on the device.

        `loss_alone`: a gradient that is not finite is the business of a loss scaler.
        """
        loss = self._loss if self._loss is not None else torch.zeros(())
        norm = torch.as_tensor(norm, device=loss.device).detach()
        finite = loss.isfinite() if loss_alone else loss.isfinite() & norm.isfinite()
        if self.policy == "stop":
            finite = finite if self._sound is None else finite & self._sound
            self._sound = finite
        self._pending.append((step, self._documents, loss, norm, finite))
        self._loss, self._documents = None, ()
        return finite

    @property
    def is_full(self) -> bool:
        return len(self._pending) >= MAX_PENDING

    def collect(self) -> list[StepRecord]:
        """The steps since the last call, fetched in one transfer, with spikes marked."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        values = torch.stack([torch.stack([loss.float(), norm.float(), ok.float()]) for *_, loss, norm, ok in pending])
        records = [
            StepRecord(step, documents, loss, norm, bool(finite))
            for (step, documents, *_), (loss, norm, finite) in zip(pending, values.tolist(), strict=True)
        ]
        for record in records:
            self._logged += 1
            self._logged_finite += isfinite(record.loss)
            if record.finite:
                record.typical = self._spike_over(record.loss)
                self._recent.append(record.loss)
        return records

    def react(self, record: StepRecord) -> None:
        """Notify the listeners, and follow the policy. Raises NonfiniteStepError where it says to stop."""
        for listener in self.listeners:
            if not record.finite:
                listener.nonfinite(record)
            elif record.typical is not None:
                listener.spike(record)
        if record.finite:
            return
        if self.policy == "stop" or self.skipped == self.limit:
            raise NonfiniteStepError(record, self.skipped)
        self.skipped += 1

    def correct_logs(self, logs: dict[str, float]) -> None:
        """Trainer's mean loss counts a masked loss as 0: make it the mean of the finite ones, or leave it out."""
        count, finite, self._logged, self._logged_finite = self._logged, self._logged_finite, 0, 0
        if "loss" in logs and finite < count:
            if finite:
                logs["loss"] *= count / finite
            else:
                del logs["loss"]
        if not isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]

    def counters(self) -> dict[str, Any]:
        """What a resumed run continues with; the steps have been collected."""
        counts = {"skipped": self.skipped, "logged": self._logged, "logged_finite": self._logged_finite}
        return counts | {"recent": list(self._recent)}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        self.skipped, self._logged = counters["skipped"], counters["logged"]
        self._logged_finite = counters["logged_finite"]
        self._recent = deque(counters["recent"], maxlen=WINDOW)

    def _spike_over(self, loss: float) -> float | None:
        """The median of the losses before, where `loss` is far above them."""
        if len(self._recent) < LEAST_WINDOW or not self.watches_spikes:
            return None
        middle = median(self._recent)
        deviation = MAD_TO_DEVIATION * median(abs(value - middle) for value in self._recent)
        return middle if loss > middle + DEVIATIONS * max(deviation, LEAST_DEVIATION * abs(middle)) else None


def fetch(figures: dict[str, list[Any]]) -> None:
    """Put numbers in the place of tensors, in one transfer for each name; a checkpoint's figures are numbers."""
    for values in figures.values():
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if tensors:
            fetched = iter(torch.stack(tensors).tolist())
            values[:] = [next(fetched) if isinstance(value, torch.Tensor) else value for value in values]


def drop_nonfinite(figures: dict[str, list[Any]]) -> None:
    """Leave values that are not finite out of the means of the next log, and figures that have no other."""
    for name in list(figures):
        values = [value for value in figures[name] if isfinite(value)]
        if values:
            figures[name][:] = values
        else:
            del figures[name]
