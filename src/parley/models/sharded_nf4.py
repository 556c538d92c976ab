"""An NF4 linear layer whose packed bytes and scales are parameters that FSDP2 can shard.

bitsandbytes keeps the scales beside the weight in a QuantState, which FSDP does not see: every rank would hold all of
them, and a sharded weight loses the object. Here both are parameters with one row a block of 64 weights, so that FSDP
cuts them at the same block borders. The forward pass builds the QuantState of the gathered tensors anew.

FSDP2 of torch 2.11 takes floating-point parameters alone. So bytes are held under the names of two 8-bit types, and
only ever copied: FSDP gathers parameters of different types as uint8, and every layer has these two, so that no copy
sees a number, of which it might rewrite NaN patterns.

Double quantisation (arXiv 2305.14314) subtracts the mean of all scales of the matrix and stores them in 8 bits; what
it needs for that, a second scale per 256 blocks and the mean, is on every rank: 2.4e-4 bytes a weight.

Shape suffixes (legend in docs/design.md): N output features, K input features. Here only: B blocks of 64 weights in
row-major order, b those of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit, quantize_blockwise
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a second scale under double quantisation
CODE_SIZE = 16
PACKED_BYTES, SCALE_BYTES = torch.float8_e4m3fn, torch.float8_e5m2  # one byte each, and not equal


class ShardedNf4Linear(nn.Linear):
    """x W^T + bias with W (N, K) in bitsandbytes' NF4 format, N K a multiple of 64.

    `packed` (B, 32) are the bytes of the weight and `absmax` (B,) the scales, both without a gradient. `weight` is this
    rank's part of the bytes as uint8, for PEFT, which asks it for device and type. Made on the meta device; `fill`
    writes this rank's blocks after `fully_shard` and `to_empty`.
    """

    def __init__(self, linear: nn.Linear, *, double: bool) -> None:
        shape = linear.in_features, linear.out_features
        super().__init__(*shape, bias=linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        self.compute_dtype, self.double = linear.weight.dtype, double
        blocks, rest = divmod(self.in_features * self.out_features, BLOCK)
        assert rest == 0, "check_blocks comes first"
        scale_type = SCALE_BYTES if double else torch.float32
        del self._parameters["weight"]
        self.packed = _frozen(torch.empty(blocks, BLOCK // 2, dtype=PACKED_BYTES, device="meta"))
        self.absmax = _frozen(torch.empty(blocks, dtype=scale_type, device="meta"))
        self.requires_grad_(False)
        self.register_buffer("code", torch.empty(CODE_SIZE), persistent=False)
        if double:
            self.register_buffer("second_absmax", torch.empty(-(-blocks // SCALE_BLOCK)), persistent=False)
            self.register_buffer("second_code", torch.empty(256), persistent=False)
            self.register_buffer("offset", torch.empty(()), persistent=False)

    @property
    def weight(self) -> Tensor:
        return local_tensor(self.packed).view(torch.uint8)

    @property
    def blocks(self) -> int:
        return self.in_features * self.out_features // BLOCK

    def quant_state(self) -> QuantState:
        """Of the gathered parameters: only between FSDP's all-gather and its resharding."""
        state2 = offset = None
        if self.double:
            offset = self.offset
            state2 = QuantState(
                absmax=self.second_absmax, code=self.second_code, blocksize=SCALE_BLOCK, dtype=torch.float32
            )
        return QuantState(
            absmax=self.absmax.view(torch.uint8) if self.double else self.absmax,
            shape=torch.Size((self.out_features, self.in_features)), code=self.code, blocksize=BLOCK, quant_type="nf4",
            dtype=self.compute_dtype, offset=offset, state2=state2,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """As bitsandbytes.nn.Linear4bit: products in the compute type, the result in the input's."""
        out = matmul_4bit(x.to(self.compute_dtype), self.weight, self.quant_state(), bias=self.bias)
        return out.to(x.dtype)

    def dequantized(self) -> Tensor:
        """The weight (N, K) in the compute type, of gathered parameters."""
        return dequantize_4bit(self.weight.view(-1, 1), self.quant_state())

    @torch.no_grad()
    def fill(self, values: Tensor, gather_scales: Any) -> None:
        """Quantise this rank's weights, flat in row-major order, into its shard.

        `gather_scales` returns the fp32 scales of all blocks (B,) from those of this rank (b,): the second
        quantisation needs their mean. Bytes and scales are those that bitsandbytes computes of the whole matrix.
        """
        self.code.copy_(get_4bit_type("nf4", device=values.device))
        packed, scales_b = values.new_empty(0, dtype=torch.uint8), values.new_empty(0, dtype=torch.float32)
        if len(values):  # a small matrix may have fewer blocks than there are ranks
            packed, state = quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
            scales_b = state.absmax
        if self.double:
            scales_B = gather_scales(scales_b)
            offset = scales_B.mean()
            quantised_B, state2 = quantize_blockwise(scales_B - offset, blocksize=SCALE_BLOCK)
            self.offset.copy_(offset)
            self.second_absmax.copy_(state2.absmax)
            self.second_code.copy_(state2.code)
            scales_b = quantised_B[local_rows(self.absmax)]
        self.weight.copy_(packed.view(-1, BLOCK // 2))
        local_tensor(self.absmax).view(scales_b.dtype).copy_(scales_b)


def local_rows(parameter: Tensor) -> slice:
    """The rows (blocks) of a sharded parameter that this rank holds: as torch.chunk cuts them, as FSDP2 does."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    ranks, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    chunk = -(-len(parameter) // ranks)
    return slice(min(rank * chunk, len(parameter)), min((rank + 1) * chunk, len(parameter)))


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's rows of a sharded parameter, as a view; of another the whole."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
