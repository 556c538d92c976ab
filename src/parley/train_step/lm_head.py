"""The output head and the loss, on supervised rows only and some rows at a time.

Shape suffixes: T tokens, D hidden, S supervised rows, V vocabulary, P spare columns.
"""

from __future__ import annotations

from torch import Tensor

from parley.train_step.bind import Bound
from parley.train_step.matmul import WHOLE, product, whole
from parley.train_step.ops import Ops
from parley.train_step.packed_batch import Rows


def head(
    ops: Ops,
    bound: Bound,
    rows: Rows,
    row_S: Tensor,
    h_TD: Tensor,
    delta_TD: Tensor,
    dh_TDP: Tensor,
    room_V: Tensor,
    figures_3: Tensor,
) -> None:
    """Add the gradient of the loss with respect to h + delta to `dh_TDP`, which arrives as zeros.

    `row_S`: the supervised rows among them. Adds the loss, hits and entropy to `figures_3` (see Ops.cross_entropy).
    `room_V` holds the logits of so many rows as are computed at a time.
    """
    dh_TD, chunk = dh_TDP[:, : h_TD.shape[1]], len(room_V)
    for part_S, target_S in zip(row_S.split(chunk), rows.target_S.split(chunk), strict=True):
        real = len(part_S)
        padded = min(whole(real, WHOLE), chunk)  # rows behind the real ones: nobody's
        normed_SD = h_TD.new_empty(padded, h_TD.shape[1])
        x_SD, delta_SD = h_TD.index_select(0, part_S), delta_TD.index_select(0, part_S)
        x_SD = ops.rms_norm(x_SD, delta_SD, bound.norm_D, bound.eps, normed_SD[:real])
        logits_SV = product(normed_SD, bound.head_VD, room_V[:padded])
        ops.cross_entropy(logits_SV[:real], target_S, rows.scale, figures_3)
        dnormed_SD = product(logits_SV, bound.head_VD.t(), normed_SD)[:real]
        dx_SD = h_TD.new_zeros(x_SD.shape)
        ops.rms_norm_backward(dnormed_SD, x_SD, bound.norm_D, bound.eps, dx_SD)
        dh_TD.index_copy_(0, part_S.long(), dx_SD)
