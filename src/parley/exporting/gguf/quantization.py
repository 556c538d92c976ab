"""Which type each tensor gets, and its conversion.

The k-quants mix types as llama.cpp's own quantizer does (src/llama-quant.cpp): more bits for the head, and for values
and down projections of some layers. Blocks are quantised by ggml itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from parley.library_compat.xllamacpp import quantize_rows

Q = GGMLQuantizationType
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
CHUNK_VALUES = 2**22
"""Values converted to float32 at a time: 16 MiB."""
FALLBACKS = {Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0}
"""What llama.cpp takes where rows are no multiple of the 256 values of a k-quant's block."""
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class QuantScheme:
    """A type of file.

    Attributes:
        file_type: what the metadata calls it.
        default: type of matrices.
        head: type of the head, and of an embedding that is also the head.
        raised: types of matrices of some kinds, in the first and last eighth of the layers and every third between.
    """

    file_type: LlamaFileType
    default: GGMLQuantizationType
    head: GGMLQuantizationType
    raised: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)

    def type_of(self, name: str, shape: tuple[int, ...], layers: int, tied: bool) -> GGMLQuantizationType:
        """The type of the tensor `name` of `shape`, in a model of `layers` layers."""
        if len(shape) < 2 or name.endswith("_norm.weight"):
            return Q.F32  # llama.cpp adds and multiplies by vectors in float32 alone
        chosen = self.wanted(name, layers, tied)
        if shape[-1] % GGML_QUANT_SIZES[chosen][0]:
            chosen = FALLBACKS.get(chosen, Q.F16)
        if shape[-1] % GGML_QUANT_SIZES[chosen][0]:
            chosen = Q.F16
        return chosen

    def wanted(self, name: str, layers: int, tied: bool) -> GGMLQuantizationType:
        """The type of a matrix whose rows are whole blocks."""
        if name == HEAD or (name == EMBEDDING and tied):
            return self.head
        found = _LAYER.fullmatch(name)
        if found is None:
            return self.default
        layer, kind = int(found[1]), found[2]
        return self.raised[kind] if kind in self.raised and _gets_more_bits(layer, layers) else self.default


def _gets_more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


F = LlamaFileType
_MORE = {"attn_v": Q.Q6_K, "attn_qkv": Q.Q6_K, "ffn_down": Q.Q6_K}
SCHEMES = {
    "f32": QuantScheme(F.ALL_F32, Q.F32, Q.F32),
    "f16": QuantScheme(F.MOSTLY_F16, Q.F16, Q.F16),
    "bf16": QuantScheme(F.MOSTLY_BF16, Q.BF16, Q.BF16),
    "q8_0": QuantScheme(F.MOSTLY_Q8_0, Q.Q8_0, Q.Q8_0),
    "q6_k": QuantScheme(F.MOSTLY_Q6_K, Q.Q6_K, Q.Q6_K),
    "q5_k_m": QuantScheme(F.MOSTLY_Q5_K_M, Q.Q5_K, Q.Q6_K, _MORE),
    "q5_0": QuantScheme(F.MOSTLY_Q5_0, Q.Q5_0, Q.Q6_K),
    "q4_k_m": QuantScheme(F.MOSTLY_Q4_K_M, Q.Q4_K, Q.Q6_K, _MORE),
    "q4_0": QuantScheme(F.MOSTLY_Q4_0, Q.Q4_0, Q.Q6_K),
}
"""By the name that --quant takes, those with most bits first."""


def byte_shape(shape: tuple[int, ...], quant: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape in bytes of a tensor of `shape` values in the type `quant`."""
    block, size = GGML_QUANT_SIZES[quant]
    return (*shape[:-1], shape[-1] // block * size)


def quantized(value: Tensor, quant: GGMLQuantizationType, threads: int) -> NDArray[np.uint8]:
    """`value` as the bytes of a GGUF tensor, (N, bytes of a row); converted by `threads` threads, in chunks of rows."""
    shape = tuple(value.shape)
    matrix = value.reshape(-1, shape[-1]).contiguous()
    out = np.empty(byte_shape(tuple(matrix.shape), quant), np.uint8)
    step = max(1, CHUNK_VALUES // shape[-1])

    def convert(start: int) -> None:
        rows = matrix[start : start + step]
        out[start : start + step] = _convert(rows, quant)

    with ThreadPoolExecutor(threads) as pool:  # ggml, numpy and torch release the interpreter lock
        list(pool.map(convert, range(0, matrix.shape[0], step)))
    return out.reshape(byte_shape(shape, quant))


def _convert(rows: Tensor, quant: GGMLQuantizationType) -> NDArray[np.uint8]:
    if quant in (Q.F32, Q.F16, Q.BF16):
        dtype = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}[quant]
        return rows.to(dtype).contiguous().view(torch.uint8).numpy()
    return quantize_rows(rows.float().contiguous().numpy(), quant, byte_shape(tuple(rows.shape), quant)[-1])
