"""A 4-bit NormalFloat weight as bitsandbytes keeps it (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor

from parley.train_step.ops import Ops


class Nf4:
    """`weight` is bitsandbytes' Params4bit: two values to a byte, a scale for each block of 64, itself quantised."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.quant_state.shape
        return rows, columns

    def scales(self) -> tuple[Tensor, Tensor, int]:
        """The fp32 scale of each run of values, the 16 values there are before scaling, and the length of a run."""
        state = self.weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        return absmax.float(), state.code, state.blocksize

    def write(self, out_NK: Tensor, ops: Ops) -> None:
        absmax, code, block = self.scales()
        ops.write_nf4(self.weight.data, absmax, code, block, out_NK)
