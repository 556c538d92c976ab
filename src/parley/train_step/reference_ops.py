"""The step's operations in plain PyTorch: what runs on a CPU, and what the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from parley.train_step.ops import AttentionShape, Copy, Rope, Slot
from parley.train_step.packed_batch import IGNORED, Rows
from parley.train_step.reference_attention import attention, attention_backward

__all__ = [
    "add_adapter_gradients", "attention", "attention_backward", "copy_all", "copy_scaled", "copy_table",
    "cross_entropy", "rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward", "write_nf4",
]  # fmt: skip

aten = torch.ops.aten


def copy_scaled(source: Tensor, out: Tensor, scale: float) -> None:
    if scale == 1.0:
        out.copy_(source)
    else:
        torch.mul(source, scale, out=out)


def copy_table(copies: list[Copy]) -> list[Copy]:
    return copies


def copy_all(table: list[Copy]) -> None:
    for source, out, scale in table:
        copy_scaled(source, out, scale)


def add_adapter_gradients(dy_TNP: Tensor, x_TKP: Tensor, slots: list[Slot], columns_out: int, columns_in: int) -> None:
    v_TP, u_TP = dy_TNP[:, columns_out:], x_TKP[:, columns_in:]
    for slot in slots:
        adapter = slot.adapter
        _add_product(v_TP[:, slot.columns], x_TKP[:, :columns_in], adapter.da_RK, 1.0)
        _add_product(dy_TNP[:, slot.rows], u_TP[:, slot.columns], adapter.db_NR, adapter.scale)


def _add_product(p_TM: Tensor, q_TN: Tensor, out_MN: Tensor, scale: float) -> None:
    """out += scale p^T q."""
    if p_TM.dtype == out_MN.dtype:
        out_MN.addmm_(p_TM.t(), q_TN, alpha=scale)
    else:
        out_MN.add_(p_TM.t().float() @ q_TN.float(), alpha=scale)


def write_nf4(packed: Tensor, absmax: Tensor, code: Tensor, block: int, out_NK: Tensor) -> None:
    bytes_ = packed.flatten().int()
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
    torch.mul((f_TD * _inverse(f_TD, eps)).to(x_TD.dtype), weight_D, out=out_TD)
    return total_TD


def rms_norm_backward(dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, dx_TD: Tensor) -> None:
    f_TD = x_TD.float()
    inverse_T1 = _inverse(f_TD, eps)
    g_TD = dout_TD.float() * weight_D
    along_T1 = (g_TD * f_TD).mean(-1, keepdim=True) * inverse_T1.square()
    dx_TD.addcmul_(g_TD.addcmul_(f_TD, along_T1, value=-1), inverse_T1)


def _inverse(f_TD: Tensor, eps: float) -> Tensor:
    """(T, 1): one over the root of the mean square, read in one go."""
    length_T1 = torch.linalg.vector_norm(f_TD, dim=-1, keepdim=True)
    return (length_T1.square() / f_TD.shape[1] + eps).rsqrt_()


def rope(x_TC: Tensor, rows: Rows, rope: Rope, shape: AttentionShape, *, inverse: bool = False) -> None:
    turned = (shape.heads + shape.kv_heads) * shape.size
    first_THE, second_THE = x_TC[:, :turned].unflatten(1, (-1, 2, shape.size // 2)).unbind(2)
    cos_T1E = rope.cos_PE.index_select(0, rows.position_T)[:, None]
    sin_T1E = rope.sin_PE.index_select(0, rows.position_T)[:, None]
    sign = -1 if inverse else 1
    before_THE = first_THE.clone()
    first_THE.mul_(cos_T1E).addcmul_(second_THE, sin_T1E, value=-sign)
    second_THE.mul_(cos_T1E).addcmul_(before_THE, sin_T1E, value=sign)


def swiglu(x_T2F: Tensor, out_TF: Tensor) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    torch.mul(functional.silu(gate_TF), up_TF, out=out_TF)


def swiglu_backward(dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    dgate_TF, dup_TF = dx_T2F.chunk(2, dim=1)
    silu_TF = functional.silu(gate_TF)
    aten.silu_backward(dout_TF * up_TF, gate_TF, grad_input=dgate_TF)
    torch.mul(dout_TF, silu_TF, out=dup_TF)


def cross_entropy(logits_SV: Tensor, target_S: Tensor, scale: Tensor, figures_3: Tensor) -> None:
    real_S1 = (target_S != IGNORED)[:, None]
    index_S1 = target_S.clamp(min=0).long()[:, None]
    log_p_SV = functional.log_softmax(logits_SV.float(), dim=-1)
    p_SV = log_p_SV.exp()
    right_S1 = log_p_SV.argmax(-1, keepdim=True) == index_S1
    figures_3[0] -= (log_p_SV.gather(1, index_S1) * real_S1).sum()
    figures_3[1] += (right_S1 & real_S1).sum()
    figures_3[2] -= (p_SV * log_p_SV * real_S1).sum()
    p_SV.scatter_add_(1, index_S1, p_SV.new_full(index_S1.shape, -1.0))
    logits_SV.copy_(p_SV * real_S1 * scale)
