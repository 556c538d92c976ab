"""Qwen3's RMS norm of each query and key head, over packed rows.

Shape suffixes: T tokens, H heads, E head size, C query, key and value columns side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parley.train_step.ops import AttentionShape, HeadNorms


def _inverse(x_THE: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x_THE.float().square().mean(-1, keepdim=True) + eps)


def normalise_heads(x_TC: Tensor, shape: AttentionShape, norms: HeadNorms) -> Tensor:
    """Normalise the query and key heads of `x_TC` in place."""
    for part, weight_E in zip(shape.parts(x_TC), (norms.q_E, norms.k_E), strict=False):
        part.copy_((part.float() * _inverse(part, norms.eps)).to(part.dtype) * weight_E)
    return x_TC


def normalise_heads_backward(dx_TC: Tensor, x_TC: Tensor, shape: AttentionShape, norms: HeadNorms) -> None:
    """Turn the gradient of the normalised heads in `dx_TC` into that of `x_TC`, in place."""
    weights = (norms.q_E, norms.k_E)
    for dpart, part, weight_E in zip(shape.parts(dx_TC), shape.parts(x_TC), weights, strict=False):
        inverse = _inverse(part, norms.eps)
        f, g = part.float(), dpart.float() * weight_E
        dpart.copy_((g - f * (g * f).mean(-1, keepdim=True) * inverse.square()) * inverse)
