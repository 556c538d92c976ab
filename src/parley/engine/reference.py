"""The step's operations in plain PyTorch: what runs on a CPU, and what the kernels are held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parley.engine.documents import IGNORED, Rows
from parley.engine.ops import AttentionShape, Rope, Slot

aten = torch.ops.aten


def copy_scaled(source: Tensor, out: Tensor, scale: float) -> None:
    if scale == 1.0:
        out.copy_(source)
    else:
        torch.mul(source, scale, out=out)


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
    inverse_T1 = torch.rsqrt(f_TD.square().mean(-1, keepdim=True) + eps)
    torch.mul((f_TD * inverse_T1).to(x_TD.dtype), weight_D, out=out_TD)
    return total_TD


def rms_norm_backward(dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, dx_TD: Tensor) -> None:
    f_TD = x_TD.float()
    inverse_T1 = torch.rsqrt(f_TD.square().mean(-1, keepdim=True) + eps)
    g_TD = dout_TD.float() * weight_D
    along_T1 = (g_TD * f_TD).mean(-1, keepdim=True) * inverse_T1.square()
    dx_TD += ((g_TD - f_TD * along_T1) * inverse_T1).to(dx_TD.dtype)


def rope(x_TC: Tensor, rows: Rows, rope: Rope, shape: AttentionShape, *, inverse: bool = False) -> None:
    turned = (shape.heads + shape.kv_heads) * shape.size
    x_THE = x_TC[:, :turned].unflatten(1, (-1, shape.size))
    cos_T1E = rope.cos_PE[rows.position_T][:, None]
    sin_T1E = rope.sin_PE[rows.position_T][:, None]
    if inverse:
        sin_T1E = -sin_T1E
    first, second = x_THE.chunk(2, dim=-1)
    turned_first = first * cos_T1E - second * sin_T1E
    second.mul_(cos_T1E).add_(first * sin_T1E)
    first.copy_(turned_first)


def swiglu(x_T2F: Tensor, out_TF: Tensor) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    torch.mul(functional.silu(gate_TF), up_TF, out=out_TF)


def swiglu_backward(dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor) -> None:
    gate_TF, up_TF = x_T2F.chunk(2, dim=1)
    dgate_TF, dup_TF = dx_T2F.chunk(2, dim=1)
    dgate = aten.silu_backward(dout_TF * up_TF, gate_TF)
    torch.mul(dout_TF, functional.silu(gate_TF), out=dup_TF)
    dgate_TF.copy_(dgate)


def _grid(x_THE: Tensor, flat_T: Tensor, documents: int, longest: int, heads: int) -> Tensor:
    """(documents, heads, longest, E): each document a row of its own, short ones padded with zeros at the end."""
    grid = x_THE.new_zeros(documents * longest, *x_THE.shape[1:])
    grid[flat_T] = x_THE
    grid = grid.view(documents, longest, *x_THE.shape[1:]).transpose(1, 2)
    return grid.repeat_interleave(heads // grid.shape[1], dim=1)


def _layout(rows: Rows) -> tuple[Tensor, int, int]:
    """Each token's place in the grid of documents, how many documents there are and the longest one's length.

    A causal query never sees the padding behind it, so the grid needs no mask.
    """
    assert rows.lengths is not None, "the plain operations know their documents on the host"
    longest = max(rows.lengths)
    length_N = torch.tensor(rows.lengths)
    document_T = torch.repeat_interleave(torch.arange(len(rows.lengths)), length_N).to(rows.ids_T.device)
    return document_T * longest + rows.position_T, len(rows.lengths), longest


def _window_mask(longest: int, shape: AttentionShape, like: Tensor) -> Tensor | None:
    if shape.window is None or shape.window >= longest:
        return None
    hidden = torch.ones(longest, longest, dtype=torch.bool, device=like.device)
    hidden = hidden.triu(1) | hidden.tril(-shape.window)
    return torch.zeros(1, 1, longest, longest, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)


def attention(x_TC: Tensor, rows: Rows, shape: AttentionShape, out_TD: Tensor) -> Tensor:
    flat_T, documents, longest = _layout(rows)
    q, k, v = (_grid(part, flat_T, documents, longest, shape.heads) for part in shape.parts(x_TC))
    mask = _window_mask(longest, shape, q)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask is None, attn_mask=mask, scale=shape.scale
    )
    out_TD.copy_(out.transpose(1, 2).reshape(documents * longest, -1)[flat_T])
    return lse


def attention_backward(
    dout_TD: Tensor, x_TC: Tensor, out_TD: Tensor, saved: Any, rows: Rows, shape: AttentionShape, dx_TC: Tensor
) -> None:
    flat_T, documents, longest = _layout(rows)
    q, k, v = (_grid(part, flat_T, documents, longest, shape.heads) for part in shape.parts(x_TC))
    split = (-1, shape.size)
    out, dout = (_grid(x.unflatten(1, split), flat_T, documents, longest, shape.heads) for x in (out_TD, dout_TD))
    mask = _window_mask(longest, shape, q)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, saved, 0.0, mask is None, attn_mask=mask, scale=shape.scale
    )
    for grad, part in zip(grads, shape.parts(dx_TC), strict=True):
        heads = part.shape[1]
        grouped = grad.unflatten(1, (heads, shape.heads // heads)).sum(2)
        part.copy_(grouped.transpose(1, 2).reshape(documents * longest, heads, shape.size)[flat_T])


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
