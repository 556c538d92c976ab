"""The operations of ops.Ops in plain PyTorch: they run on a CPU, and the Triton kernels are tested against them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from parley.data.control_tokens import IGNORE_INDEX
from parley.library_compat.torch import gelu_tanh_backward_into, silu_backward_into
from parley.train_step.ops import AdapterSlice, AttentionShape, LogitTransform, QkNorm, RopeTable, ScaledCopy
from parley.train_step.packed_batch import DeviceBatch
from parley.train_step.reference_attention import attention, attention_backward, sink_gradient

__all__ = [
    "add_adapter_gradients",
    "attention",
    "attention_backward",
    "copy_scaled",
    "cross_entropy",
    "dequantize_nf4",
    "dropout",
    "glu",
    "glu_backward",
    "prepare_copies",
    "qk_norm",
    "qk_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "run_copies",
    "scale_columns",
    "scale_columns_backward",
    "sink_gradient",
]


def copy_scaled(source: Tensor, out: Tensor, scale: float) -> None:
    if scale == 1.0:
        out.copy_(source)
    else:
        torch.mul(source, scale, out=out)


def prepare_copies(copies: list[ScaledCopy]) -> list[ScaledCopy]:
    return copies


def run_copies(prepared: list[ScaledCopy]) -> None:
    for source, out, scale in prepared:
        copy_scaled(source, out, scale)


def add_adapter_gradients(
    dy_TNP: Tensor, x_TKP: Tensor, adapter_slices: list[AdapterSlice], out_features: int, in_features: int
) -> None:
    v_TP, u_TP = dy_TNP[:, out_features:], x_TKP[:, in_features:]
    for item in adapter_slices:
        adapter = item.adapter
        _add_product(v_TP[:, item.columns], x_TKP[:, :in_features], adapter.da_RK, 1.0)
        _add_product(dy_TNP[:, item.rows], u_TP[:, item.columns], adapter.db_NR, adapter.scale)


def _add_product(p_TM: Tensor, q_TN: Tensor, out_MN: Tensor, scale: float) -> None:
    """out += scale p^T q."""
    if p_TM.dtype == out_MN.dtype:
        out_MN.addmm_(p_TM.t(), q_TN, alpha=scale)
    else:
        # In fp32, as the gradients are: a sum over many tokens in bf16 loses small terms.
        out_MN.add_(p_TM.t().float() @ q_TN.float(), alpha=scale)


def scale_columns(x_TN: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> None:
    x_TN.mul_(scale_N)
    if bias_N is not None:
        x_TN.add_(bias_N)


def scale_columns_backward(dy_TN: Tensor, y_TN: Tensor, scale_N: Tensor, bias_N: Tensor | None, dot_N: Tensor) -> None:
    z_TN = y_TN.float() if bias_N is None else y_TN.float() - bias_N
    dot_N.copy_((z_TN * dy_TN).sum(0))
    dy_TN.mul_(scale_N)


def dropout(
    x_TK: Tensor, out_TK: Tensor, seed: Tensor, stream: int, p: float, first_row: int = 0, *, add: bool = False
) -> None:
    # numpy's, since torch's generator on a CPU reads 32 bits of a seed. It fills rows one after the other, so that
    # earlier rows have to be sampled for later ones.
    generator = np.random.default_rng([int(seed), stream])
    random_TK = generator.random((first_row + len(x_TK), x_TK.shape[1]), dtype=np.float32)[first_row:]
    factor_TK = torch.from_numpy(random_TK >= p).to(x_TK.dtype) / (1 - p)
    if add:
        out_TK.addcmul_(x_TK, factor_TK)
    else:
        torch.mul(x_TK, factor_TK, out=out_TK)


def dequantize_nf4(packed: Tensor, absmax: Tensor, code: Tensor, block: int, out_NK: Tensor) -> None:
    bytes_ = packed.flatten().int()
    # bitsandbytes stores the first of two values in the high half of a byte.
    nibbles = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten()
    values = code[nibbles][: out_NK.numel()]  # an odd number of values leaves half a byte
    blocks = values.numel() // block * block  # the last block may be shorter
    values[:blocks].view(-1, block).mul_(absmax[: blocks // block, None])
    values[blocks:].mul_(absmax[-1])
    out_NK.copy_(values.view(out_NK.shape))


def rms_norm(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    out_TD: Tensor,
    total_TD: Tensor | None = None,
) -> Tensor:
    total_TD = x_TD if delta_TD is None else torch.add(x_TD, delta_TD, out=total_TD)
    f_TD = total_TD.float()
    torch.mul((f_TD * _inverse_rms(f_TD, eps)).to(weight_D.dtype), weight_D, out=out_TD)
    return total_TD


def rms_norm_backward(dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, dx_TD: Tensor) -> None:
    f_TD = x_TD.float()
    inverse_T1 = _inverse_rms(f_TD, eps)
    g_TD = dout_TD.float() * weight_D
    mean_T1 = (g_TD * f_TD).mean(-1, keepdim=True) * inverse_T1.square()
    dx_TD.addcmul_(g_TD.addcmul_(f_TD, mean_T1, value=-1), inverse_T1)


def _inverse_rms(f_TD: Tensor, eps: float) -> Tensor:
    """(T, 1): one over the root mean square of the last dimension, in a single read of f."""
    norm_T1 = torch.linalg.vector_norm(f_TD, dim=-1, keepdim=True)
    return (norm_T1.square() / f_TD.shape[-1] + eps).rsqrt_()


def rope(x_TC: Tensor, batch: DeviceBatch, rope: RopeTable, shape: AttentionShape, *, inverse: bool = False) -> None:
    half = rope.cos_LE.shape[1]
    heads_THE = x_TC[:, : (shape.heads + shape.kv_heads) * shape.head_dim].unflatten(1, (-1, shape.head_dim))
    first_THE, second_THE = heads_THE[..., :half], heads_THE[..., half : 2 * half]
    cos_T1E = rope.cos_LE.index_select(0, batch.position_T)[:, None]
    sin_T1E = rope.sin_LE.index_select(0, batch.position_T)[:, None]
    sign = -1 if inverse else 1
    # The first half is overwritten before the second half reads it.
    original_THE = first_THE.clone()
    first_THE.mul_(cos_T1E).addcmul_(second_THE, sin_T1E, value=-sign)
    second_THE.mul_(cos_T1E).addcmul_(original_THE, sin_T1E, value=sign)


def qk_norm(x_TC: Tensor, norms: QkNorm, shape: AttentionShape, out_TC: Tensor) -> None:
    out_TC.copy_(x_TC)
    for part_THE, weight in _normed_parts(out_TC, norms, shape):
        f_THE = part_THE.float()
        part_THE.copy_((f_THE * _inverse_rms(f_THE, norms.eps)).to(weight.dtype) * weight)


def qk_norm_backward(dx_TC: Tensor, x_TC: Tensor, norms: QkNorm, shape: AttentionShape) -> None:
    parts = zip(_normed_parts(dx_TC, norms, shape), _normed_parts(x_TC, norms, shape), strict=True)
    for (d_THE, weight), (x_THE, _) in parts:
        f_THE, g_THE = x_THE.float(), d_THE.float() * weight
        inverse_TH1 = _inverse_rms(f_THE, norms.eps)
        mean_TH1 = (g_THE * f_THE).mean(-1, keepdim=True)
        d_THE.copy_((g_THE - f_THE * mean_TH1 * inverse_TH1.square()) * inverse_TH1)


def _normed_parts(x_TC: Tensor, norms: QkNorm, shape: AttentionShape) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of `x_TC` as (T, runs, elements normalised together), each with its weight."""
    heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts = (x_TC[:, :heads], norms.q), (x_TC[:, heads : heads + keys], norms.k)
    return [(part.unflatten(1, (-1, len(weight))), weight) for part, weight in parts]


def glu(x_T2F: Tensor, out_TF: Tensor, activation: str) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    torch.mul(_activate(gate_TF, activation), up_TF, out=out_TF)


def glu_backward(dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor, activation: str) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    dgate_TF, dup_TF = dx_T2F.chunk(2, dim=1)
    # Before the gradients are written, since `dx_T2F` may be the memory of `x_T2F`.
    activated_TF = _activate(gate_TF, activation)
    backward_into = silu_backward_into if activation == "silu" else gelu_tanh_backward_into
    backward_into(dout_TF * up_TF, gate_TF, dgate_TF)
    torch.mul(dout_TF, activated_TF, out=dup_TF)


def _activate(x_TF: Tensor, activation: str) -> Tensor:
    return functional.silu(x_TF) if activation == "silu" else functional.gelu(x_TF, approximate="tanh")


def cross_entropy(
    logits_SV: Tensor, target_S: Tensor, scale: Tensor, metrics_3: Tensor, transform: LogitTransform
) -> Tensor:
    z_SV = logits_SV.float() * transform.scale
    if transform.softcap is not None:
        z_SV = torch.tanh(z_SV / transform.softcap) * transform.softcap
    supervised_S1 = (target_S != IGNORE_INDEX)[:, None]
    # gather needs a valid index; ignored rows are masked in every sum below.
    index_S1 = target_S.clamp(min=0).long()[:, None]
    log_p_SV = functional.log_softmax(z_SV, dim=-1)
    p_SV = log_p_SV.exp()
    correct_S1 = log_p_SV.argmax(-1, keepdim=True) == index_S1
    loss_S = -(log_p_SV.gather(1, index_S1) * supervised_S1)[:, 0]
    metrics_3[0] += loss_S.sum()
    metrics_3[1] += (correct_S1 & supervised_S1).sum()
    metrics_3[2] -= (p_SV * log_p_SV * supervised_S1).sum()
    p_SV.scatter_add_(1, index_S1, p_SV.new_full(index_S1.shape, -1.0))
    p_SV *= supervised_S1 * scale * transform.scale
    if transform.softcap is not None:
        p_SV *= 1 - (z_SV / transform.softcap).square()  # the derivative of c tanh(z / c)
    logits_SV.copy_(p_SV)
    return loss_S
