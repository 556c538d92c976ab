"""Contracts of the parts of Triton that Parley uses beside its documented language."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest

triton = pytest.importorskip("triton", reason="no Triton here")
compat = pytest.importorskip("parley.library_compat.triton")


def test_the_interpreter_is_known_as_triton_was_imported() -> None:
    import os

    assert compat.is_interpreting() == (os.environ.get("TRITON_INTERPRET", "0") == "1")


def test_background_compilation_takes_an_executor_and_is_left_without_work() -> None:
    with ThreadPoolExecutor(1) as executor, compat.compile_in_background(executor):
        pass


def test_what_is_called_on_jitted_and_compiled_kernels_is_there() -> None:
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    assert "grid" in inspect.signature(JITFunction.warmup).parameters
    assert isinstance(inspect.getattr_static(CompiledKernel, "run"), property)
