"""The operations of ops.Ops in plain PyTorch: they run on a CPU, and the Triton kernels are tested against them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from parley.data.control_tokens import IGNORE_INDEX
from parley.library_compat.torch import silu_backward_into
from parley.train_step.ops import AdapterSlice, AttentionShape, RopeTable, ScaledCopy
from parley.train_step.packed_batch import DeviceBatch
from parley.train_step.reference_attention import attention, attention_backward

__all__ = [
    "add_adapter_gradients",
    "attention",
    "attention_backward",
    "copy_scaled",
    "cross_entropy",
    "dequantize_nf4",
    "prepare_copies",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "run_copies",
    "swiglu",
    "swiglu_backward",
]  # fmt: skip


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


def dequantize_nf4(packed: Tensor, absmax: Tensor, code: Tensor, block: int, out_NK: Tensor) -> None:
    bytes_ = packed.flatten().int()
    # bitsandbytes stores the first of two values in the high half of a byte.
    nibbles = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten()
    values = code[nibbles].view(-1, block) * absmax[:, None]
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
    torch.mul((f_TD * _inverse_rms(f_TD, eps)).to(x_TD.dtype), weight_D, out=out_TD)
    return total_TD


def rms_norm_backward(dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, dx_TD: Tensor) -> None:
    f_TD = x_TD.float()
    inverse_T1 = _inverse_rms(f_TD, eps)
    g_TD = dout_TD.float() * weight_D
    mean_T1 = (g_TD * f_TD).mean(-1, keepdim=True) * inverse_T1.square()
    dx_TD.addcmul_(g_TD.addcmul_(f_TD, mean_T1, value=-1), inverse_T1)


def _inverse_rms(f_TD: Tensor, eps: float) -> Tensor:
    """(T, 1): one over the root mean square, in a single read of f."""
    norm_T1 = torch.linalg.vector_norm(f_TD, dim=-1, keepdim=True)
    return (norm_T1.square() / f_TD.shape[1] + eps).rsqrt_()


def rope(x_TC: Tensor, batch: DeviceBatch, rope: RopeTable, shape: AttentionShape, *, inverse: bool = False) -> None:
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    first_THE, second_THE = x_TC[:, :rotated].unflatten(1, (-1, 2, shape.head_dim // 2)).unbind(2)
    cos_T1E = rope.cos_LE.index_select(0, batch.position_T)[:, None]
    sin_T1E = rope.sin_LE.index_select(0, batch.position_T)[:, None]
    sign = -1 if inverse else 1
    # The first half is overwritten before the second half reads it.
    original_THE = first_THE.clone()
    first_THE.mul_(cos_T1E).addcmul_(second_THE, sin_T1E, value=-sign)
    second_THE.mul_(cos_T1E).addcmul_(original_THE, sin_T1E, value=sign)


def swiglu(x_T2F: Tensor, out_TF: Tensor) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    torch.mul(functional.silu(gate_TF), up_TF, out=out_TF)


def swiglu_backward(dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    dgate_TF, dup_TF = dx_T2F.chunk(2, dim=1)
    # Before the gradients are written, since `dx_T2F` may be the memory of `x_T2F`.
    silu_TF = functional.silu(gate_TF)
    silu_backward_into(dout_TF * up_TF, gate_TF, dgate_TF)
    torch.mul(dout_TF, silu_TF, out=dup_TF)


def cross_entropy(logits_SV: Tensor, target_S: Tensor, scale: Tensor, metrics_3: Tensor) -> None:
    supervised_S1 = (target_S != IGNORE_INDEX)[:, None]
    # gather needs a valid index; ignored rows are masked in every sum below.
    index_S1 = target_S.clamp(min=0).long()[:, None]
    log_p_SV = functional.log_softmax(logits_SV.float(), dim=-1)
    p_SV = log_p_SV.exp()
    correct_S1 = log_p_SV.argmax(-1, keepdim=True) == index_S1
    metrics_3[0] -= (log_p_SV.gather(1, index_S1) * supervised_S1).sum()
    metrics_3[1] += (correct_S1 & supervised_S1).sum()
    metrics_3[2] -= (p_SV * log_p_SV * supervised_S1).sum()
    p_SV.scatter_add_(1, index_S1, p_SV.new_full(index_S1.shape, -1.0))
    logits_SV.copy_(p_SV * supervised_S1 * scale)
