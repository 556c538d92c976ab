"""The fused training step: the gradient of a packed batch, eagerly or replayed from CUDA graphs.

Shape suffixes (legend in docs/design.md): T tokens, D hidden, P LoRA columns, S supervised rows, V vocabulary, Z all
adapter weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from parley.data.packing import Document, split_by_tokens
from parley.train_step.activation_offload import ActivationOffload
from parley.train_step.bind import BoundModel
from parley.train_step.cuda_graphs import GraphRunner
from parley.train_step.decoder_layer import PassContext, SavedActivations, SupervisedRows, backward, forward
from parley.train_step.device_ops import ops_for
from parley.train_step.fused_linear import FusedMatrixCache
from parley.train_step.lm_head import loss_and_gradient
from parley.train_step.long_documents import LONG_DOCUMENT, planned_lengths
from parley.train_step.matmul import ONEDNN_ROW_MULTIPLE
from parley.train_step.memory_plan import MemoryPlan
from parley.train_step.ops import Ops, RopeTable
from parley.train_step.packed_batch import DeviceBatch, PackedBatch, StagingBuffer, pack
from parley.train_step.slots import Slots, copy_to
from parley.train_step.workspace import Workspace, retain_freed_memory
from parley.units import round_up

TRITON_ROW_MULTIPLE = 16  # Triton compiles another variant of a kernel for sizes that are no multiple of it
COMPILE_TOKENS = (1024, 2048, 4096)  # batch sizes that between them launch every kernel variant: see kernels/lora.py


@dataclass
class ForwardState:
    """A pass between its forward and backward half: the last layer's output h + delta, a buffer for its gradient."""

    h_TD: Tensor
    delta_TD: Tensor
    dh_TDP: Tensor
    saved: list[SavedActivations]
    supervised: SupervisedRows | None = None  # where the last layer's output has only these rows

    def weight_gradient(self, batch: DeviceBatch, weight_S: Tensor) -> None:
        """Multiply each supervised row's loss by its weight, after the head: the gradient is linear in the rows."""
        weight_S1 = weight_S[:, None]
        if self.supervised is not None:  # the gradient has the supervised rows alone, in order
            self.dh_TDP[: len(weight_S1)] *= weight_S1
        else:
            row_S = batch.row_S.long()
            self.dh_TDP.index_copy_(0, row_S, (self.dh_TDP[row_S] * weight_S1).to(self.dh_TDP.dtype))


Head = Callable[[DeviceBatch, ForwardState], Any]
"""From a pass's last hidden states to their gradient in its ForwardState."""


class FusedStep:
    """Computes the gradient of an optimizer step's documents into `bound.flat.grad_Z`; its metrics stay on the device.

    After `forward_backward`, `metrics_3` holds, over the step's supervised tokens: the summed loss (weighted), how many
    were the most likely token, and the summed entropy.
    """

    def __init__(self, bound: BoundModel, plan: MemoryPlan, ops: Ops | None = None) -> None:
        self.bound = bound
        self.ops = ops or ops_for(bound.device)
        self.positions = 0
        self.rope = self._rope_tables(plan.positions)
        self.staging = StagingBuffer(bound.device, plan.tokens + plan.pad_multiple)
        self.metrics_3 = bound.flat.metrics_3
        self.matrices = FusedMatrixCache(bound.linears, 4, self.ops, bound.dtype, bound.device)
        on_cpu = bound.device.type == "cpu"
        self.row_multiple = ONEDNN_ROW_MULTIPLE if on_cpu else TRITON_ROW_MULTIPLE  # of a pass without a graph
        if on_cpu:
            retain_freed_memory()
        self._use_plan(plan)
        with torch.no_grad():
            if plan.cache_matrices:
                self.matrices.allocate_all()
            else:
                self.matrices.allocate_shared()

    def _use_plan(self, plan: MemoryPlan) -> None:
        """Set up the buffers of a pass; their memory is allocated by the first pass, but for the logits."""
        self.plan = plan
        self.graphs = GraphRunner(self) if plan.graph_tokens else None
        self.workspace = Workspace(self.bound, plan)
        self.offload = ActivationOffload(self.workspace) if plan.offload else None
        # A captured graph has a fixed shape, so it cannot depend on the number of supervised rows.
        self.skip_unsupervised = self.bound.device.type == "cpu" and plan.saved == "all"
        self.logits_SV = self.bound.embedding_VD.new_empty(plan.logits_rows, len(self.bound.head_VD))

    def limit_pass(self, tokens: int) -> None:
        """Carry out later passes in rows of at most `tokens`, after a pass ran out of memory.

        The buffers of the failed pass are dropped before new ones are allocated, and so are its graphs. Gradients and
        `metrics_3` are whole again after the next `forward_backward`, which begins with zeros.
        """
        del self.logits_SV
        self.matrices.refresh_adapters()  # the failed pass may have left a shared matrix half filled
        self._use_plan(replace(self.plan, tokens=tokens))

    @torch.no_grad()
    def forward_backward(self, documents: Sequence[Document], divisor: float) -> None:
        """The gradient of one optimizer step: of the summed loss divided by `divisor`, the sum of its weights."""
        self.bound.flat.grad_Z.zero_()
        self.metrics_3.zero_()
        for run in split_by_tokens([len(d.ids_L) for d in documents], self.plan.tokens):
            batch = self._pack(documents[run])
            if len(batch.row_S):
                self._pass(batch, 1.0 / divisor)

    @torch.no_grad()
    def forward_backward_sums(
        self, documents: Sequence[Document], slots: Slots, gradient: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The gradient of a function of sums of log-probabilities, such as a preference loss.

        The function's derivative by each sum is all that the backward pass needs of it: the head's gradient is linear
        in its rows, so their weights are multiplied in between head and backward, and both run once.

        Args:
            slots: the sum that each supervised token of `documents` belongs to, and the number of sums.
            gradient: from the sums, (slots.count,) in fp32, to the function's derivative by each.

        Returns the sums. Where `documents` take several passes, an additional forward pass computes the sums first.
        """
        runs = split_by_tokens([len(d.ids_L) for d in documents], self.plan.tokens)
        derivative: Tensor | None = None
        sums: Tensor | None = None
        if len(runs) > 1:
            sums = self.forward_sums(documents, slots)
            derivative = gradient(sums)
        self.bound.flat.grad_Z.zero_()
        self.metrics_3.zero_()
        for run in runs:
            batch, slot_S = self._pack(documents[run]), slots.of(run)
            assert len(slot_S) == len(batch.row_S), "every supervised token has its slot"
            head = _WeightedHead(self, copy_to(self.bound.device, slot_S), slots.count, gradient, derivative)
            if len(batch.row_S):
                self._pass(batch, 1.0, head)
                sums = head.sums if sums is None else sums
        if sums is None:  # no token is supervised: the function is constant
            sums = torch.zeros(slots.count, device=self.bound.device)
            gradient(sums)
        return sums

    @torch.no_grad()
    def forward_sums(self, documents: Sequence[Document], slots: Slots) -> Tensor:
        """Sums of log-probabilities by slot, (slots.count,) in fp32; gradients are left as they are."""
        sums = torch.zeros(slots.count, device=self.bound.device)
        self.metrics_3.zero_()
        for run in split_by_tokens([len(d.ids_L) for d in documents], self.plan.tokens):
            packed = self._pack(documents[run])
            if len(packed.row_S):
                graphed = None if self.graphs is None else self.graphs.forward(packed)
                batch, state = graphed or self._eager_forward(packed)
                loss_S = self.head(batch, state, want_gradient=False)
                sums.index_add_(0, copy_to(sums.device, slots.of(run)), -loss_S)
        return sums

    def _eager_forward(self, packed: PackedBatch) -> tuple[DeviceBatch, ForwardState]:
        """The forward half of an evaluation."""
        batch = self.upload(packed, 1.0, round_up(len(packed.ids_T), self.row_multiple))
        return batch, self.forward(batch, training=False)

    @torch.no_grad()
    def forward_only(self, documents: Sequence[Document]) -> Tensor:
        """`metrics_3` of `documents`, for evaluation; gradients are left as they are."""
        self.metrics_3.zero_()
        for run in split_by_tokens([len(d.ids_L) for d in documents], self.plan.tokens):
            packed = self._pack(documents[run])
            if len(packed.row_S):
                self.head(*self._eager_forward(packed), want_gradient=False)
        return self.metrics_3.clone()

    def idle_buffers(self) -> list[Tensor]:
        """Buffers that hold nothing between two passes."""
        # With offloaded activations another stream reads and writes the workspace.
        return [self.logits_SV, *(self.workspace.buffers.values() if self.offload is None else ())]

    @torch.no_grad()
    def compile(self) -> None:
        """Compile in parallel every kernel that passes of this plan launch. Does nothing on a CPU."""
        if self.bound.device.type != "cuda":
            return
        from parley.train_step.kernels.precompile import compiling  # Triton is installed only where a GPU is

        plan = self.plan
        with compiling(self.bound.device):
            for tokens in sorted({min(tokens, plan.tokens) for tokens in COMPILE_TOKENS}):
                self.run_eager(self.upload_dummy(round_up(tokens, plan.pad_multiple)))

    @torch.no_grad()
    def prepare_attention(self, length_N: NDArray[np.integer]) -> None:
        """Build cuDNN's plans for the long documents among `length_N`. Does nothing on a CPU."""
        shapes = {layer.shape for layer in self.bound.layers}
        for length in planned_lengths(length_N) if self.bound.device.type == "cuda" else []:
            length = min(length, self.workspace.tokens)
            batch = self.upload(_documents_of([length]), 1.0, length)
            for shape in shapes:
                qkv, dqkv = (self.workspace.take(name, 0, length, shape.columns).zero_() for name in ("qkv", "dqkv"))
                out, dout = (
                    self.workspace.take(name, 0, length, shape.heads * shape.head_dim).zero_()
                    for name in ("attention_out", "dattention_out")
                )
                saved = self.ops.attention(qkv, batch, shape, out)
                self.ops.attention_backward(dout, qkv, out, saved, batch, shape, dqkv)

    @torch.no_grad()
    def prepare_graphs(self, tokens_N: NDArray[np.integer]) -> None:
        """Capture the graphs that passes of `tokens_N` will replay, where they pay. Does nothing without graphs."""
        if self.graphs is not None:
            self.graphs.prepare(tokens_N)

    def upload_dummy(self, tokens: int, *, graphed: bool = False) -> DeviceBatch:
        """A batch of `tokens` whose results are of no use."""
        return self.upload(_dummy_batch(tokens, self.plan.positions), 1.0, tokens, graphed=graphed)

    def _pack(self, documents: Sequence[Document]) -> PackedBatch:
        """Without the rows that no loss depends on."""
        batch = pack(documents)
        if self.bound.rope_switch is not None:
            batch = batch.with_two_rope_rows(self.bound.rope_switch)
        return batch.trimmed()

    def _rope_tables(self, positions: int) -> dict[str, RopeTable]:
        self.positions = positions
        if self.bound.rope_switch is not None:
            return self.bound.two_row_rope_tables(positions)
        return self.bound.rope_tables(positions)

    def reserve(self, tokens: int, longest: int) -> None:
        """Grow to passes of `tokens`, documents of `longest`. Drops the graphs if a buffer that they read had to move.

        To be called for all rows that will be evaluated before the first step: no graph is then captured twice.
        """
        moved = [self.staging.reserve(tokens), self.workspace.reserve(tokens)]
        if longest > self.positions:
            self.rope = self._rope_tables(longest)
            moved.append(True)
        if any(moved) and self.graphs is not None:
            self.graphs.clear()

    def upload(
        self, packed: PackedBatch, scale: float, tokens: int, *, graphed: bool = False, seed: int = 0
    ) -> DeviceBatch:
        """`packed` on the device, padded to `tokens`. Drops the graphs if a buffer that they read had to move."""
        self.reserve(tokens, max(packed.lengths))
        return self.staging.upload(packed.padded(tokens), scale, None if graphed else packed.lengths, seed)

    def _pass(self, packed: PackedBatch, scale: float, head: Head | None = None) -> None:
        head, tokens = head or self.head, len(packed.ids_T)
        # Of torch's generator on the host, which checkpoints hold.
        seed = int(torch.randint(2**31, ())) if self.bound.has_dropout else 0
        if self.graphs is not None and self.graphs.takes(tokens):
            self.graphs.run(self.upload(packed, scale, self.graphs.tokens_for(tokens), graphed=True, seed=seed), head)
            return
        self.run_eager(self.upload(packed, scale, round_up(tokens, self.row_multiple), seed=seed), head)

    def run_eager(self, batch: DeviceBatch, head: Head | None = None) -> None:
        """A whole pass without a graph."""
        state = self.forward(batch)
        (head or self.head)(batch, state)
        self.backward(batch, state)

    def forward(self, batch: DeviceBatch, *, training: bool = True) -> ForwardState:
        """`training`: with the adapters' dropout."""
        context = self._context(batch, training=training)
        self.matrices.refresh_adapters()
        h_TD = torch.index_select(self.bound.embedding_VD, 0, batch.ids_T, out=context.take("x", 0))
        if self.bound.embedding_scale is not None:
            h_TD.mul_(self.bound.embedding_scale)
        delta_TD, passed, supervised = None, [], None
        for index, layer in enumerate(self.bound.layers):
            if self.offload is not None:
                self.offload.wait_for_buffer(index)
            if index == len(self.bound.layers) - 1:
                supervised = self._supervised_rows(batch)
            saved, h_TD, delta_TD = forward(context, layer, index, h_TD, delta_TD, supervised)
            passed.append(saved)
            if self.offload is not None:
                self.offload.copy_out(index, saved.tensors())
        assert delta_TD is not None
        dh_TDP = context.take("dh", 0)
        dh_TDP = dh_TDP.zero_() if supervised is None else dh_TDP.new_zeros(len(supervised.row_S), dh_TDP.shape[1])
        return ForwardState(h_TD, delta_TD, dh_TDP, passed, supervised)

    def _supervised_rows(self, batch: DeviceBatch) -> SupervisedRows | None:
        """The rows that continue past the last attention, padded; None where all rows do."""
        count = len(batch.row_S)
        padding = -count % self.row_multiple
        if not self.skip_unsupervised or count + padding >= batch.tokens:
            return None
        return SupervisedRows(functional.pad(batch.row_S.long(), (0, padding)), count)

    def head(self, batch: DeviceBatch, state: ForwardState, *, want_gradient: bool = True) -> Tensor:
        """The gradient of the last layer's output into `state`. Returns the loss of each supervised row, (S,)."""
        supervised = state.supervised
        row_S = batch.row_S
        if supervised is not None:  # the last layer's output has these rows alone, in order
            row_S = torch.arange(supervised.count, device=row_S.device)
        before = self.metrics_3[0].clone() if batch.weight_S is not None else None
        loss_S = loss_and_gradient(
            self.ops, self.bound, batch, row_S, state.h_TD, state.delta_TD, state.dh_TDP, self.logits_SV,
            self.metrics_3, want_gradient=want_gradient,
        )  # fmt: skip
        if batch.weight_S is not None:
            self.metrics_3[0] = before + loss_S @ batch.weight_S
            if want_gradient:
                state.weight_gradient(batch, batch.weight_S)
        return loss_S

    def backward(self, batch: DeviceBatch, state: ForwardState) -> None:
        context, dh_TDP, supervised = self._context(batch), state.dh_TDP, state.supervised
        for index in reversed(range(len(state.saved))):
            if self.offload is not None:
                self.offload.prefetch(index - 1)
                self.offload.wait_for_layer(index)
            layer, saved = self.bound.layers[index], state.saved.pop()
            # The input of the first layer is the frozen embedding: its gradient is not needed.
            dh_TDP = backward(context, layer, saved, dh_TDP, want_dx=index > 0, supervised=supervised)
            supervised = None

    def _context(self, batch: DeviceBatch, *, training: bool = True) -> PassContext:
        return PassContext(self.ops, self.matrices, self.rope, batch, self.workspace, batch.tokens, training)


class _WeightedHead:
    """The head of `FusedStep.forward_backward_sums`: each supervised row is weighted by the derivative of its sum.

    `sums` are of this pass's rows; `derivative` is given where they are not those of the whole step.
    """

    def __init__(
        self,
        step: FusedStep,
        slot_S: Tensor,
        count: int,
        gradient: Callable[[Tensor], Tensor],
        derivative: Tensor | None,
    ) -> None:
        self.step, self.slot_S, self.gradient, self.derivative = step, slot_S, gradient, derivative
        self.sums = torch.zeros(count, device=slot_S.device)

    def __call__(self, batch: DeviceBatch, state: ForwardState) -> None:
        loss_S = self.step.head(batch, state)
        self.sums.zero_().index_add_(0, self.slot_S, -loss_S)
        derivative = self.gradient(self.sums) if self.derivative is None else self.derivative
        # The head's gradient is of the summed loss, which is minus the summed log-probability.
        state.weight_gradient(batch, -derivative[self.slot_S])


def _dummy_batch(tokens: int, longest: int) -> PackedBatch:
    """A packed batch of `tokens`, of documents that are short enough for the Triton attention kernels."""
    longest = min(longest, LONG_DOCUMENT - 1)
    lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
    return _documents_of(lengths)


def _documents_of(lengths: Sequence[int]) -> PackedBatch:
    return pack(Document.from_lists([0] * length, [0] * length) for length in lengths)
