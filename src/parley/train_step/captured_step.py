"""The captured path: transformers' own modules over the packed row, replayed as a CUDA graph where that pays.

For what the fused step does not know: other families, LoRA dropout, DoRA, several adapters, trained embeddings and
heads, full fine-tuning, 8-bit bases, label smoothing, NEFTune, mixtures of experts. Forward and backward pass are those
of transformers, PEFT and autograd. What differs from the plain path: attention is variable-length
(packed_attention.py), experts are grouped products (grouped_experts.py), only supervised rows reach the head, and the
launches of a whole pass are recorded once for each padded size. Where a model does something that a capture forbids,
passes run without one.

Shape suffixes (legend in docs/design.md): T tokens, S supervised rows, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import PreTrainedModel

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document, split_by_tokens
from parley.errors import one_line
from parley.models.packing_isolation import why_not_packed
from parley.models.sharding import is_sharded
from parley.train_step.bind import Unsupported
from parley.train_step.context_parallel import ContextGroup, split
from parley.train_step.cuda_graphs import is_deterministic
from parley.train_step.embedding_noise import noise_by_document
from parley.train_step.graph_threshold import GraphThreshold
from parley.train_step.grouped_experts import runs_experts_one_by_one, using_grouped_experts
from parley.train_step.packed_attention import check_attention_dropout, using_packed_attention
from parley.train_step.packed_batch import DeviceBatch, PackedBatch, StagingBuffer, pack
from parley.train_step.router_loss import RouterLoss
from parley.train_step.supervised_loss import SupervisedLoss, smoothed_loss
from parley.units import round_up

logger = logging.getLogger(__name__)

TOKEN_MULTIPLE, ROW_MULTIPLE = 128, 128  # of a captured size
SPARE = 1.1  # a captured size has so many times its first pass's tokens, so that sizes are few
ROW_SPARE = 1.3  # and so many supervised rows, or the largest share known: the head takes little of the time
MAX_PADDING = 1.25  # a pass is padded to a captured size of at most so many times its own tokens


@dataclass(frozen=True)
class GraphSize:
    """Tokens and supervised rows that a graph is captured for, and whether it is for the only pass of a step."""

    tokens: int
    rows: int
    alone: bool = False

    def holds(self, other: GraphSize) -> bool:
        fits = other.tokens <= self.tokens <= MAX_PADDING * other.tokens and other.rows <= self.rows
        return fits and self.alone == other.alone


class CapturedStep:
    """Gradients of an optimizer step's documents in the parameters' `grad`; metrics as in FusedStep.

    Args:
        model: of transformers, bare or with PEFT's adapters.
        tokens: the most tokens of a pass; a longer step is split between documents.
        autocast: the type of the forward pass's products; None for the weights' own.
        smoothing: of labels.
        graphs: capture passes on a GPU. A sharded model (models/sharding.py) is not captured: its layers are gathered
            into memory that is allocated anew in each pass. Its gradients are sums over all ranks where they are
            sharded, and this rank's own where they are not (adapters).
        dft: the loss of dynamic fine-tuning (supervised_loss.py), without smoothing.
        noise: whether the model's embedding has NEFTune's hook.
        router_loss: the coefficient of a mixture of experts' auxiliary loss (router_loss.py); 0 leaves it out.
        context: the ranks that each row is split over; all of them are given the same documents, and gradients and
            metrics are this rank's part. Without graphs, too.

    Every rank of a sharded model has to run as many passes: `count_passes` of the largest share says how many, and
    passes without a document complete the others.

    `forward_backward` leaves in `metrics_3`: the summed loss, how many supervised tokens were the most likely, and the
    summed entropy. Raises Unsupported where the model cannot be trained so.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: int,
        autocast: torch.dtype | None = None,
        smoothing: float = 0.0,
        dft: bool = False,
        noise: bool = False,
        router_loss: float = 0.0,
        graphs: bool = True,
        context: ContextGroup | None = None,
    ) -> None:
        self.model, self.autocast, self.smoothing, self.dft = model, autocast, smoothing, dft
        assert not (dft and smoothing), "TRL smooths no labels of this loss"
        self.base = base_of(model)
        self.tokens = tokens
        self.device = self.base.device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.trained]
        self.metrics_3 = torch.zeros(3, dtype=torch.float32, device=self.device)
        self.staging = StagingBuffer(self.device, round_up(int(SPARE * tokens), TOKEN_MULTIPLE) + TOKEN_MULTIPLE)
        self.graphs: dict[GraphSize, torch.cuda.CUDAGraph] = {}
        self.sharded = is_sharded(model)
        self.context = context
        self.uses_graphs = graphs and self.device.type == "cuda" and not self.sharded and context is None
        self.noise = noise
        self.router = RouterLoss(self.base, router_loss) if router_loss else None
        self.experts_one_by_one = runs_experts_one_by_one(self.base)
        self.threshold = GraphThreshold(self.device)
        self.row_share = 0.0  # of supervised rows in a pass's tokens, the largest that is known beforehand
        self.pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None
        if self.uses_graphs and any(isinstance(module, Linear8bitLt) for module in model.modules()):
            self._do_without_graphs("8-bit products look for outliers on the host")

    def forward_backward(self, documents: Sequence[Document], divisor: float, passes: int = 0) -> None:
        """The gradient of one optimizer step: of the summed loss divided by `divisor`, the sum of its weights.

        At least `passes` passes are run, with empty ones at the end.
        """
        # Zeros are written and added to only where passes are summed: of a whole model they take a step's twentieth.
        alone = not self.sharded and max(passes, self.count_passes(documents)) == 1
        if not alone:
            torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            parameter.grad = gradient
        self.metrics_3.zero_()
        if self.router is not None:
            self.router.begin(max(passes, self.count_passes(documents)))
        for packed in self._passes(documents, passes):
            self._pass(packed, 1.0 / divisor, alone)

    @torch.no_grad()
    def forward_only(self, documents: Sequence[Document], passes: int = 0) -> Tensor:
        """`metrics_3` of `documents`, for evaluation; gradients are left as they are. `passes` as above."""
        self.metrics_3.zero_()
        for packed in self._passes(documents, passes):
            batch = self._upload(packed, GraphSize(len(packed.ids_T), len(packed.row_S)), 1.0, graphed=False)
            with self._own_operations(batch):
                self._loss(batch)
        return self.metrics_3.clone()

    def limit_pass(self, tokens: int) -> None:
        """Split steps into passes of at most `tokens` from here on."""
        self.tokens = tokens
        self._drop_graphs()

    def count_passes(self, documents: Sequence[Document]) -> int:
        """Passes of a step of `documents`."""
        return len(self._runs(documents))

    def _passes(self, documents: Sequence[Document], at_least: int) -> Iterator[PackedBatch]:
        runs = self._runs(documents)
        for run in runs:
            packed = pack(documents[run])
            # A router's loss is of every token, and noise of a document's whole length.
            yield packed if self.router is not None or self.noise else packed.trimmed()
        for _ in range(at_least - len(runs)):
            yield _empty_pass()

    def _runs(self, documents: Sequence[Document]) -> list[slice]:
        """The documents of each pass; those without a supervised token are left out."""
        runs = split_by_tokens([len(document.ids_L) for document in documents], self.tokens)
        return [run for run in runs if any(document.supervised_tokens for document in documents[run])]

    def _pass(self, packed: PackedBatch, scale: float, alone: bool) -> None:
        size = GraphSize(len(packed.ids_T), len(packed.row_S), alone)
        # A graph reads no loss weights. Which graph a pass is padded for depends on the passes before it.
        if not self.uses_graphs or packed.weight_S is not None or is_deterministic():
            self._run_eager(packed, size, scale)
            return
        if not self.threshold.pays(size.tokens):
            self.threshold.run(size.tokens, lambda: self._run_eager(packed, size, scale))
            return
        captured = next((known for known in self.graphs if known.holds(size)), None)
        if captured is None:
            captured = self.captured_size(size)
            if not self._capture(packed, captured, scale):
                self._run_eager(packed, size, scale)
                return
        self._upload(packed, captured, scale, graphed=True)
        self.graphs[captured].replay()

    def captured_size(self, size: GraphSize) -> GraphSize:
        """What is captured where a pass of `size` comes first."""
        tokens = round_up(int(SPARE * size.tokens), TOKEN_MULTIPLE)
        rows = max(ROW_SPARE * size.rows, self.row_share * tokens)
        return GraphSize(tokens, round_up(int(rows), ROW_MULTIPLE), size.alone)

    def _run_eager(self, packed: PackedBatch, size: GraphSize, scale: float) -> None:
        """A pass without a graph."""
        batch = self._upload(packed, size, scale, graphed=False)
        with self._own_operations(batch):
            self._backward(self._loss(batch), size.alone)

    def _backward(self, loss: Tensor, alone: bool) -> None:
        """Add the gradient of `loss` to `gradients`, or replace them by it where the pass is `alone`."""
        if not alone:
            loss.backward()
            return
        remaining = dict(zip(self.trained, self.gradients, strict=True))

        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if parameter in remaining:  # not where autograd has added to it a second time
                parameter.grad = remaining.pop(parameter).copy_(parameter.grad)  # frees autograd's own

        hooks = [parameter.register_post_accumulate_grad_hook(move) for parameter in self.trained]
        try:
            for parameter in self.trained:
                parameter.grad = None
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        for parameter, gradient in remaining.items():  # the loss does not depend on them
            parameter.grad = gradient.zero_()

    def _capture(self, packed: PackedBatch, size: GraphSize, scale: float) -> bool:
        """Record a pass of this size. False, and no further attempts, where the model does what a capture forbids."""
        if not self.graphs:
            torch.cuda.empty_cache()  # a graph's pool cannot use what passes without one left behind
        batch = self._upload(packed, size, scale, graphed=True)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[self.device.index or 0]
        random_state = generator.clone_state()
        try:
            with (
                self._own_operations(batch),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                self._backward(self._loss(batch), size.alone)
        except RuntimeError as error:  # what CUDA says of a synchronisation or an allocation inside a capture
            # A capture that ends in an error leaves its stream current and the generator in its hands.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(random_state)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._do_without_graphs(one_line(error))
            return False
        self.graphs[size] = graph
        return True

    @contextmanager
    def _own_operations(self, batch: DeviceBatch) -> Iterator[None]:
        """The model's attention and experts are those that a graph can contain."""
        with using_packed_attention(self.base, batch), ExitStack() as stack:
            if self.experts_one_by_one:
                stack.enter_context(using_grouped_experts(self.base))
            yield

    def _loss(self, batch: DeviceBatch) -> Tensor:
        """The summed loss times the batch's scale, and in training the router's; adds to `metrics_3`."""
        # A cached cast of a weight would be read by replays after the weight has changed.
        autocast = torch.autocast(
            self.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False
        )
        # Autocast casts the adapters' weights to the input's type; PEFT would cast the input to theirs, and back.
        noise = noise_by_document(self.base.get_input_embeddings(), batch) if self.noise else nullcontext()
        with autocast, noise, disable_input_dtype_casting(self.model, active=self.autocast is not None):
            # PEFT's own forward calls the base's without hooks, which gather the weights of a sharded one.
            model = self.base if self.sharded else self.model
            outputs = model(
                input_ids=batch.ids_T[None].long(),
                position_ids=batch.position_T[None].long(),
                attention_mask=None,
                use_cache=False,
                logits_to_keep=batch.row_S.long(),
                **({} if self.router is None else {"output_router_logits": torch.is_grad_enabled()}),
            )
            auxiliary = None
            if self.router is not None and torch.is_grad_enabled():
                # Under autocast, as in the model: a GPU's takes the softmax of 16-bit logits in fp32.
                auxiliary = self.router.of(outputs, batch.filled, padded=batch.lengths is None)
        loss = self._supervised_loss(outputs.logits[0], batch)
        return loss if auxiliary is None else loss + auxiliary

    def _supervised_loss(self, logits_SV: Tensor, batch: DeviceBatch) -> Tensor:
        if self.smoothing:
            return smoothed_loss(logits_SV, batch.target_S, batch.scale, self.metrics_3, self.smoothing, batch.weight_S)
        return SupervisedLoss.apply(logits_SV, batch.target_S, batch.scale, self.metrics_3, batch.weight_S, self.dft)

    def _upload(self, packed: PackedBatch, size: GraphSize, scale: float, *, graphed: bool) -> DeviceBatch:
        """`packed` on the device, padded to `size`. Drops the graphs if the buffer that they read had to move."""
        if self.context is not None:
            return self._upload_split(packed, scale, self.context)
        if self.staging.reserve(size.tokens):
            self._drop_graphs()
        padding = size.rows - len(packed.row_S)
        padded = replace(
            packed.padded(size.tokens),
            row_S=np.pad(packed.row_S, (0, padding)),
            target_S=np.pad(packed.target_S, (0, padding), constant_values=IGNORE_INDEX),
        )
        return self.staging.upload(padded, scale, None if graphed else padded.lengths)

    def _upload_split(self, packed: PackedBatch, scale: float, context: ContextGroup) -> DeviceBatch:
        local, layout = split(packed, context)
        self.staging.reserve(len(local.ids_T))
        return replace(self.staging.upload(local, scale, None), context=layout)

    def _do_without_graphs(self, reason: str) -> None:
        logger.warning("captured path: passes are not captured (%s)", reason)
        self.uses_graphs = False

    def _drop_graphs(self) -> None:
        self.graphs.clear()
        if self.uses_graphs:
            self.pool = torch.cuda.graph_pool_handle()


def _empty_pass() -> PackedBatch:
    """Two tokens with one row that is not supervised: its gradient is zero."""
    packed = pack([Document.from_lists([0, 0], [IGNORE_INDEX] * 2)])
    return replace(
        packed, row_S=np.zeros(1, dtype=np.int32), target_S=np.full(1, IGNORE_INDEX, dtype=np.int32), weight_S=None
    )


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`. Raises Unsupported for others, and for those without `logits_to_keep`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise Unsupported(f"{type(base).__name__} is no transformers model")
    if "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        raise Unsupported(f"{type(base).__name__} takes no logits_to_keep")
    return base


def check_captured(model: nn.Module, max_tokens: int | None) -> None:
    """Raises Unsupported where rows of up to `max_tokens` of `model` do not take this path. Needs no weights."""
    base = base_of(model)
    check_attention_dropout(base.config)
    reason = why_not_packed(model, max_tokens, packed_logits)
    if reason is not None:
        raise Unsupported(reason)


@torch.no_grad()
def packed_logits(model: PreTrainedModel, ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """fp32 logits (T, V) of documents in one row, on this path's attention: what packing_isolation's probe asks for."""
    documents = [Document.from_lists(ids_L.tolist(), [IGNORE_INDEX] * len(ids_L)) for ids_L in ids_T.split(lengths)]
    packed = pack(documents)
    batch = StagingBuffer(ids_T.device, len(packed.ids_T)).upload(packed, 1.0, packed.lengths)
    with using_packed_attention(model, batch):
        logits_1TV = model(
            input_ids=ids_T[None],
            position_ids=batch.position_T[None].long(),
            attention_mask=None,
            use_cache=False,
        ).logits
    return logits_1TV[0].float()
