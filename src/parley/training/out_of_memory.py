"""Out of memory in a pass: do the same work again in smaller passes.

A pass that runs out of memory has changed nothing that is kept: gradients are those of the whole optimizer step and are
cleared before they are computed again. So the step can be repeated with its batch split further, and the sum of the
passes is the same gradient up to rounding.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from parley.data.packing import Document, split_by_tokens
from parley.errors import one_line

Result = TypeVar("Result")

# RuntimeErrors of libraries that allocate by themselves: the CUDA driver, cuBLAS, and torch's allocator on a CPU.
MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


Stage = Literal["training", "evaluation", "rehearsal"]


def describe_reduction(during: Stage, step: int, size: str) -> str:
    """The line for the log and the report; `size` says how large a pass is from here on."""
    where = {
        "training": f"in step {step}",
        "evaluation": f"in an evaluation after step {step}",
        "rehearsal": "in the rehearsal of the largest batch",
    }[during]
    return f"out of memory {where}: done again, and from here on, with {size}; each step keeps its batch"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or the host, has no memory left for an allocation."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def retry_smaller(attempt: Callable[[], Result], reduce: Callable[[], bool]) -> Result:
    """`attempt()`, repeated after each `reduce()` while memory runs out.

    `reduce` makes the next attempt's passes smaller and returns False where they cannot be. Raises
    torch.OutOfMemoryError then; every other error is passed on.
    """
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = one_line(error)
        # Outside of the handler: the traceback's frames keep the failed pass's tensors alive as long as it exists.
        release_memory()
        if not reduce():
            raise torch.OutOfMemoryError(message)


def release_memory() -> None:
    """Return what the failed pass leaves behind to the device."""
    gc.collect()  # autograd's graph of an interrupted pass has reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved_limit(lengths: Sequence[int], limit: float) -> int | None:
    """Half the tokens of the largest pass of several documents, of those that `split_by_tokens` makes.

    With it as the next limit that pass is split. None where every pass is one document, which cannot be split.
    """
    totals = [sum(lengths[run]) for run in split_by_tokens(lengths, limit) if run.stop - run.start > 1]
    return max(totals) // 2 if totals else None


def lengths_of(documents: Sequence[Document]) -> list[int]:
    return [len(document.ids_L) for document in documents]


class RandomState:
    """The state of every random generator that a training pass may use, as it is now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.python, self.numpy, self.cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def row_count(batch: dict[str, Any]) -> int:
    """Rows B of a batch whose values are lists or tensors (B, ...); 1 where it cannot be split by rows."""
    sizes = {len(v) if isinstance(v, list) or (isinstance(v, torch.Tensor) and v.dim()) else 1 for v in batch.values()}
    return sizes.pop() if len(sizes) == 1 else 1


def split_rows(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """`batch` in at most `parts` runs of rows, of sizes that differ by one at most."""
    count = row_count(batch)
    parts = min(parts, count)
    if parts <= 1:
        return [batch]
    cuts = [count * part // parts for part in range(parts + 1)]
    return [{name: v[begin:end] for name, v in batch.items()} for begin, end in pairwise(cuts)]


@dataclass
class EvaluatedRows:
    """What a pass of evaluation gives: sums over its supervised tokens (of loss, accuracy and entropy, their number and
    their loss weights), and logits and labels where they are wanted."""

    sums_5: torch.Tensor
    logits: Any
    labels: Any


def join_rows(parts: list[Any]) -> Any:
    """The logits, or labels, of a whole batch, of those of its parts; a model may give several tensors, or none."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return tuple(join_rows(list(group)) for group in zip(*parts, strict=True))
