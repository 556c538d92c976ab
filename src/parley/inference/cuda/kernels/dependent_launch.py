"""Kernels that start before the one ahead of them has ended, and read their weights while they wait for it.

Hopper's programmatic dependent launch: once every program of a kernel has ended or said that the next may come, that
one's programs start, up to `ahead_done`, which holds them until all kernels ahead have ended and what those wrote can
be read. Some program of every such kernel passes there, so that the end of the last is the end of all. Ahead of it may
be read what no kernel writes between the last ordinary launch and this one.

Products say so when their weights are in: said at once, the next one's programs would crowd on those processors that
happen to have room, and leave others without work.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # Triton's interpreter knows no assembly
HOPPER = (9, 0)


@triton.jit
def next_may_come():
    if COMPILED and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def ahead_done():
    if COMPILED and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


@cache
def early(device: torch.device) -> dict[str, bool]:
    """The launch option, for a GPU that has it."""
    compiled = not triton.knobs.runtime.interpret
    return {"launch_pdl": True} if compiled and torch.cuda.get_device_capability(device) >= HOPPER else {}
