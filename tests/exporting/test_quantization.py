"""ggml's quantised blocks against the gguf package's own dequantiser, and which tensor gets which type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf import dequantize

from parley.exporting.gguf.quantization import CHUNK_VALUES, SCHEMES, byte_shape, quantized

# Largest root mean square error of normally distributed values, relative to their own.
ERRORS = {
    Q.F32: 0.0,
    Q.F16: 3e-4,
    Q.BF16: 2.5e-3,
    Q.Q8_0: 0.008,
    Q.Q6_K: 0.03,
    Q.Q5_K: 0.05,
    Q.Q5_1: 0.06,
    Q.Q5_0: 0.06,
    Q.Q4_K: 0.1,
    Q.Q4_0: 0.12,
}


@pytest.mark.parametrize("quant", ERRORS, ids=lambda quant: quant.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_type_is_read_back_by_the_gguf_package(quant: Q, dtype: torch.dtype) -> None:
    value = torch.randn(24, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = quantized(value, quant, threads=2)
    assert packed.shape == byte_shape((24, 512), quant)
    wanted = value.float().numpy()
    error = np.sqrt(np.mean((dequantize(packed, quant) - wanted) ** 2)) / wanted.std()
    assert error <= ERRORS[quant]
    assert error >= ERRORS[quant] / 4 or dtype == torch.bfloat16  # a bound that is far off would hold nothing


def test_chunks_and_threads_change_nothing() -> None:
    value = torch.randn(2 * CHUNK_VALUES // 256 + 3, 256, generator=torch.Generator().manual_seed(0))
    whole = quantized(value, Q.Q4_K, threads=1)
    rows = np.concatenate([quantized(row[None], Q.Q4_K, threads=1) for row in value[-5:]])
    assert (whole[-5:] == rows).all()
    assert (quantized(value, Q.Q4_K, threads=3) == whole).all()


@pytest.mark.parametrize(
    ("scheme", "name", "shape", "tied", "wanted"),
    [
        ("q4_k_m", "blk.0.attn_q.weight", (256, 256), False, Q.Q4_K),
        ("q4_k_m", "blk.0.attn_v.weight", (256, 256), False, Q.Q6_K),  # first eighth
        ("q4_k_m", "blk.2.attn_v.weight", (256, 256), False, Q.Q4_K),
        ("q4_k_m", "blk.4.ffn_down.weight", (256, 256), False, Q.Q6_K),  # every third: 4 - 16 // 8 = 2
        ("q4_k_m", "blk.14.ffn_down.weight", (256, 256), False, Q.Q6_K),  # last eighth
        ("q4_k_m", "blk.0.attn_qkv.weight", (256, 256), False, Q.Q6_K),
        ("q4_k_m", "blk.0.ffn_up.weight", (256, 256), False, Q.Q4_K),
        ("q4_k_m", "output.weight", (256, 256), False, Q.Q6_K),
        ("q4_k_m", "token_embd.weight", (256, 256), False, Q.Q4_K),
        ("q4_k_m", "token_embd.weight", (256, 256), True, Q.Q6_K),
        ("q4_k_m", "blk.0.attn_norm.weight", (256,), False, Q.F32),
        ("q4_k_m", "blk.3.attn_q.weight", (256, 96), False, Q.Q5_0),  # rows of no whole block of 256
        ("q5_k_m", "blk.3.attn_q.weight", (256, 96), False, Q.Q5_1),
        ("q6_k", "blk.3.attn_q.weight", (256, 96), False, Q.Q8_0),
        ("q6_k", "blk.3.attn_q.weight", (256, 90), False, Q.F16),
        ("q8_0", "blk.3.attn_q.weight", (256, 90), False, Q.F16),
        ("q8_0", "output.weight", (256, 256), False, Q.Q8_0),
        ("q5_0", "output.weight", (256, 256), False, Q.Q6_K),
        ("f16", "blk.0.attn_q.bias", (256,), False, Q.F32),
    ],
)
def test_a_tensor_gets_the_type_that_llama_cpp_would_give_it(
    scheme: str, name: str, shape: tuple[int, ...], tied: bool, wanted: Q
) -> None:
    assert SCHEMES[scheme].type_of(name, shape, 16, tied) == wanted
