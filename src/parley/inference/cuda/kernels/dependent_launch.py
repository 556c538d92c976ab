"""Programmatic dependent launch: kernels that start before the previous one has ended, and load weights meanwhile.

Hopper's synchronisation rule: once every program of a kernel has ended or called `launch_dependents`, the programs of
the next kernel start. They run up to `wait_for_previous`, which blocks until all previous kernels have ended and their
writes are visible. Every kernel launched with `pdl_options` has at least one program that waits there, so that the end
of the last kernel implies the end of all. Before the wait, a kernel may read only what no kernel writes since the last
ordinary launch: weights, and the cache and positions of earlier steps.

Matrix-vector products call `launch_dependents` after their weights are loaded: called at once, the next kernel's
programs would crowd on the processors that happen to have room and leave others idle.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from parley.library_compat.triton import is_interpreting

COMPILED = tl.constexpr(not is_interpreting())  # Triton's interpreter has no inline assembly
HOPPER = (9, 0)


@triton.jit
def launch_dependents():
    """Let the next kernel's programs start, once every program of this one has called it."""
    if COMPILED and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Block until the previous kernels have ended and their writes are visible."""
    if COMPILED and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


@cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """The launch option of a kernel that calls `wait_for_previous`, on a GPU that has it."""
    compiled = not is_interpreting()
    return {"launch_pdl": True} if compiled and torch.cuda.get_device_capability(device) >= HOPPER else {}
