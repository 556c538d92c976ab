"""A 4-bit NormalFloat weight in bitsandbytes' format (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor

from parley.train_step.ops import Ops


class Nf4Weight:
    """`weight` is bitsandbytes' Params4bit: two values to a byte, one scale per block, the scales quantised too."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.quant_state.shape
        return rows, columns

    def block_scales(self) -> tuple[Tensor, Tensor, int]:
        """The fp32 scale of each block (absmax), the 16 values of the code before scaling, and the block size."""
        state = self.weight.quant_state
        absmax = state.absmax
        if state.nested:  # double quantisation: the scales are 8-bit themselves, around their mean
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        return absmax.float(), state.code, state.blocksize

    def copy_into(self, out_NK: Tensor, ops: Ops) -> None:
        absmax, code, block = self.block_scales()
        ops.dequantize_nf4(self.weight.data, absmax, code, block, out_NK)
