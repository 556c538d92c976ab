"""The fast step: the gradient of packed conversations, eagerly or replayed from CUDA graphs.

Shape suffixes: T tokens, D hidden, P spare columns, G all adapter weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from parley.train_step import reference_ops as reference
from parley.train_step.activation_offload import Offload
from parley.train_step.bind import Bound
from parley.train_step.cuda_graphs import Graphs
from parley.train_step.decoder_layer import Context, Onward, Saved, backward, forward
from parley.train_step.fused_linear import Matrices
from parley.train_step.lm_head import head
from parley.train_step.matmul import WHOLE, whole
from parley.train_step.memory_plan import Plan
from parley.train_step.ops import Ops
from parley.train_step.packed_batch import LONG, Example, Pack, Rows, Staging, pack, split
from parley.train_step.workspace import Workspace, keep_what_is_freed

DRY = (1024, 2048, 4096)  # rows of passes that between them launch all kernels: see kernels/adapters


@dataclass
class Middle:
    """A pass between its forward and backward half: the last layer's output h + delta, room for its gradient."""

    h_TD: Tensor
    delta_TD: Tensor
    dh_TDP: Tensor
    saved: list[Saved]
    onward: Onward | None = None  # where the last layer's output has only these rows


class FusedStep:
    """Adds the gradient of a step's conversations to `bound.flat.grad_G` and keeps its figures on the device.

    After `run`, `figures_3` holds the summed loss of the step's supervised tokens, how many of them were the most
    likely ones, and their summed entropy.
    """

    def __init__(self, bound: Bound, plan: Plan, ops: Ops | None = None) -> None:
        self.bound, self.plan = bound, plan
        self.ops = ops or operations(bound.device)
        self.rope = bound.rope(plan.positions)
        self.staging = Staging(bound.device, plan.tokens + plan.granule)
        self.workspace = Workspace(bound, plan)
        self.offload = Offload(self.workspace) if plan.offload else None
        self.logits_SV = bound.embedding_VD.new_empty(plan.head_rows, len(bound.head_VD))
        self.figures_3 = torch.zeros(3, dtype=torch.float32, device=bound.device)
        self.matrices = Matrices(bound.linears, 4, self.ops, bound.dtype, bound.device)
        self.graphs = Graphs(self) if plan.graph_tokens else None
        on_cpu = bound.device.type == "cpu"
        self.whole = WHOLE if on_cpu else 1  # rows of a pass without a graph, in multiples
        self.narrow = on_cpu and plan.keep == "everything"  # a graph knows no number of supervised rows
        if on_cpu:
            keep_what_is_freed()
        with torch.no_grad():
            if plan.keep_matrices:
                self.matrices.keep()
            else:
                self.matrices.share()

    @torch.no_grad()
    def run(self, examples: Sequence[Example], supervised: int) -> None:
        """The gradient of one optimizer step. Its loss is the sum over supervised tokens divided by `supervised`."""
        self.bound.flat.grad_G.zero_()
        self.figures_3.zero_()
        for documents in split(examples, self.plan.tokens):
            packed = pack(documents)
            if len(packed.row_S):
                self._pass(packed.needed(), 1.0 / supervised)

    @torch.no_grad()
    def measure(self, examples: Sequence[Example]) -> Tensor:
        """`figures_3` of `examples`; no gradient is touched."""
        self.figures_3.zero_()
        for documents in split(examples, self.plan.tokens):
            needed = pack(documents).needed()
            if len(needed.row_S):
                rows = self._send(needed, 1.0, whole(len(needed.ids_T), self.whole))
                self.head(rows, self.forward(rows))
        return self.figures_3.clone()

    @torch.no_grad()
    def compile(self) -> None:
        """Compile what passes like the plan's launch now, side by side; a CPU has nothing to compile."""
        if self.bound.device.type != "cuda":
            return
        from parley.train_step.kernels.precompile import compiling  # Triton is there only where a GPU is

        plan = self.plan
        with compiling(self.bound.device):
            for tokens in sorted({min(tokens, plan.tokens) for tokens in DRY}):
                self.eager(self._send(_made_up(tokens, plan.positions), 1.0, whole(tokens, plan.granule)))
            odd = max(min(DRY[0], plan.tokens) - 1, 1)  # no multiple of what alignment is compiled for, as in `measure`
            rows = self._send(_made_up(odd, plan.positions), 1.0, odd)
            self.head(rows, self.forward(rows))

    def _send(self, packed: Pack, scale: float, tokens: int, *, graphed: bool = False) -> Rows:
        """`packed` on the device, in a row of `tokens`; graphs that read what had to move for it are dropped."""
        moved = [self.staging.reserve(tokens), self.workspace.reserve(tokens)]
        longest = max(packed.lengths)
        if longest > len(self.rope.cos_PE):
            self.rope = self.bound.rope(longest)
            moved.append(True)
        if any(moved) and self.graphs is not None:
            self.graphs.clear()
        return self.staging.send(packed.padded(tokens), scale, None if graphed else packed.lengths)

    def _pass(self, packed: Pack, scale: float) -> None:
        if self.graphs is not None and len(packed.ids_T) <= self.plan.graph_tokens:
            self.graphs.run(self._send(packed, scale, self.graphs.rows_for(len(packed.ids_T)), graphed=True))
            return
        self.eager(self._send(packed, scale, whole(len(packed.ids_T), self.whole)))

    def eager(self, rows: Rows) -> None:
        """A whole pass, launch by launch."""
        middle = self.forward(rows)
        self.head(rows, middle)
        self.backward(rows, middle)

    def forward(self, rows: Rows) -> Middle:
        context = self._context(rows)
        self.matrices.refresh()
        h_TD = torch.index_select(self.bound.embedding_VD, 0, rows.ids_T, out=context.take("x", 0))
        delta_TD, passed, onward = None, [], None
        for index, layer in enumerate(self.bound.layers):
            if self.offload is not None:
                self.offload.make_place(index)
            if index == len(self.bound.layers) - 1:
                onward = self._onward(rows)
            saved, h_TD, delta_TD = forward(context, layer, index, h_TD, delta_TD, onward)
            passed.append(saved)
            if self.offload is not None:
                self.offload.send(index, saved.kept())
        assert delta_TD is not None
        dh_TDP = context.take("dh", 0)
        dh_TDP = dh_TDP.zero_() if onward is None else dh_TDP.new_zeros(len(onward.row_S), dh_TDP.shape[1])
        return Middle(h_TD, delta_TD, dh_TDP, passed, onward)

    def _onward(self, rows: Rows) -> Onward | None:
        """The supervised rows, in a whole multiple, where nothing past the last attention is asked of the others."""
        real = len(rows.row_S)
        more = -real % self.whole
        if not self.narrow or real + more >= rows.tokens:
            return None
        return Onward(functional.pad(rows.row_S.long(), (0, more)), real)

    def head(self, rows: Rows, middle: Middle) -> None:
        onward = middle.onward
        row_S = rows.row_S if onward is None else torch.arange(onward.real, device=rows.row_S.device)
        head(
            self.ops, self.bound, rows, row_S, middle.h_TD, middle.delta_TD, middle.dh_TDP, self.logits_SV,
            self.figures_3,
        )  # fmt: skip

    def backward(self, rows: Rows, middle: Middle) -> None:
        context, dh_TDP, onward = self._context(rows), middle.dh_TDP, middle.onward
        for index in reversed(range(len(middle.saved))):
            if self.offload is not None:
                self.offload.fetch(index - 1)
                self.offload.need(index)
            layer, saved = self.bound.layers[index], middle.saved.pop()
            dh_TDP = backward(context, layer, saved, dh_TDP, want_dx=index > 0, onward=onward)
            onward = None

    def _context(self, rows: Rows) -> Context:
        return Context(self.ops, self.matrices, self.rope, rows, self.workspace, rows.tokens)


def _made_up(tokens: int, longest: int) -> Pack:
    """A pack of this size, of documents that go through the kernels."""
    longest = min(longest, LONG - 1)
    lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
    return pack(Example.of([0] * length, [0] * length) for length in lengths)


def operations(device: torch.device) -> Ops:
    """The operations for `device`: Triton's on a GPU, PyTorch's elsewhere."""
    if device.type != "cuda":
        return reference
    from parley.train_step import kernels  # Triton is there only where a GPU is

    return kernels
