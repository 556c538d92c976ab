"""Triton's internals that Parley needs.

Triton documents the language and `triton.jit`. Compiling ahead of a launch, and asking whether the interpreter runs, is
outside of that.
"""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which has no inline assembly.

    Undocumented: triton.knobs. Public alternative: reading the environment variable, which Triton does once at import.
    """
    return bool(triton.knobs.runtime.interpret)


def compile_in_background(executor: Executor) -> AbstractContextManager[Any]:
    """Inside, `request` hands the compilation to `executor` and does not wait; leaving waits for all of them.

    Undocumented: triton.AsyncCompileMode. There is no public alternative.
    """
    return triton.AsyncCompileMode(executor)


def request(function: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
    """Compile a jitted `function` for these arguments without launching it; the compiled kernel, or its future.

    Undocumented: JITFunction.warmup. Public alternative: a launch, which waits for the compiler.
    """
    return function.warmup(*args, grid=grid, **options)


def load(compiled: Any, device: torch.device) -> None:
    """Build the launcher of a compiled kernel and load it onto `device`, as its first launch would.

    Undocumented: reading CompiledKernel.run has this effect.
    """
    with torch.cuda.device(device):
        _ = compiled.run
