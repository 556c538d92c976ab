"""Decode steps on a GPU as CUDA graphs: one graph for each bucket of rows, replayed for every token.

A graph reads tokens, positions, settings and which rows run from the state, so the same one serves whatever answers
the rows hold; rows beyond the running ones do not advance. Up to MAX_GEMV_ROWS rows take kernels that are bound by
reading the weights (kernels/gemv.py), more take cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parley.config import GenerationSection
from parley.inference.cuda.kernels.decode_attention import PROGRAMS, SplitBuffers, decode_attention
from parley.inference.cuda.kernels.gemv import MAX_GEMV_ROWS, GemvLinear, LoraScratch, gemv, gemv_swiglu
from parley.inference.cuda.kernels.sampling import sample_and_advance
from parley.inference.cuda.prefill import prefill
from parley.inference.interface import DecodeRequest
from parley.inference.kv_cache import KVCache
from parley.inference.model import DecoderModel
from parley.inference.sampling import (
    SamplingFeatures,
    apply_repetition_penalty,
    apply_temperature,
    output_columns,
    truncation_mask,
    write_logprobs,
)
from parley.inference.slot_state import ADAPTER, POSITION, TOKEN, RunningRequest, SlotState
from parley.inference.step_runner import MAX_STEPS, InFlightSteps, StepOutputs
from parley.train_step.bind import ModelWeights
from parley.train_step.kernels.precompile import compiling
from parley.train_step.ops import LogitTransform
from parley.train_step.packed_batch import StagingBuffer

WARM_UP_PROMPT = 64  # tokens


class DecodeStep:
    """One token of each of the first rows, as GPU work without synchronisation with the host."""

    def __init__(self, model: DecoderModel, cache: KVCache, state: SlotState, programs: int = PROGRAMS) -> None:
        self.model, self.cache, self.state = model, cache, state
        device, slots = model.weights.device, len(state.fields_BX)
        self.splits = {shape: SplitBuffers.allocate(slots, shape, device, programs) for shape in set(model.shapes)}
        linears = [layer.all for layer in model.linears]
        self.has_gemv = _is_plain(model.weights) and all(
            GemvLinear.supports_gate_up(gate_up) and all(map(GemvLinear.supports, (qkv, o, down)))
            for qkv, o, gate_up, down in linears
        )
        if not self.has_gemv:
            return
        self.layers = [
            [GemvLinear(qkv), GemvLinear(o), GemvLinear.of_gate_up(gate_up), GemvLinear(down)]
            for qkv, o, gate_up, down in linears
        ]
        self.head = GemvLinear(model.head)
        ranks = max(linear.ranks for layer in self.layers for linear in layer)
        self.u = torch.empty(MAX_GEMV_ROWS * ranks, dtype=torch.float32, device=device)
        self.ready = torch.zeros(len(linears), 4, dtype=torch.int32, device=device)

    def run(self, rows: int, *, truncation: bool, logprobs: bool) -> None:
        state = self.state.rows(0, rows)
        model_logits_BV = self._gemv_logits(state) if self.has_gemv and rows <= MAX_GEMV_ROWS else self._logits(state)
        logits_BV = model_logits_BV
        if truncation:
            scores_BV = apply_temperature(apply_repetition_penalty(logits_BV, state), state)
            logits_BV = logits_BV.masked_fill(truncation_mask(scores_BV, state), -torch.inf)
        column_B = output_columns(state)
        sample_and_advance(logits_BV, state)
        if logprobs:
            write_logprobs(model_logits_BV, state.ints(TOKEN).long(), column_B, state)

    def _logits(self, state: SlotState) -> Tensor:
        """The fp32 logits (B, V) of any number of rows."""

        def attention(index: int, qkv_BC: Tensor) -> Tensor:
            return self._attention(index, qkv_BC, state)

        h_BD = self.model.embed(state.ints(TOKEN))
        self.model.forward(h_BD, state.floats(ADAPTER)[:, None].to(h_BD.dtype), attention)
        return self.model.logits(h_BD)

    def _gemv_logits(self, state: SlotState) -> Tensor:
        """The fp32 logits (B, V) of up to MAX_GEMV_ROWS rows: five kernels a layer."""
        weights = self.model.weights
        if len(self.u):
            self.ready.zero_()
        # An ordinary launch before the dependent ones: see kernels/dependent_launch.
        h_BD = self.model.embed(state.ints(TOKEN))
        rows, adapter_B = len(h_BD), state.floats(ADAPTER)
        for index, (layer, (qkv, o, gate_up, down)) in enumerate(zip(weights.layers, self.layers, strict=True)):
            lora = [LoraScratch(self.u, self.ready[index, i : i + 1], adapter_B) for i in range(4)]
            assert layer.input_norm is not None
            assert layer.mlp_norm is not None
            qkv_BC = h_BD.new_empty(rows, layer.shape.columns)
            gemv(qkv, h_BD, qkv_BC, lora[0], layer.input_norm, add=False)
            gemv(o, self._attention(index, qkv_BC, state), h_BD, lora[1], add=True)
            act_BF = h_BD.new_empty(rows, down.in_features)
            gemv_swiglu(gate_up, h_BD, act_BF, lora[2], layer.mlp_norm)
            gemv(down, act_BF, h_BD, lora[3], add=True)
        logits_BV = h_BD.new_empty(rows, weights.head_VD.shape[0], dtype=torch.float32)
        gemv(self.head, h_BD, logits_BV, None, weights.norm, add=False)
        return logits_BV

    def _attention(self, index: int, qkv_BC: Tensor, state: SlotState) -> Tensor:
        layer = self.model.weights.layers[index]
        out_BD = qkv_BC.new_empty(len(qkv_BC), layer.shape.heads * layer.shape.head_dim)
        cached_B2GLE, splits, norms = self.cache.layers[index], self.splits[layer.shape], layer.qk_norm
        rope = None if layer.rope is None else self.model.rope[layer.rope]
        if norms is not None and not norms.per_head(layer.shape):  # a program of the kernel reads one head alone
            self.model.ops.qk_norm(qkv_BC, norms, layer.shape, qkv_BC)
            norms = None
        decode_attention(qkv_BC, cached_B2GLE, out_BD, state.ints(POSITION), rope, layer.shape, norms, splits)
        return out_BD


def _is_plain(weights: ModelWeights) -> bool:
    """Whether the GEMV kernels compute these layers: a norm before each branch, nothing behind it, and SiLU."""
    return weights.logits == LogitTransform() and all(
        layer.input_norm is not None
        and layer.mlp_norm is not None
        and not layer.transforms_branches
        and layer.activation == "silu"
        for layer in weights.layers
    )


GraphKey = tuple[int, bool, bool]  # rows, truncation, logprobs


class GraphRunner:
    """Implements `step_runner.StepRunner`: captures a step on its first use and replays it from then on.

    All graphs share one memory pool.
    """

    max_steps = MAX_STEPS
    launches_ahead = 1

    def __init__(self, model: DecoderModel, cache: KVCache, state: SlotState) -> None:
        self.model, self.cache, self.state = model, cache, state
        self.step = DecodeStep(model, cache, state)
        self.staging = StagingBuffer(model.weights.device, 256)
        self.graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        # One buffer for each launch in flight and one for that whose outputs are read.
        self.outputs = [StepOutputs.pinned_like(state) for _ in range(self.launches_ahead + 1)]

    @property
    def buckets(self) -> list[int]:
        """The numbers of rows that have graphs: powers of two, and all rows."""
        slots = len(self.state.fields_BX)
        return [*(2**power for power in range(slots.bit_length()) if 2**power < slots), slots]

    def warm_up(self) -> None:
        length = min(WARM_UP_PROMPT, self.cache.layers[0].shape[3])
        request = DecodeRequest([0] * length, GenerationSection(), frozenset(), seed=0)
        with compiling(self.state.fields_BX.device):
            self.prefill([request], 0)
            for rows in self.buckets:
                self.step.run(rows, truncation=False, logprobs=False)
        self.prefill([request], 0)
        for rows in self.buckets:
            self._graph((rows, False, False))

    def prefill(self, requests: Sequence[DecodeRequest], start: int) -> int:
        prefill(self.model, self.cache, self.staging, requests, start)
        return 0

    def launch(self, running: list[RunningRequest], steps: int) -> InFlightSteps:
        features = SamplingFeatures.of(entry.request for entry in running)
        bucket = next(bucket for bucket in self.buckets if bucket >= len(running))
        graph = self._graph((bucket, features.truncation, features.logprobs))
        for _ in range(steps):
            graph.replay()
        outputs = self.outputs.pop(0)
        self.outputs.append(outputs)
        outputs.copy_from(self.state.rows(0, len(running)), features)
        return InFlightSteps(running, outputs)

    def emitted(self, row: int, ids: Sequence[int]) -> None:
        """There is no prefix cache."""

    def move(self, source: int, target: int, positions: int) -> None:
        self.cache.move(source, target, positions)

    def reset(self) -> None:
        """Wait for the steps in flight. Raises if the device is lost."""
        torch.cuda.synchronize(self.state.fields_BX.device)

    def _graph(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        if key not in self.graphs:
            self.graphs[key] = self._capture(key)
        return self.graphs[key]

    def _capture(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        rows, truncation, logprobs = key
        # Kernels compile and libraries initialise outside the capture. The step advances the state, and the first
        # replay would do so again: restore the fields, and the tokens seen, which a repetition penalty reads.
        changed = self.state.fields_BX, self.state.seen_BV
        before = [tensor.clone() for tensor in changed]
        self.step.run(rows, truncation=truncation, logprobs=logprobs)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step.run(rows, truncation=truncation, logprobs=logprobs)
        return graph
