"""Kernels that are compiled in parallel, ahead of their first launch.

Triton compiles a kernel at its first launch, and that launch waits: ten seconds in a row before a first step or a
first answer. Inside `compiling()` a launch only records the kernel, which a thread compiles. So one pass through the
code that launches the kernels compiles all of them side by side; the outputs of that pass are garbage.
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

from parley.library_compat.triton import compile_in_background, load, request

Request = Callable[[], Any]  # repeats a request for a compiled kernel
_requested: ContextVar[dict[int, Request] | None] = ContextVar("requested", default=None)
THREADS = 16  # LLVM and the assembler release Python's lock


class Kernel:
    """A Triton function that is launched from Python.

    `do_not_specialize`: arguments that are often 1 or a multiple of 16 by chance. Triton would compile the kernel again
    for each of these cases.
    """

    def __init__(self, function: Callable[..., None], do_not_specialize: Sequence[str]) -> None:
        self.function = triton.jit(function, do_not_specialize=list(do_not_specialize))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        requested = _requested.get()
        if requested is None:
            return self.function[grid]

        def record(*args: Any, **options: Any) -> None:
            again = partial(request, self.function, *args, grid=grid, **options)
            requested.setdefault(id(again()), again)  # the same kernel is the same future

        return record


def kernel(*do_not_specialize: str) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator that makes a Triton function a Kernel."""
    return partial(Kernel, do_not_specialize=do_not_specialize)


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Compile what is launched inside, and launch nothing. Everything is compiled and loaded on leaving."""
    requested: dict[int, Request] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        token = _requested.set(requested)
        try:
            with compile_in_background(threads):
                yield
        finally:
            _requested.reset(token)
        compiled = [again() for again in requested.values()]  # from Triton's cache now
        list(threads.map(partial(load, device=device), compiled))
