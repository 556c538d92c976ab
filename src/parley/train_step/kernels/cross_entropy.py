"""Cross-entropy whose gradient takes the place of the logits. One program a row, two passes over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.data.tokens import IGNORE_INDEX
from parley.train_step.kernels.precompile import kernel


@kernel("S")
def _cross_entropy(logits, target, scale, figure_3S, S, V, IGNORE_INDEX: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    wanted = tl.load(target + row)
    real = wanted != IGNORE_INDEX
    if real:
        top = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(logits + v, mask=v < V, other=-1e30).to(tl.float32)
            higher = tl.maximum(top, z)
            total = total * tl.exp(top - higher) + tl.exp(z - higher)
            top = higher
        best = tl.max(top, axis=0)
        total = tl.where(top > -1e29, total * tl.exp(top - best), 0.0)
        lse = best + tl.log(tl.sum(total, axis=0))
        aim = tl.load(logits + wanted).to(tl.float32)
        factor = tl.load(scale)
        weighted = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(logits + v, mask=v < V, other=-1e30).to(tl.float32)
            p = tl.exp(z - lse)
            weighted += tl.where(v < V, p * z, 0.0)
            p = tl.where(v == wanted, p - 1.0, p) * factor
            tl.store(logits + v, p.to(logits.dtype.element_ty), mask=v < V)
        tl.store(figure_3S + row, lse - aim)
        tl.store(figure_3S + S + row, tl.where(aim >= best, 1.0, 0.0))
        tl.store(figure_3S + 2 * S + row, lse - tl.sum(weighted, axis=0))
    else:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(logits + v, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=v < V)


def cross_entropy(logits_SV: Tensor, target_S: Tensor, scale: Tensor, metrics_3: Tensor) -> None:
    rows, vocabulary = logits_SV.shape
    figure_3S = torch.zeros(3, rows, dtype=torch.float32, device=logits_SV.device)
    block = min(triton.next_power_of_2(vocabulary), 8192)
    _cross_entropy[(rows,)](
        logits_SV, target_S, scale, figure_3S, rows, vocabulary, IGNORE_INDEX=IGNORE_INDEX, BLOCK=block, num_warps=16
    )
    metrics_3 += figure_3S.sum(1)
