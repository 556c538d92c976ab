"""How a run spends its memory: tokens of a pass, activations saved for the backward pass, copies of the weights.

Everything large is counted from the same table that it is allocated by (workspace.py).
Shape suffixes: N documents of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from parley.library_compat import flash_attn
from parley.train_step.long_documents import FLASH_4_HEADS, LONG_DOCUMENT, padded_length
from parley.train_step.matmul import uses_onednn
from parley.train_step.workspace import (
    OFFLOAD_BUFFERS,
    SAVED_BUFFERS,
    buffer_columns,
    buffer_count,
    workspace_bytes,
)
from parley.units import GIB

if TYPE_CHECKING:
    from parley.train_step.bind import BoundModel

SAVED_POLICIES = tuple(SAVED_BUFFERS)  # fastest first
GRAPH_TOKENS = 8192  # longer passes keep the device busy without a graph
# Rows of (the MLP, the logits) at a time, where memory is short; fewer would leave the device idle. The MLP's are the
# more work: in chunks of 2,048 of 8,190, products of the 8B shape took about 10 of 640 ms longer (H100).
CHUNK_ROWS = ((4096, 1024), (4096, 512), (2048, 512), (2048, 256))
MAX_PASS_TOKENS = 32768  # of several documents; more is no faster
RESERVE = 0.1  # share of the free memory that stays free: fragmentation and other processes
LIBRARY_BYTES = 96 * 2**20  # workspace of cuBLAS and the graphs' own memory pool


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is carried out.

    Attributes:
        positions: tokens of the longest document.
        tokens: the most tokens of a pass; a longer step is split between documents.
        saved: which activations are saved for the backward pass, a key of workspace.SAVED_BUFFERS.
        cache_matrices: keep every fused matrix, dequantised, instead of filling one shared matrix at each use.
        logits_rows: supervised rows whose logits exist at a time.
        mlp_rows: rows that go through the MLP at a time; 0 for all.
        graph_tokens: passes of up to so many tokens are replayed as CUDA graphs; 0 for none.
        pad_multiple: passes are padded to a multiple of so many tokens.
        predicted_bytes, allowed_bytes: the predicted peak and the limit it was planned for; 0 where not counted.
    """

    positions: int = 2048
    tokens: int = 16384
    saved: str = "all"
    cache_matrices: bool = True
    logits_rows: int = 1024
    mlp_rows: int = 0
    graph_tokens: int = 0
    pad_multiple: int = 128
    predicted_bytes: int = 0
    allowed_bytes: int = 0

    @property
    def offload(self) -> bool:
        """Whether saved activations are offloaded to host memory."""
        return self.saved == "attention_offloaded"

    def describe(self) -> list[str]:
        """The choices and the predicted memory, one line each, for the log."""
        activations = {
            "all": "all activations saved",
            "linear": "norms and activation functions recomputed in the backward pass",
            "attention": "MLP recomputed in the backward pass",
            "attention_offloaded": "attention offloaded to host memory, MLP recomputed in the backward pass",
            "layer_inputs": "each layer recomputed from its input in the backward pass",
        }[self.saved]
        weights = "dequantized weights kept" if self.cache_matrices else "weights dequantized at each use"
        graphs = f", replayed as CUDA graphs up to {self.graph_tokens} tokens" if self.graph_tokens else ""
        predicted, allowed = self.predicted_bytes / GIB, self.allowed_bytes / GIB
        return [
            f"fused step: up to {self.tokens} tokens a pass{graphs}; {activations}; {weights}",
            f"memory: {predicted:.2f} GiB predicted of {allowed:.2f} GiB allowed",
        ]


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that a plan is made for.

    Attributes:
        device: its type decides which buffers there are.
        usable_bytes: what a run may take in all with memory: auto.
        held_bytes: what weights and gradients hold before the step allocates its own.
        host_bytes: what offloaded activations may take of the host.
    """

    device: torch.device
    usable_bytes: int
    held_bytes: int
    host_bytes: int

    @classmethod
    def present(cls, bound: BoundModel) -> DeviceMemory:
        """The device that the model is on. On a CPU the weights are not counted: its memory is what is available."""
        available = int(psutil.virtual_memory().available * (1 - RESERVE))
        if bound.device.type != "cuda":
            return cls(bound.device, available, 0, available)
        free, _ = torch.cuda.mem_get_info(bound.device)
        usable = int((free + torch.cuda.memory_reserved(bound.device)) * (1 - RESERVE))
        return cls(bound.device, usable, torch.cuda.memory_allocated(bound.device), available)


def make_plan(
    bound: BoundModel,
    memory: Literal["auto", "low"] | float,
    length_N: NDArray[np.integer],
    documents: int,
    state_bytes: float = 2,
    device: DeviceMemory | None = None,
) -> MemoryPlan:
    """The fastest plan that fits; the one that takes the least memory where none does.

    Args:
        memory: "auto": the device's free memory; "low": what the leanest plan needs; a number: GiB in all.
        length_N: tokens of each document of the data, or of the longest alone where the others are unknown.
        documents: documents of an optimizer step.
        state_bytes: optimizer state per adapter weight.
        device: another device than the one that the model is on, to plan for it.
    """
    device = device or DeviceMemory.present(bound)
    allowed = int(memory * GIB) if isinstance(memory, int | float) else device.usable_bytes
    plans = list(_candidates(bound, length_N, documents, cuda=device.device.type == "cuda"))
    if memory == "low":
        plans = plans[-1:]
    possible = [plan for plan in plans if not plan.offload or _host_bytes(plan, bound) <= device.host_bytes]
    counted = [_count(plan, bound, device, allowed, state_bytes) for plan in possible]
    fitting = (plan for plan in counted if plan.predicted_bytes <= allowed)
    return next(fitting, min(counted, key=lambda plan: plan.predicted_bytes))


def step_tokens(length_N: NDArray[np.integer], documents: int) -> int:
    """Tokens of the longest of a thousand randomly sampled steps; a longer one is split over two passes."""
    return int(sampled_steps(length_N, documents).max())


def sampled_steps(length_N: NDArray[np.integer], documents: int) -> NDArray[np.integer]:
    """Tokens of a thousand randomly sampled steps; one step of longest documents where only their length is known."""
    if len(length_N) == 1:
        return length_N * documents
    return np.random.default_rng(0).choice(length_N, (1000, documents)).sum(1)


def _candidates(
    bound: BoundModel, length_N: NDArray[np.integer], documents: int, *, cuda: bool
) -> Iterator[MemoryPlan]:
    """All plans, from the fastest to the one that takes the least memory."""
    longest = int(length_N.max())
    step = max(longest, min(step_tokens(length_N, documents), MAX_PASS_TOKENS))
    for cache_matrices in (True, False):
        for saved in SAVED_POLICIES:
            offload = saved == "attention_offloaded"
            if offload and not (cuda and len(bound.layers) > OFFLOAD_BUFFERS):
                continue
            for tokens in _pass_sizes(step, longest):
                plan = MemoryPlan(
                    positions=longest,
                    tokens=tokens,
                    saved=saved,
                    cache_matrices=cache_matrices,
                    graph_tokens=GRAPH_TOKENS if cuda and not offload else 0,
                )
                if "gate_up" in SAVED_BUFFERS[saved]:  # a saved MLP is saved whole
                    yield plan
                    continue
                for mlp_rows, logits_rows in CHUNK_ROWS:
                    yield replace(plan, mlp_rows=mlp_rows if tokens > mlp_rows else 0, logits_rows=logits_rows)


def _pass_sizes(step: int, longest: int) -> list[int]:
    """Tokens of a pass to try: the whole step, then half, down to the longest document."""
    sizes = [step]
    while sizes[-1] // 2 >= longest:
        sizes.append(sizes[-1] // 2)
    return sizes if sizes[-1] == longest else [*sizes, longest]


def _count(plan: MemoryPlan, bound: BoundModel, device: DeviceMemory, allowed: int, state_bytes: float) -> MemoryPlan:
    """`plan` with its predicted peak."""
    predicted = device.held_bytes + sum(buffer_bytes(plan, bound, device.device, state_bytes).values())
    return replace(plan, predicted_bytes=predicted, allowed_bytes=allowed)


def buffer_bytes(plan: MemoryPlan, bound: BoundModel, device: torch.device, state_bytes: float) -> dict[str, int]:
    """What the step and its optimizer allocate beside weights and gradients, by what it is for."""
    cuda = device.type == "cuda"
    itemsize = bound.dtype.itemsize
    contiguous = uses_onednn(bound.dtype, device)
    matrices = [linear.matrix_numel(contiguous=contiguous) * itemsize for linear in bound.linears]
    fused = sum(matrices) if plan.cache_matrices else sum(matrices[:4])
    if not plan.cache_matrices:  # the dequantised block scales of the largest weight
        fused += max(matrices) // 16
    return {
        "optimizer state": int(state_bytes * bound.flat.weight_Z.numel()),
        "dequantized weights": fused,
        "activations": workspace_bytes(bound, plan) + _attention_bytes(plan, bound, device),
        "logits and loss": plan.logits_rows * len(bound.head_VD) * itemsize,
        "library buffers": LIBRARY_BYTES if cuda else 0,
    }


def _attention_bytes(plan: MemoryPlan, bound: BoundModel, device: torch.device) -> int:
    """The log-sum-exp of each row, and the temporaries of long documents (kernels/library_attention.py)."""
    shape = bound.layers[0].shape
    lse = 4 * shape.heads * plan.tokens * (1 if plan.saved == "layer_inputs" else len(bound.layers))
    if plan.positions < LONG_DOCUMENT or device.type != "cuda":
        return lse
    columns = shape.heads * shape.head_dim
    if shape.head_dim in FLASH_4_HEADS and flash_attn.usable(device):
        # The gradients of all tokens in fp32, and two numbers for each head.
        return lse + 4 * plan.tokens * (shape.columns + 2 * shape.heads)
    # cuDNN's, of one document: padded inputs, output and its gradient, the inputs' gradients, those of keys and values
    # for every query head before they are summed, and queries' in fp32.
    itemsize = bound.dtype.itemsize
    return lse + padded_length(plan.positions) * (2 * shape.columns * itemsize + columns * (5 * itemsize + 4))


def _host_bytes(plan: MemoryPlan, bound: BoundModel) -> int:
    """Pinned memory of an offloaded plan; torch rounds each pinned allocation up to a power of two."""
    layers = len(bound.layers)
    columns = [c for name, c in buffer_columns(bound).items() if buffer_count(name, plan, layers) == OFFLOAD_BUFFERS]
    sizes = [plan.tokens * c * bound.dtype.itemsize for c in columns]
    return layers * sum(1 << (size - 1).bit_length() for size in sizes)
