"""Each Triton kernel against plain PyTorch, at odd sizes: on a GPU as it is, elsewhere through Triton's interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from parley.data.packing import Document
from parley.train_step import reference_ops as reference
from parley.train_step.ops import Adapter, AdapterSlice, AttentionShape, LogitTransform, QkNorm, RopeTable
from parley.train_step.packed_batch import DeviceBatch, StagingBuffer, pack

triton = pytest.importorskip("triton", reason="no Triton here")
kernels = pytest.importorskip("parley.train_step.kernels")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not triton.knobs.runtime.interpret, reason="needs a GPU or TRITON_INTERPRET=1"
)

BOTH: tuple[ModuleType, ModuleType] = (reference, kernels)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = 71


def rows_of(lengths: tuple[int, ...]) -> DeviceBatch:
    packed = pack([Document.from_lists(np.zeros(length), np.zeros(length)) for length in lengths])
    return StagingBuffer(DEVICE, len(packed.ids_T)).upload(packed, 1.0, packed.lengths)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("columns", [37, 64])
@pytest.mark.parametrize("summed", [False, True])
def test_rms_norm(columns: int, summed: bool) -> None:
    x, delta, weight = draw(T, columns, seed=0), draw(T, columns, seed=1), draw(columns, seed=2)
    results = []
    for ops in BOTH:
        out, dx = torch.full((T, columns + 5), torch.nan, device=DEVICE), draw(T, columns + 5, seed=3)
        total = ops.rms_norm(x, delta if summed else None, weight, 1e-5, out[:, :columns])
        ops.rms_norm_backward(delta, total, weight, 1e-5, dx[:, :columns])
        results.append(torch.cat([out[:, :columns], total, dx], dim=1))
    assert off(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_glu(activation: str) -> None:
    x, dout = draw(T, 2 * 53, seed=0), draw(T, 53, seed=1)
    results = []
    for ops in BOTH:
        out, dx = torch.zeros(T, 53 + 3, device=DEVICE), torch.zeros(T, 2 * 53 + 3, device=DEVICE)
        ops.glu(x, out[:, :53], activation)
        ops.glu_backward(dout, x, dx[:, :106], activation)
        results.append(torch.cat([out, dx], dim=1))
    assert off(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, softcap=3.0)])
def test_cross_entropy(transform: LogitTransform) -> None:
    logits = 3 * draw(9, 1003, seed=0)
    target = torch.arange(9, dtype=torch.int32, device=DEVICE) * 100
    target[3], target[5] = -100, logits[5].argmax()
    results = []
    for ops in BOTH:
        gradient, figures = logits.clone(), torch.ones(3, device=DEVICE)
        ops.cross_entropy(gradient, target, torch.tensor(0.2, device=DEVICE), figures, transform)
        results.append(torch.cat([gradient.flatten(), figures]))
    assert not results[1][3 * 1003 : 4 * 1003].any()
    assert off(results[1], results[0]) < 1e-5


@pytest.mark.parametrize(
    ("sizes", "rank", "scales", "tokens"),
    [
        ((128, 64, 64), 16, (0.5, 0.5, 0.5), T),
        ((128, 64, 64), 16, (0.5, 0.5, 0.5), 2100),  # shared by two programs
        ((192,), 16, (0.7,), T),
        ((128, 64), 5, (0.5, 0.5), T),
        ((100, 60), 8, (0.5, 2.0), T),
    ],
)
def test_adapters(sizes: tuple[int, ...], rank: int, scales: tuple[float, ...], tokens: int) -> None:
    in_features, out_features = 96, sum(sizes)
    lora_columns = rank * len(sizes) + 3
    dy, x = draw(tokens, out_features + lora_columns, seed=0), draw(tokens, in_features + lora_columns, seed=1)
    results = []
    for ops in BOTH:
        weights = draw(rank * (in_features * len(sizes) + out_features), seed=2)
        gradients = draw(len(weights), seed=3)
        parts = [rank * in_features] * len(sizes) + [rank * size for size in sizes]
        shapes = [(rank, in_features)] * len(sizes) + [(size, rank) for size in sizes]
        w, g = ([p.view(s) for p, s in zip(flat.split(parts), shapes, strict=True)] for flat in (weights, gradients))
        adapter_slices, row = [], 0
        for i, size in enumerate(sizes):
            adapter = Adapter(w[i], w[len(sizes) + i], g[i], g[len(sizes) + i], scales[i])
            adapter_slices.append(AdapterSlice(adapter, slice(row, row + size), slice(i * rank, (i + 1) * rank)))
            row += size
        ops.add_adapter_gradients(dy, x, adapter_slices, out_features, in_features)
        copied = torch.zeros(out_features, rank + 7, device=DEVICE)
        ops.copy_scaled(w[-1], copied[: sizes[-1], 2 : 2 + rank], 0.3)
        matrix = torch.zeros(out_features + rank, in_features + rank, device=DEVICE)
        table = ops.prepare_copies(
            [(w[0], matrix[-rank:, :in_features], 1.0), (w[-1], matrix[: sizes[-1], -rank:], 0.7)]
        )
        ops.run_copies(table)
        results.append(torch.cat([gradients, copied.flatten(), matrix.flatten()]))
    assert off(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(T, 300), (3, 1100)])
def test_scaled_columns(biased: bool, rows: int, columns: int) -> None:
    scale, bias = draw(columns, seed=0), draw(columns, seed=1) if biased else None
    results = []
    for ops in BOTH:
        x, dy = draw(rows, columns + 5, seed=2), draw(rows, columns + 3, seed=3)
        dot = torch.full((columns,), torch.nan, device=DEVICE)
        ops.scale_columns(x[:, :columns], scale, bias)
        ops.scale_columns_backward(dy[:, :columns], x[:, :columns], scale, bias, dot)
        results.append(torch.cat([x.flatten(), dy.flatten(), dot]))
    assert off(results[1], results[0]) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(24, 37), (9, 1050)])
def test_dropout(rows: int, columns: int) -> None:
    """A mask follows from seed, stream and element alone; each path has its own generator."""
    x, p = draw(rows, columns + 5, seed=0)[:, :columns], 0.25
    seed = torch.tensor(12, dtype=torch.int32, device=DEVICE)
    for ops in BOTH:
        out, again, other = (torch.full((rows, columns + 3), torch.nan, device=DEVICE) for _ in range(3))
        ops.dropout(x, out[:, :columns], seed, 5, p)
        ops.dropout(x, other[:, :columns], seed, 6, p)
        kept = out[:, :columns] != 0
        assert off(out[:, :columns][kept], x[kept] / (1 - p)) < 1e-6
        share = float(kept.float().mean())
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        both = float((kept & (other[:, :columns] != 0)).float().mean())
        assert abs(both - (1 - p) ** 2) < 3 / kept.numel() ** 0.5
        again.copy_(out)
        ops.dropout(x, again[:, :columns], seed, 5, p, add=True)
        assert off(again[:, :columns], 2 * out[:, :columns]) < 1e-6
        later = torch.zeros(rows - 5, columns, device=DEVICE)
        ops.dropout(x[5:], later, seed, 5, p, 5)
        assert torch.equal(later, out[5:, :columns])
        ops.dropout(x, other[:, :columns], seed + 1, 5, p)
        assert not torch.equal(other[:, :columns] != 0, kept)
        assert out[:, columns:].isnan().all()


@pytest.mark.parametrize(("rows", "columns"), [(48, 192), (48, 40), (7, 22), (3, 10)])  # the last block is shorter
def test_nf4(rows: int, columns: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = draw(rows, columns, seed=0)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    wanted = functional.dequantize_4bit(packed, state)
    for ops in BOTH:
        out = torch.zeros(rows, columns + 8, device=DEVICE)
        ops.dequantize_nf4(packed, state.absmax, state.code, 64, out[:, :columns])
        assert torch.equal(out[:, :columns], wanted)
        assert not out[:, columns:].any()


def test_nf4_of_an_odd_number_of_values() -> None:  # by the reference alone: `bind` refuses odd rows
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(draw(7, 9, seed=0), blocksize=64, quant_type="nf4")
    out = torch.zeros(7, 9, device=DEVICE)
    reference.dequantize_nf4(packed, state.absmax, state.code, 64, out)
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_qk_norm(together: bool, in_place: bool) -> None:
    shape = AttentionShape(6, 2, 24, 0.2)
    norms = QkNorm(draw(144 if together else 24, seed=0), draw(48 if together else 24, seed=1), 1e-5)
    results = []
    for ops in BOTH:
        x, dx = draw(9, shape.columns + 3, seed=2)[:, : shape.columns], draw(9, shape.columns + 5, seed=3)
        out = x.clone() if in_place else torch.full((9, shape.columns), torch.nan, device=DEVICE)
        ops.qk_norm(out if in_place else x, norms, shape, out)
        ops.qk_norm_backward(dx[:, : shape.columns], x, norms, shape)
        results.append(torch.cat([out, dx], dim=1))
    assert off(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("half", [8, 5])
def test_rope(half: int, inverse: bool) -> None:
    shape, rows = AttentionShape(6, 2, 16, 0.25), rows_of((3, 60, 8))
    rope = RopeTable(draw(64, half, seed=0), draw(64, half, seed=1))
    results = []
    for ops in BOTH:
        x = draw(T, shape.columns + 3, seed=2)
        ops.rope(x[:, : shape.columns], rows, rope, shape, inverse=inverse)
        results.append(x)
    assert off(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "softcap"),
    [(6, 2, 16, None), (8, 2, 16, 0.8), (4, 4, 32, None), (2, 1, 24, None), (2, 2, 256, 3.0)],
)
def test_attention(heads: int, kv_heads: int, size: int, softcap: float | None, window: int | None) -> None:
    check_attention(heads, kv_heads, size, softcap, window, None)


@pytest.mark.parametrize("window", [None, 9])
def test_attention_with_sinks(window: int | None) -> None:
    check_attention(4, 2, 16, None, window, 2 * draw(4, seed=5))


def check_attention(
    heads: int, kv_heads: int, size: int, softcap: float | None, window: int | None, sinks: torch.Tensor | None
) -> None:
    shape = AttentionShape(heads, kv_heads, size, size**-0.5, window, softcap)
    lengths = (3, 70, 1, 64, 33)
    tokens, columns = sum(lengths), heads * size
    x, dout = draw(tokens, shape.columns, seed=0), draw(tokens, columns, seed=1)
    results: list[Any] = []
    sink_gradients: list[torch.Tensor] = []
    for ops, device in ((reference, torch.device("cpu")), (kernels, DEVICE)):
        rows = rows_of(lengths)
        on = [t.to(device) for t in (x, dout)]
        if device.type == "cpu":
            packed = pack([Document.from_lists(np.zeros(length), np.zeros(length)) for length in lengths])
            rows = StagingBuffer(device, tokens).upload(packed, 1.0, packed.lengths)
        out = torch.zeros(tokens, columns + 3, device=device)
        dx = torch.zeros(tokens, shape.columns + 5, device=device)
        saved = ops.attention(on[0], rows, shape, out[:, :columns], None if sinks is None else sinks.to(device))
        ops.attention_backward(on[1], on[0], out[:, :columns], saved, rows, shape, dx[:, : shape.columns])
        results.append(torch.cat([out, dx], dim=1).cpu())
        if sinks is not None:
            gradient = ops.sink_gradient(on[1], out[:, :columns], saved, sinks.to(device), rows, shape)
            sink_gradients.append(gradient.cpu())
    assert off(results[1], results[0]) < 1e-5
    assert not sink_gradients or off(sink_gradients[1], sink_gradients[0]) < 1e-5
