"""A run's event log as a page follows it: in batches, from any position, while it grows.

A position is where a batch ends, with a checksum of the bytes before it. A run that is resumed writes its log anew
without the events after its checkpoint: then the bytes there are others, and the log is read again from its start.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO
from zlib import crc32

from parley.training.run_outcome import OUTCOMES

COLUMNS = (
    "step", "loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_gib", "num_supervised_tokens", "seconds"
)  # fmt: skip
REWARD_COLUMNS = (
    "preference_accuracy", "rewards/margins", "rewards/chosen", "rewards/rejected", "reward", "kl",
    "completions/mean_length",
)  # fmt: skip
"""Columns that steps of preference methods and GRPO have besides, as the trainers log them."""
HELDOUT_COLUMNS = {"loss": "eval_loss", "preference_accuracy": "eval_preference_accuracy", "reward": "eval_reward"}
"""By column, its figure on held-out rows in an `eval` event."""
CHECKED_BYTES = 512  # before a position: more than the time in one event
BATCH_BYTES = 2**20
_STEP = b'"event": "step"'


@dataclass
class EventBatch:
    """Events up to `position`. `restarted`: the log was read from its start, so that earlier batches are void.

    points: a list in the order of COLUMNS and REWARD_COLUMNS for each logged step; a supervised run has the former
    alone. heldout: step and the figures of HELDOUT_COLUMNS. marks: step, loss and kind of steps that need a look.
    others: the events of all other kinds as they are.
    """

    position: str
    restarted: bool
    points: list[list[float | None]] = field(default_factory=list)
    heldout: list[list[float | None]] = field(default_factory=list)
    marks: list[list[float | str | None]] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        """What the charts draw."""
        parts = {"restarted": self.restarted, "points": self.points, "heldout": self.heldout, "marks": self.marks}
        return json.dumps(parts, separators=(",", ":"))

    @property
    def ended(self) -> bool:
        return any(event.get("event") in OUTCOMES for event in self.others)


def read_batch(path: Path, position: str | None, *, until: int | None = None) -> EventBatch | None:
    """The events of `path` after `position`; None where there are none yet. A half-written line is left for later.

    until: an offset to read to, for what is known already: of the steps only the last is in the batch then.
    """
    if (file := _open(path)) is None:
        return None
    with file:
        start = _checked_offset(file, position)
        file.seek(start or 0)
        text = file.read(BATCH_BYTES if until is None else min(BATCH_BYTES, until - (start or 0)))
        whole = text[: text.rfind(b"\n") + 1]
        if not whole and len(text) == BATCH_BYTES:  # one line that is longer: answers may be
            whole = text + file.readline()
        text = whole if whole.endswith(b"\n") else b""
        if not text and (start is not None or position is None):
            return None
        end = (start or 0) + len(text)
        batch = EventBatch(_position(file, end), restarted=start is None)
    last_step = b""
    for line in text.splitlines():
        if until is None or _STEP not in line:
            _add(batch, line)
        else:
            last_step = line
    _add(batch, last_step)
    return batch


def _position(file: BinaryIO, offset: int) -> str:
    file.seek(max(0, offset - CHECKED_BYTES))
    return f"{offset}.{crc32(file.read(min(offset, CHECKED_BYTES)))}"


def offset_of(path: Path, position: str | None) -> int | None:
    """The offset of `position` where it is one of `path` as it is now; else None."""
    if (file := _open(path)) is None:
        return None
    with file:
        return _checked_offset(file, position)


def _open(path: Path) -> BinaryIO | None:
    """A regular file; a pipe would block, and a link could lead out of the run's folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


def _checked_offset(file: BinaryIO, position: str | None) -> int | None:
    """The offset of `position` where it is one of this file; else None."""
    offset, _, checksum = (position or "").partition(".")
    if not (offset.isdecimal() and checksum.isdecimal()) or len(offset) > 15:
        return None
    if int(offset) > os.fstat(file.fileno()).st_size or _position(file, int(offset)) != position:
        return None
    return int(offset)


def _add(batch: EventBatch, line: bytes) -> None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(event, dict) or not isinstance(event.get("step"), int):
        return
    match event.get("event"):
        case "step":
            batch.points.append([_figure(event.get(name)) for name in _columns(event)])
        case "eval":
            names = ("step", *HELDOUT_COLUMNS.values())
            batch.heldout.append([_figure(event.get(name)) for name in names])
        case "spike" | "nonfinite" as kind:
            batch.marks.append([_figure(event.get("step")), _figure(event.get("loss")), kind])
            batch.others.append(event)
        case _:
            batch.others.append(event)


def _columns(event: dict[str, Any]) -> tuple[str, ...]:
    return COLUMNS + REWARD_COLUMNS if "preference_accuracy" in event or "reward" in event else COLUMNS


def _figure(value: Any) -> float | None:
    """A finite number; events hold others as text."""
    return value if isinstance(value, int | float) and abs(value) < 2**63 and isfinite(value) else None
