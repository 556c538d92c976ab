"""The output head and the loss, on supervised rows only and in chunks of rows.

The full logits (T, V) never exist: the head is frozen, so each chunk's gradient overwrites its logits and is at once
multiplied back to the hidden size, as in Liger's fused linear cross entropy (arXiv 2410.10989).

Shape suffixes (legend in docs/design.md): T tokens, D hidden, S supervised rows, V vocabulary, P LoRA columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parley.train_step.bind import BoundModel
from parley.train_step.matmul import ONEDNN_ROW_MULTIPLE, linear
from parley.train_step.ops import Ops
from parley.train_step.packed_batch import DeviceBatch
from parley.units import round_up


def loss_and_gradient(
    ops: Ops,
    bound: BoundModel,
    batch: DeviceBatch,
    row_S: Tensor,
    h_TD: Tensor,
    delta_TD: Tensor,
    dh_TDP: Tensor,
    logits_SV: Tensor,
    metrics_3: Tensor,
    *,
    want_gradient: bool = True,
) -> Tensor:
    """Add the gradient of the loss with respect to h + delta to `dh_TDP`, which must arrive as zeros.

    Returns the loss of each supervised row in fp32, (S,).

    Args:
        row_S: the rows of h that are supervised, in the order of `batch.target_S`.
        logits_SV: the buffer of one chunk's logits; its rows are the chunk size.
        metrics_3: gains the summed loss, the correct tokens and the summed entropy (see Ops.cross_entropy).
        want_gradient: False leaves `dh_TDP` as it is.
    """
    dh_TD, chunk = dh_TDP[:, : h_TD.shape[1]], len(logits_SV)
    losses: list[Tensor] = []
    for part_S, target_S in zip(row_S.split(chunk), batch.target_S.split(chunk), strict=True):
        count = len(part_S)
        padded = min(round_up(count, ONEDNN_ROW_MULTIPLE), chunk)  # padding rows are never read back
        normed_SD = h_TD.new_empty(padded, h_TD.shape[1])
        x_SD, delta_SD = h_TD.index_select(0, part_S), delta_TD.index_select(0, part_S)
        x_SD = ops.rms_norm(x_SD, delta_SD, bound.norm.weight_D, bound.norm.eps, normed_SD[:count])
        part_SV = linear(normed_SD, bound.head_VD, logits_SV[:padded])
        losses.append(ops.cross_entropy(part_SV[:count], target_S, batch.scale, metrics_3, bound.logits))
        if not want_gradient:
            continue
        dnormed_SD = linear(part_SV, bound.head_VD.t(), normed_SD)[:count]
        dx_SD = h_TD.new_zeros(x_SD.shape)
        ops.rms_norm_backward(dnormed_SD, x_SD, bound.norm.weight_D, bound.norm.eps, dx_SD)
        dh_TD.index_copy_(0, part_S.long(), dx_SD)
    return torch.cat(losses)
