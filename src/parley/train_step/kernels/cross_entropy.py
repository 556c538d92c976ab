"""Cross-entropy whose gradient overwrites the logits (as in Liger, arXiv 2410.10989).

One program per row, two passes over it: an online log-sum-exp, then loss, gradient and entropy. BLOCK partial maxima
and sums are kept, one for each lane, and combined once at the end. Programs share nothing: each writes its metrics
to elements of its own, which torch adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.data.control_tokens import IGNORE_INDEX
from parley.train_step.kernels.precompile import kernel
from parley.train_step.kernels.tanh import tanh
from parley.train_step.ops import LogitTransform


@triton.jit
def _load_logits(products, inside, factor, softcap, SOFTCAP: tl.constexpr):
    """Logits of the head's products, and the derivative of the one by the other."""
    z = tl.load(products, mask=inside, other=0.0).to(tl.float32) * factor
    slope = factor
    if SOFTCAP:
        t = tanh(z / softcap)
        z, slope = t * softcap, factor * (1.0 - t * t)
    return tl.where(inside, z, -1e30), slope


@kernel("S")
def _cross_entropy(
    logits, target, scale, metric_3S, factor, softcap, S, V, IGNORE_INDEX: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target_id = tl.load(target + row)
    supervised = target_id != IGNORE_INDEX
    if supervised:
        m = tl.full((BLOCK,), -1e30, tl.float32)
        denom = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, _ = _load_logits(logits + v, v < V, factor, softcap, SOFTCAP)
            new_m = tl.maximum(m, z)
            denom = denom * tl.exp(m - new_m) + tl.exp(z - new_m)
            m = new_m
        row_max = tl.max(m, axis=0)
        denom = tl.where(m > -1e29, denom * tl.exp(m - row_max), 0.0)
        lse = row_max + tl.log(tl.sum(denom, axis=0))
        target_at = target_id + tl.arange(0, 1)
        target_logit = tl.sum(_load_logits(logits + target_at, target_at < V, factor, softcap, SOFTCAP)[0], axis=0)
        row_scale = tl.load(scale)
        expectation = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, slope = _load_logits(logits + v, v < V, factor, softcap, SOFTCAP)
            p = tl.exp(z - lse)
            expectation += tl.where(v < V, p * z, 0.0)
            p = tl.where(v == target_id, p - 1.0, p) * (row_scale * slope)
            tl.store(logits + v, p.to(logits.dtype.element_ty), mask=v < V)
        tl.store(metric_3S + row, lse - target_logit)
        tl.store(metric_3S + S + row, tl.where(target_logit >= row_max, 1.0, 0.0))
        tl.store(metric_3S + 2 * S + row, lse - tl.sum(expectation, axis=0))
    else:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(logits + v, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=v < V)


def cross_entropy(
    logits_SV: Tensor, target_S: Tensor, scale: Tensor, metrics_3: Tensor, transform: LogitTransform
) -> Tensor:
    rows, vocabulary = logits_SV.shape
    metric_3S = torch.zeros(3, rows, dtype=torch.float32, device=logits_SV.device)
    block = min(triton.next_power_of_2(vocabulary), 8192)
    _cross_entropy[(rows,)](
        logits_SV, target_S, scale, metric_3S, transform.scale, transform.softcap or 0.0, rows, vocabulary,
        IGNORE_INDEX=IGNORE_INDEX, SOFTCAP=transform.softcap is not None, BLOCK=block, num_warps=16,
    )  # fmt: skip
    metrics_3 += metric_3S.sum(1)
    return metric_3S[0]
