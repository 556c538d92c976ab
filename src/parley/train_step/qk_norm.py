"""RMS norm of each query and key head (Qwen3), in place over packed rows.

Shape suffixes (legend in docs/design.md): T tokens, H heads, E head size, C query, key and value columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parley.train_step.ops import AttentionShape, QkNorm


def _inverse_rms(x_THE: Tensor, eps: float) -> Tensor:
    """(T, H, 1)."""
    return torch.rsqrt(x_THE.float().square().mean(-1, keepdim=True) + eps)


def apply_qk_norm(x_TC: Tensor, shape: AttentionShape, norms: QkNorm) -> Tensor:
    """Normalise the query and key heads of `x_TC` in place."""
    # strict=False: the values, third of the split, are not normalised.
    for heads_THE, weight_E in zip(shape.split_qkv(x_TC), (norms.q_E, norms.k_E), strict=False):
        heads_THE.copy_((heads_THE.float() * _inverse_rms(heads_THE, norms.eps)).to(heads_THE.dtype) * weight_E)
    return x_TC


def qk_norm_backward(dx_TC: Tensor, x_TC: Tensor, shape: AttentionShape, norms: QkNorm) -> None:
    """Turn the gradient of the normalised heads in `dx_TC` into that of `x_TC`, in place."""
    weights = (norms.q_E, norms.k_E)
    for d_THE, x_THE, weight_E in zip(shape.split_qkv(dx_TC), shape.split_qkv(x_TC), weights, strict=False):
        inverse_TH1 = _inverse_rms(x_THE, norms.eps)
        f_THE, g_THE = x_THE.float(), d_THE.float() * weight_E
        mean_TH1 = (g_THE * f_THE).mean(-1, keepdim=True)
        d_THE.copy_((g_THE - f_THE * mean_TH1 * inverse_TH1.square()) * inverse_TH1)
