"""Steps on a GPU as CUDA graphs: one for each number of rows, replayed for every token.

A graph reads tokens, positions, settings and which rows live from the state, so the same one serves whatever answers
stand in its rows; rows beyond them are dead. Up to `MOST_ROWS` rows take the kernels that are bound by reading the
weights (kernels/rows.py), more take cuBLAS.

Shape suffixes: B rows, D hidden, C query, key and value columns, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parley.inference.cuda.kernels.decode_attention import PROGRAMS, Shares, attend
from parley.inference.cuda.kernels.gemv import MOST_ROWS, Adapting, Norm, RowProducts, gated, product
from parley.inference.cuda.kernels.sampling import draw_and_advance
from parley.inference.kv_cache import Cache
from parley.inference.model import Model
from parley.inference.sampling import Needs, columns, penalise, removed, report_logprobs, temper
from parley.inference.slot_state import POSITION, TOKEN, TUNED, Row, State
from parley.inference.step_runner import MOST_TOKENS, Burst, Report
from parley.train_step.kernels.precompile import compiling


class Step:
    """One token of each of the first rows, as GPU work without a word from the host."""

    def __init__(self, model: Model, cache: Cache, state: State, programs: int = PROGRAMS) -> None:
        self.model, self.cache, self.state = model, cache, state
        weights = model.weights
        slots = len(state.fields_BF)
        shapes = {layer.shape for layer in weights.layers}
        self.shares = {shape: Shares.room(slots, shape, weights.device, programs) for shape in shapes}
        products = [layer.all for layer in model.products]
        self.few = all(RowProducts.knows(of) for layer in products for of in layer)
        if not self.few:
            return
        self.rows = [[RowProducts(of) for of in layer] for layer in products]
        self.head = RowProducts(model.head)
        ranks = max(of.ranks for layer in self.rows for of in layer)
        self.u = torch.empty(MOST_ROWS * ranks, dtype=torch.float32, device=weights.device)
        self.ready = torch.zeros(len(products), 4, dtype=torch.int32, device=weights.device)

    def run(self, rows: int, *, cut: bool, logprobs: bool) -> None:
        state = self.state.first(rows)
        own_BV = logits_BV = self._few(state) if self.few and rows <= MOST_ROWS else self._many(state)
        if cut:
            left_out_BV = removed(temper(penalise(logits_BV, state), state), state)
            logits_BV = logits_BV.masked_fill(left_out_BV, -torch.inf)
        column_B = columns(state)
        draw_and_advance(logits_BV, state)
        if logprobs:
            report_logprobs(own_BV, state.whole(TOKEN).long(), column_B, state)

    def _many(self, state: State) -> Tensor:
        """The fp32 logits (B, V) of any number of rows."""

        def attended(index: int, qkv_BC: Tensor) -> Tensor:
            return self._attend(index, qkv_BC, state)

        h_BD = self.model.weights.embedding_VD.index_select(0, state.whole(TOKEN))
        self.model.layers(h_BD, state.real(TUNED)[:, None].to(h_BD.dtype), attended)
        return self.model.logits(h_BD)

    def _few(self, state: State) -> Tensor:
        """The fp32 logits (B, V) of up to MOST_ROWS rows: five kernels a layer."""
        weights = self.model.weights
        if len(self.u):
            self.ready.zero_()
        h_BD = weights.embedding_VD.index_select(0, state.whole(TOKEN))  # an ordinary launch: see kernels/early
        rows = len(h_BD)
        for index, (layer, (qkv, o, gate_up, down)) in enumerate(zip(weights.layers, self.rows, strict=True)):
            adapting = [Adapting(self.u, self.ready[index, place : place + 1], state.real(TUNED)) for place in range(4)]
            norm_in, norm_mid = Norm(layer.input_norm_D, layer.eps), Norm(layer.post_attention_norm_D, layer.eps)
            qkv_BC = h_BD.new_empty(rows, layer.shape.columns)
            product(qkv, h_BD, qkv_BC, adapting[0], norm_in, add=False)
            product(o, self._attend(index, qkv_BC, state), h_BD, adapting[1], add=True)
            act_BF = h_BD.new_empty(rows, down.in_features)
            gated(gate_up, h_BD, act_BF, adapting[2], norm_mid)
            product(down, act_BF, h_BD, adapting[3], add=True)
        logits_BV = h_BD.new_empty(rows, weights.head_VD.shape[0], dtype=torch.float32)
        product(self.head, h_BD, logits_BV, None, Norm(weights.norm_D, weights.eps), add=False)
        return logits_BV

    def _attend(self, index: int, qkv_BC: Tensor, state: State) -> Tensor:
        layer = self.model.weights.layers[index]
        out_BD = qkv_BC.new_empty(len(qkv_BC), layer.shape.heads * layer.shape.head_dim)
        cache, rope = self.cache.layers[index], self.model.rope
        shares = self.shares[layer.shape]
        attend(qkv_BC, cache, out_BD, state.whole(POSITION), rope, layer.shape, layer.qk_norm, shares)
        return out_BD


Key = tuple[int, bool, bool]  # rows, cut, logprobs


class Graphed:
    """Captures a step on its first use and replays it from then on. All graphs share one pool of memory."""

    tokens = MOST_TOKENS
    ahead = 1

    def __init__(self, model: Model, cache: Cache, state: State) -> None:
        self.step, self.state = Step(model, cache, state), state
        self.graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.reports = [Report.pinned(state) for _ in range(self.ahead + 1)]

    @property
    def buckets(self) -> list[int]:
        """Numbers of rows that graphs are made for: powers of two, and all rows."""
        slots = len(self.state.fields_BF)
        return [*(2**power for power in range(slots.bit_length()) if 2**power < slots), slots]

    def warm_up(self, read: Callable[[], None]) -> None:
        with compiling(self.state.fields_BF.device):
            read()
            for rows in self.buckets:
                self.step.run(rows, cut=False, logprobs=False)
        read()
        for rows in self.buckets:
            self._graph((rows, False, False))

    def launch(self, rows: list[Row], needs: Needs, tokens: int) -> Burst:
        bucket = next(bucket for bucket in self.buckets if bucket >= len(rows))
        graph = self._graph((bucket, needs.cut, needs.logprobs))
        for _ in range(tokens):
            graph.replay()
        report = self.reports.pop(0)
        self.reports.append(report)
        report.send(self.state.first(len(rows)), needs)
        return Burst(rows, needs, report)

    def _graph(self, key: Key) -> torch.cuda.CUDAGraph:
        if key not in self.graphs:
            self.graphs[key] = self._capture(key)
        return self.graphs[key]

    def _capture(self, key: Key) -> torch.cuda.CUDAGraph:
        rows, cut, logprobs = key
        # Kernels compile and libraries set themselves up outside the capture. What that step draws, the first replay
        # draws again: the fields are put back, and the tokens seen, which a repetition penalty reads.
        touched = self.state.fields_BF, self.state.seen_BV
        before = [tensor.clone() for tensor in touched]
        self.step.run(rows, cut=cut, logprobs=logprobs)
        for tensor, value in zip(touched, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step.run(rows, cut=cut, logprobs=logprobs)
        return graph
