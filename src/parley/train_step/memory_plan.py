"""What a run's memory is spent on: rows of a pass, what is kept for the backward pass, copies of the weights.

Everything large is counted from the same table that it is allocated by (workspace.py). Shape suffixes: N rows of data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from parley.train_step.matmul import takes_whole_weights
from parley.train_step.packed_batch import LONG
from parley.train_step.workspace import KEEP, ON_THE_WAY, columns, copies, workspace_bytes
from parley.units import GIB

if TYPE_CHECKING:
    from parley.train_step.bind import Bound

KINDS = ("everything", "products", "attention", "offloaded", "inputs")  # see workspace.KEEP; the fastest first
GRAPH_TOKENS = 8192  # longer passes keep the device busy without a graph
LEAN = ((4096, 1024), (2048, 512), (2048, 256))  # rows of a feed-forward and of logits at a time, still many enough
MOST_TOKENS = 32768  # of a pass of several documents; more would be no faster
RESERVE = 0.1  # of the free memory is left alone
LIBRARIES = 96 * 2**20  # what cuBLAS and the graphs' own pool hold


@dataclass(frozen=True)
class Plan:
    """How a step is carried out. Bytes are the predicted peak and what it was to fit in; 0 where nobody counted."""

    positions: int = 2048
    tokens: int = 16384
    keep: str = "everything"
    keep_matrices: bool = True
    head_rows: int = 1024
    feed_rows: int = 0
    graph_tokens: int = 0
    granule: int = 128
    predicted: int = 0
    allowed: int = 0

    @property
    def offload(self) -> bool:
        """Whether what is kept waits in the host's memory."""
        return self.keep == "offloaded"

    def lines(self) -> list[str]:
        """What was chosen and why, in plain words."""
        kept = {
            "everything": "all activations kept",
            "products": "norms and activations computed anew in the backward pass",
            "attention": "feed-forward products computed anew in the backward pass",
            "offloaded": "attention kept in the host's memory, feed-forward products computed anew",
            "inputs": "each layer computed anew from its input in the backward pass",
        }[self.keep]
        weights = "unpacked weights kept" if self.keep_matrices else "weights unpacked at each use"
        graphs = f", replayed as CUDA graphs up to {self.graph_tokens} tokens" if self.graph_tokens else ""
        return [
            f"fast step: up to {self.tokens} tokens a pass{graphs}; {kept}; {weights}",
            f"memory: {self.predicted / GIB:.2f} GiB predicted of {self.allowed / GIB:.2f} GiB allowed",
        ]


def make_plan(
    bound: Bound,
    memory: Literal["auto", "low"] | float,
    length_N: NDArray[np.integer],
    documents: int,
    moment_bytes: int = 2,
) -> Plan:
    """The fastest plan that fits; the leanest where none does.

    Args:
        memory: "auto": what the device has free; "low": what the leanest plan needs; a number: GiB in all.
        length_N: tokens of each document of the data, or of the longest alone where nobody knows the others.
        documents: documents of an optimizer step.
        moment_bytes: what the optimizer keeps for each weight.
    """
    allowed = _allowed(bound, memory)
    plans = list(_plans(bound, length_N, documents))
    if memory == "low":
        plans = plans[-1:]
    counted = [_count(plan, bound, allowed, moment_bytes) for plan in plans]
    return next((plan for plan in counted if plan.predicted <= allowed), min(counted, key=lambda plan: plan.predicted))


def step_tokens(length_N: NDArray[np.integer], documents: int) -> int:
    """Tokens of the longest among a thousand steps drawn at random; a longer one is split over two passes."""
    if len(length_N) == 1:
        return int(length_N[0]) * documents
    return int(np.random.default_rng(0).choice(length_N, (1000, documents)).sum(1).max())


def _plans(bound: Bound, length_N: NDArray[np.integer], documents: int) -> Iterator[Plan]:
    """All that could be done, from the fastest to the leanest."""
    cuda = bound.device.type == "cuda"
    longest = int(length_N.max())
    whole = max(longest, min(step_tokens(length_N, documents), MOST_TOKENS))
    for keep_matrices in (True, False):
        for keep in KINDS:
            if keep == "offloaded" and not (cuda and len(bound.layers) > ON_THE_WAY):
                continue
            for tokens in _halves(whole, longest):
                plan = Plan(
                    positions=longest,
                    tokens=tokens,
                    keep=keep,
                    keep_matrices=keep_matrices,
                    graph_tokens=GRAPH_TOKENS if cuda and keep != "offloaded" else 0,
                )
                if "gate_up" in KEEP[keep]:
                    yield plan
                    continue
                for feed_rows, head_rows in LEAN:
                    yield replace(plan, feed_rows=feed_rows if tokens > feed_rows else 0, head_rows=head_rows)


def _halves(whole: int, longest: int) -> list[int]:
    """Sizes of a pass to try: the whole step, then half, down to the longest document."""
    sizes = [whole]
    while sizes[-1] // 2 >= longest:
        sizes.append(sizes[-1] // 2)
    return sizes if sizes[-1] == longest else [*sizes, longest]


def _allowed(bound: Bound, memory: Literal["auto", "low"] | float) -> int:
    if isinstance(memory, int | float):
        return int(memory * GIB)
    if bound.device.type != "cuda":
        return int(psutil.virtual_memory().available * (1 - RESERVE))
    free, _ = torch.cuda.mem_get_info(bound.device)
    return int((free + torch.cuda.memory_reserved(bound.device)) * (1 - RESERVE))


def _count(plan: Plan, bound: Bound, allowed: int, moment_bytes: int) -> Plan:
    """`plan` with its predicted peak: the weights, the workspace, and what the libraries take."""
    cuda = bound.device.type == "cuda"
    width = bound.dtype.itemsize
    apart = takes_whole_weights(bound.dtype, bound.device)
    matrices = [linear.matrix_elements(apart=apart) * width for linear in bound.linears]
    weights = torch.cuda.memory_allocated(bound.device) if cuda else 0  # the adapters' gradients among them
    unpacked = sum(matrices) if plan.keep_matrices else sum(matrices[:4])
    if not plan.keep_matrices:  # the scales of the largest weight, unpacked
        unpacked += max(matrices) // 16
    logits = plan.head_rows * len(bound.head_VD) * width
    predicted = weights + moment_bytes * bound.flat.weight_G.numel() + unpacked + logits
    predicted += workspace_bytes(bound, plan) + _attention_bytes(plan, bound) + (LIBRARIES if cuda else 0)
    if plan.offload and _host_bytes(plan, bound) > psutil.virtual_memory().available * (1 - RESERVE):
        predicted = allowed + 1  # no room on the host
    return replace(plan, predicted=predicted, allowed=allowed)


def _attention_bytes(plan: Plan, bound: Bound) -> int:
    """What attention keeps of each row, and what cuDNN allocates for long documents (kernels/flash.py): its output,
    the gradients, those of keys and values for every query head before they are summed, and queries' in fp32.
    """
    shape = bound.layers[0].shape
    sums = 4 * shape.heads * plan.tokens * (1 if plan.keep == "inputs" else len(bound.layers))
    longest = plan.positions if plan.positions >= LONG and bound.device.type == "cuda" else 0
    width = bound.dtype.itemsize
    return sums + longest * (shape.columns * width + shape.heads * shape.size * (3 * width + 4))


def _host_bytes(plan: Plan, bound: Bound) -> int:
    """Pinned memory of an offloaded plan; the host's allocator rounds each buffer up to a power of two."""
    layers = len(bound.layers)
    kept = [wide for name, wide in columns(bound).items() if copies(name, plan, layers) == ON_THE_WAY]
    sizes = [plan.tokens * wide * bound.dtype.itemsize for wide in kept]
    return layers * sum(1 << (size - 1).bit_length() for size in sizes)
