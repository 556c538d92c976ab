"""Kernels that are compiled many at a time, ahead of their first launch.

Triton compiles a kernel where it is launched first, and that launch waits. Ten seconds of such waits stand in a row
before a first step or a first answer. Inside `compiling()` a launch is only noted and its kernel compiled by a thread,
so that a pass through the code that launches them compiles them side by side; what it writes is garbage.

Source: triton.AsyncCompileMode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton

Again = Callable[[], Any]  # asks for a kernel once more
_noted: ContextVar[dict[int, Again] | None] = ContextVar("noted", default=None)
THREADS = 16  # LLVM and the assembler work outside Python's lock


class Kernel:
    """A function of Triton's that is launched from Python. `any_number`: the arguments whose value it is not made for,
    as Triton compiles anew for multiples of 16 and for one.
    """

    def __init__(self, function: Callable[..., None], any_number: Sequence[str]) -> None:
        self.function = triton.jit(function, do_not_specialize=list(any_number))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        noted = _noted.get()
        if noted is None:
            return self.function[grid]

        def note(*args: Any, **options: Any) -> None:
            again = partial(self.function.warmup, *args, grid=grid, **options)
            noted.setdefault(id(again()), again)

        return note


def kernel(*any_number: str) -> Callable[[Callable[..., None]], Kernel]:
    """As a decorator."""
    return partial(Kernel, any_number=any_number)


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Compile what is launched inside, and launch nothing. Everything is ready on leaving."""
    noted: dict[int, Again] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        token = _noted.set(noted)
        try:
            with triton.AsyncCompileMode(threads):
                yield
        finally:
            _noted.reset(token)
        list(threads.map(partial(_load, device), [again() for again in noted.values()]))


def _load(device: torch.device, compiled: Any) -> None:
    """Build the kernel's launcher and bring it to the device, as its first launch would."""
    with torch.cuda.device(device):
        _ = compiled.run
