"""Attention of new queries over cached keys and values in plain PyTorch.

Shape suffixes besides docs/design.md's: Q queries of one key-value head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from parley.train_step.ops import AttentionShape


def attend(
    q_BGQE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, shape: AttentionShape, mask: Tensor | None, *, causal: bool = False
) -> Tensor:
    """(B, G, Q, E). `mask`: what is added to the scores, broadcast over them; `causal`: as many queries as positions.

    Without a soft cap PyTorch's operator does it, which has none.
    """
    if shape.softcap is None:
        return functional.scaled_dot_product_attention(
            q_BGQE, k_BGLE, v_BGLE, mask, is_causal=causal, scale=shape.scale
        )
    scores_BGQL = (q_BGQE @ k_BGLE.mT).mul_(shape.scale / shape.softcap).tanh_().mul_(shape.softcap)
    if causal:
        mask = torch.full(scores_BGQL.shape[-2:], -torch.inf, dtype=scores_BGQL.dtype, device=scores_BGQL.device).triu(
            1
        )
    if mask is not None:
        scores_BGQL += mask
    # Softmax in fp32, as transformers does.
    return scores_BGQL.softmax(-1, dtype=torch.float32).to(v_BGLE.dtype) @ v_BGLE
