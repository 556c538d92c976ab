"""DoRA (arXiv 2402.09353) on a fused matrix: each output feature scaled by its magnitude over its row's norm.

    y = g (W + s B A) x + bias,    g = m / ||W + s B A|| by rows

The norm is a constant of the backward pass, as in section 4.3 of the paper and in PEFT. It is not taken of the summed
matrix, which would be as large as W: only ||W|| is, once, and each pass adds what the adapter changes,

    ||W + s B A||^2 = ||W||^2 + rowsum((2 W A^T + (s B) (A A^T)) * s B).

Shape suffixes (legend in docs/design.md): N output features, K input features, P LoRA columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parley.train_step.ops import AdapterSlice


class DoraScale:
    """g of the output features of one fused matrix; 1 where a projection has no magnitude."""

    def __init__(self, slices: Sequence[AdapterSlice], out_features: int, device: torch.device) -> None:
        self.slices = [item for item in slices if item.adapter.magnitude is not None]
        self.scale_N = torch.ones(out_features, device=device)
        self.dot_N = torch.zeros(out_features, device=device)  # see Ops.scale_columns_backward
        self.base_square_N: Tensor | None = None  # ||W||^2

    def update(self, w_NK: Tensor, a_PK: Tensor, sb_NP: Tensor) -> None:
        """Bring g up to date with the adapters; W is always the same."""
        if self.base_square_N is None:
            self.base_square_N = torch.linalg.vector_norm(w_NK, dim=1, dtype=torch.float32).square_()
        # Columns of other projections in A A^T meet zeros in s B.
        change_NP = torch.addmm(torch.mm(w_NK, a_PK.t()), sb_NP, torch.mm(a_PK, a_PK.t()), beta=2)
        norm_N = (self.base_square_N + (change_NP.float() * sb_NP).sum(1)).clamp_(min=0).sqrt_()
        for item in self.slices:
            assert item.adapter.magnitude is not None
            torch.div(item.adapter.magnitude.m_N, norm_N[item.rows], out=self.scale_N[item.rows])

    def add_gradients(self) -> None:
        """Add the magnitudes' gradients, sum of dy (y - bias) / m, from what the backward pass left in `dot_N`."""
        for item in self.slices:
            magnitude = item.adapter.magnitude
            assert magnitude is not None
            magnitude.dm_N.addcdiv_(self.dot_N[item.rows], magnitude.m_N)
