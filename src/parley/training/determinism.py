"""`training.deterministic`: the same bits from run to run on a GPU.

Parley's own kernels add in a fixed order (train_step/kernels/split_reduction.py). What is left are the libraries': the
backward passes of attention, scatter additions, and cuBLAS, whose workspaces decide the order of its sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def fix_cublas_workspaces() -> None:
    """Have cuBLAS take workspaces of a fixed size. Call it before the first product on a GPU: later it has no effect.

    torch documents this environment variable, and no function, as the way to say it.
    """
    os.environ.setdefault(*CUBLAS_WORKSPACE)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, torch takes deterministic algorithms, and raises RuntimeError where an operator has none."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check of reads, which costs a pass over each buffer
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
