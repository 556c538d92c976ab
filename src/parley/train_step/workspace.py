"""The memory of a pass: every large buffer that a layer writes, allocated once and handed out by name.

A buffer that the plan keeps for the backward pass exists once a layer; one that it offloads, twice for all layers (one
is computed in while the other travels); any other, once. Passes of any size take the beginning of the same memory, so
that the peak is known before the first step and CUDA graphs of all sizes share it.

Shape suffixes: T tokens of a pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parley.train_step.matmul import whole

if TYPE_CHECKING:
    from parley.train_step.bind import Bound
    from parley.train_step.memory_plan import Plan

ATTENTION = frozenset({"x", "unturned", "qkv", "attended", "mid"})
KEEP = {  # what a pass holds on to between forward and backward, from the most memory to the least
    "everything": ATTENTION | {"normed", "mid_normed", "gate_up", "act"},
    "products": ATTENTION | {"gate_up"},
    "attention": ATTENTION,
    "offloaded": ATTENTION,
    "inputs": frozenset({"x"}),
}
FEED = ("gate_up", "act")  # written for some rows at a time where the plan says so
ON_THE_WAY = 2  # buffers of each offloaded name
LARGE = 31 * 2**20  # bytes; glibc minds blocks of up to 32 MiB


def columns(bound: Bound) -> dict[str, int]:
    """Columns of each buffer, the widest layer's."""
    hidden = bound.norm_D.shape[0]

    def most(name: str, side: str, *, spare: bool = True) -> int:
        linears = [vars(layer)[name] for layer in bound.layers]
        return max(vars(linear)[side] + spare * linear.spare for linear in linears)

    widths = {
        "x": hidden,
        "normed": most("qkv", "columns_in"),
        "qkv": most("qkv", "columns_out", spare=False),
        "attended": most("o", "columns_in"),
        "mid": hidden,
        "mid_normed": most("gate_up", "columns_in"),
        "gate_up": most("gate_up", "columns_out"),
        "act": most("down", "columns_in"),
        "branch": hidden,  # what attention or the feed-forward adds to the residual stream
        "dh": hidden + max(linear.spare for layer in bound.layers for linear in (layer.o, layer.down)),
        "dattended": most("o", "columns_in", spare=False),
        "dqkv": most("qkv", "columns_out"),
    }
    if any(layer.head_norms is not None for layer in bound.layers):
        widths["unturned"] = widths["qkv"]
    return widths


def copies(name: str, plan: Plan, layers: int) -> int:
    """How many buffers of this name there are."""
    if name not in KEEP[plan.keep]:
        return 1
    return min(ON_THE_WAY, layers) if plan.offload else layers


def workspace_bytes(bound: Bound, plan: Plan) -> int:
    """What a Workspace for passes of `plan.tokens` takes."""
    width = bound.dtype.itemsize
    return sum(
        copies(name, plan, len(bound.layers)) * _rows(name, plan, plan.tokens) * wide * width
        for name, wide in columns(bound).items()
    )


class Workspace:
    """Hands out buffers; what was in one is gone once the next layer of the same place takes it."""

    def __init__(self, bound: Bound, plan: Plan) -> None:
        self.bound, self.plan = bound, plan
        self.columns = columns(bound)
        self.copies = {name: copies(name, plan, len(bound.layers)) for name in self.columns}
        self.tokens = 0
        self.buffers: dict[tuple[str, int], Tensor] = {}

    def reserve(self, tokens: int) -> bool:
        """Make room for passes of `tokens`. True when buffers moved: graphs that read them must be dropped."""
        if tokens <= self.tokens:
            return False
        self.buffers.clear()
        self.tokens = whole(max(tokens, self.plan.tokens), self.plan.granule)
        for name, count in self.copies.items():
            size = _rows(name, self.plan, self.tokens) * self.columns[name]
            for place in range(count):
                self.buffers[name, place] = torch.empty(size, dtype=self.bound.dtype, device=self.bound.device)
        return True

    def take(self, name: str, index: int, rows: int, wide: int | None = None) -> Tensor:
        """The unwritten buffer (rows, wide) of layer `index`; all columns where `wide` is not given."""
        wide = self.columns[name] if wide is None else wide
        return self.buffers[name, index % self.copies[name]][: rows * wide].view(rows, wide)


def keep_what_is_freed() -> None:
    """Have glibc hold on to the memory of a CPU's passing results instead of giving it back page by page.

    It gives back what lies free beyond twice the largest block that it ever mapped by itself and saw freed
    (mallopt(3), M_MMAP_THRESHOLD), so one large block makes it keep 62 MiB. Without, a step of the demo now and then
    took 800 page faults and 6 ms more. Other allocators do not mind.
    """
    torch.empty(LARGE, dtype=torch.uint8)


def _rows(name: str, plan: Plan, tokens: int) -> int:
    if name in FEED and plan.feed_rows:
        tokens = min(tokens, plan.feed_rows)
    return whole(tokens, plan.granule)
