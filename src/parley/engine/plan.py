"""What a run's memory is spent on: rows of a pass, what is kept for the backward pass, copies of the weights.

Shape suffixes: T tokens, D hidden, F feed-forward, C query, key and value columns, V vocabulary, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import psutil
import torch

if TYPE_CHECKING:
    from parley.engine.bind import Bound

GIB = 2**30
KINDS = ("everything", "products", "attention", "inputs")  # see layer.KEEP; from the fastest to the leanest
GRAPH_TOKENS = 8192  # longer passes keep the device busy without a graph
RESERVE = 0.1  # of the free memory is left alone
FRAGMENTS = 1.12  # what the allocator held for each byte that was counted: 1.06 to 1.15 in docs/performance.md's runs


@dataclass(frozen=True)
class Plan:
    """How a step is carried out. Bytes are the predicted peak and what it was to fit in; 0 where nobody counted."""

    positions: int = 2048
    tokens: int = 16384
    keep: str = "everything"
    keep_matrices: bool = True
    head_rows: int = 4096
    graph_tokens: int = 0
    granule: int = 128
    predicted: int = 0
    allowed: int = 0

    def lines(self) -> list[str]:
        """What was chosen and why, in plain words."""
        kept = {
            "everything": "all activations kept",
            "products": "norms and activations computed anew in the backward pass",
            "attention": "feed-forward products computed anew in the backward pass",
            "inputs": "each layer computed anew from its input in the backward pass",
        }[self.keep]
        weights = "unpacked weights kept" if self.keep_matrices else "weights unpacked at each use"
        graphs = f", replayed as CUDA graphs up to {self.graph_tokens} tokens" if self.graph_tokens else ""
        return [
            f"fast step: up to {self.tokens} tokens a pass{graphs}; {kept}; {weights}",
            f"memory: {self.predicted / GIB:.2f} GiB predicted of {self.allowed / GIB:.2f} GiB allowed",
        ]


def make_plan(bound: Bound, memory: Literal["auto", "low"] | float, longest: int, documents: int) -> Plan:
    """The fastest plan that fits; the leanest where none does.

    Args:
        memory: "auto": what the device has free; "low": what the leanest plan needs; a number: GiB in all.
        longest: tokens of the longest document.
        documents: documents of an optimizer step.
    """
    allowed = _allowed(bound, memory)
    whole = min(longest * documents, max(longest, 32768))
    plans = [
        Plan(
            positions=longest,
            tokens=tokens,
            keep=keep,
            keep_matrices=keep_matrices,
            head_rows=4096 if keep_matrices else 256,
            graph_tokens=GRAPH_TOKENS if bound.device.type == "cuda" and keep_matrices else 0,
            granule=128,
        )
        for keep_matrices in (True, False)
        for keep in KINDS
        for tokens in _halves(whole, longest)
    ]
    if memory == "low":
        plans = plans[-1:]
    counted = [_count(plan, bound, allowed) for plan in plans]
    return next((plan for plan in counted if plan.predicted <= allowed), min(counted, key=lambda plan: plan.predicted))


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


def _count(plan: Plan, bound: Bound, allowed: int) -> Plan:
    """`plan` with its predicted peak: everything on the device counted, and what the allocator holds besides."""
    width = bound.embedding_VD.element_size()
    matrices = [rows * columns * width for rows, columns in (linear.matrix_shape for linear in bound.linears)]
    weights = torch.cuda.memory_allocated(bound.device) if bound.device.type == "cuda" else 0
    optimizer = 2 * bound.flat.weight_G.numel()  # 8-bit moments; the weights and gradients are allocated by now
    copies = sum(matrices) if plan.keep_matrices else sum(matrices[:4])
    if not plan.keep_matrices:  # the scales of the largest weight, unpacked
        copies += max(matrices) // 16
    layer = bound.layers[0]
    hidden = layer.norm_in_D.shape[0]
    normed, qkv = layer.qkv.columns_in + layer.qkv.spare, layer.qkv.columns_out
    attended, feed = layer.o.columns_in + layer.o.spare, layer.gate_up.columns_out
    act = layer.down.columns_in + layer.down.spare
    attention = qkv + attended + hidden
    kept = {
        "inputs": hidden,
        "attention": hidden + attention,
        "products": hidden + attention + feed,
        "everything": hidden + attention + feed + 2 * normed + act,
    }[plan.keep]
    working = feed + act + 3 * hidden + 2 * normed + qkv + 2 * attended  # of the one layer that is being computed
    activations = plan.tokens * width * (kept * len(bound.layers) + working)
    logits = min(plan.head_rows, plan.tokens) * bound.head_VD.shape[0] * width
    predicted = int(FRAGMENTS * (weights + optimizer + copies + activations + logits))
    return Plan(**(plan.__dict__ | {"predicted": predicted, "allowed": allowed}))
