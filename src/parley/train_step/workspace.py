"""The activation memory of a pass: every large buffer that a layer writes, allocated once and handed out by name.

A buffer that is saved for the backward pass exists once per layer; one that is offloaded, twice for all layers (double
buffering); any other, once. Passes of any size use the beginning of the same memory, so that the peak is known before
the first step and CUDA graphs of all sizes share it.

Shape suffixes (legend in docs/design.md): T tokens of a pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parley.units import round_up

if TYPE_CHECKING:
    from parley.train_step.bind import BoundModel
    from parley.train_step.memory_plan import MemoryPlan

ATTENTION = frozenset({"x", "qkv_unnormed", "qkv", "attention_out", "attention_branch", "mid"})
# Buffers saved between forward and backward under each policy of activation recomputation, from the most memory to the
# least. What is not saved is recomputed.
SAVED_BUFFERS = {
    "all": ATTENTION | {"normed", "mid_normed", "gate_up", "act", "mlp_branch"},
    "linear": ATTENTION | {"gate_up", "mlp_branch"},
    "attention": ATTENTION,
    "attention_offloaded": ATTENTION,
    "layer_inputs": frozenset({"x"}),
}
MLP_BUFFERS = ("gate_up", "act", "dgate_up")  # chunked by rows where the plan says so
OFFLOAD_BUFFERS = 2  # device buffers of each offloaded name
MMAP_BYTES = 31 * 2**20  # glibc's M_MMAP_THRESHOLD grows to at most 32 MiB


def buffer_columns(bound: BoundModel) -> dict[str, int]:
    """Columns of each buffer: those of the layer that needs the most."""
    hidden = bound.hidden_size

    def widest(linear: str, side: str, *, lora_columns: bool = True) -> int:
        linears = [vars(layer)[linear] for layer in bound.layers]
        return max(vars(linear)[side] + lora_columns * linear.lora_columns for linear in linears)

    columns = {
        "x": hidden,
        "normed": widest("qkv", "in_features"),
        "qkv": widest("qkv", "out_features", lora_columns=False),
        "attention_out": widest("o", "in_features"),
        "mid": hidden,
        "mid_normed": widest("gate_up", "in_features"),
        "gate_up": widest("gate_up", "out_features"),
        "act": widest("down", "in_features"),
        "branch": hidden,  # the output of attention or MLP, before it is added to the residual stream
        "dh": hidden + max(linear.lora_columns for layer in bound.layers for linear in (layer.o, layer.down)),
        "dattention_out": widest("o", "in_features", lora_columns=False),
        "dqkv": widest("qkv", "out_features"),
    }
    if any(layer.qk_norm is not None for layer in bound.layers):
        columns["qkv_unnormed"] = columns["qkv"]
    if any(layer.keeps_attention_branch for layer in bound.layers):
        columns["attention_branch"] = hidden
    if any(layer.keeps_mlp_branch for layer in bound.layers):
        columns["mlp_branch"] = hidden
    if any(layer.transforms_branches or layer.o.dora or layer.down.dora for layer in bound.layers):
        columns["dbranch"] = columns["dh"]
    if any(layer.gate_up.dora for layer in bound.layers):
        columns["dgate_up"] = columns["gate_up"]
    if any(linear.has_dropout for linear in bound.linears):
        columns["dropped"] = max(linear.in_features + linear.lora_columns for linear in bound.linears)
    return columns


def buffer_count(name: str, plan: MemoryPlan, layers: int) -> int:
    """How many buffers of this name there are."""
    if name not in SAVED_BUFFERS[plan.saved]:
        return 1
    return min(OFFLOAD_BUFFERS, layers) if plan.offload else layers


def workspace_bytes(bound: BoundModel, plan: MemoryPlan) -> int:
    """Bytes that a Workspace for passes of `plan.tokens` allocates."""
    return sum(
        buffer_count(name, plan, len(bound.layers)) * _rows(name, plan, plan.tokens) * columns * bound.dtype.itemsize
        for name, columns in buffer_columns(bound).items()
    )


class Workspace:
    """Hands out buffers; the contents of one are gone once the next layer that shares it takes it."""

    def __init__(self, bound: BoundModel, plan: MemoryPlan) -> None:
        self.bound, self.plan = bound, plan
        self.columns = buffer_columns(bound)
        self.counts = {name: buffer_count(name, plan, len(bound.layers)) for name in self.columns}
        self.tokens = 0
        self.buffers: dict[tuple[str, int], Tensor] = {}

    def reserve(self, tokens: int) -> bool:
        """Grow to passes of `tokens`. True when buffers moved: graphs that read them must be dropped."""
        if tokens <= self.tokens:
            return False
        self.buffers.clear()  # before allocating, so that the peak is the larger set and not the sum of both
        self.tokens = round_up(max(tokens, self.plan.tokens), self.plan.pad_multiple)
        for name, count in self.counts.items():
            size = _rows(name, self.plan, self.tokens) * self.columns[name]
            for i in range(count):
                self.buffers[name, i] = torch.empty(size, dtype=self.bound.dtype, device=self.bound.device)
        return True

    def take(self, name: str, index: int, rows: int, columns: int | None = None) -> Tensor:
        """The uninitialised buffer (rows, columns) of layer `index`; all columns where `columns` is not given."""
        columns = self.columns[name] if columns is None else columns
        return self.buffers[name, index % self.counts[name]][: rows * columns].view(rows, columns)


def retain_freed_memory() -> None:
    """Have glibc keep the freed memory of a CPU's temporaries instead of returning it page by page.

    It returns what lies free beyond twice the largest block that it ever mapped and saw freed (mallopt(3),
    M_MMAP_THRESHOLD), so one large block makes it keep 62 MiB. Without, a step of the demo now and then took 800 page
    faults and 6 ms more. Other allocators are not affected.
    """
    torch.empty(MMAP_BYTES, dtype=torch.uint8)


def _rows(name: str, plan: MemoryPlan, tokens: int) -> int:
    if name in MLP_BUFFERS and plan.mlp_rows:
        tokens = min(tokens, plan.mlp_rows)
    return round_up(tokens, plan.pad_multiple)
