"""Linear layers and the norm of decoding: each layout of the weights against the product written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parley.inference.linear import DecodeLinear
from parley.inference.model import DecoderModel
from parley.train_step import reference_ops as reference
from parley.train_step.fused_linear import BaseWeight, DenseWeight, FusedLinear
from parley.train_step.ops import Adapter, RmsNorm

CPU = torch.device("cpu")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("sizes", [(24,), (24, 8, 16)])
@pytest.mark.parametrize("layout", ["by projection", "fused", "packed"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_decode_linear_is_its_formula_in_every_layout(
    rows: int, sizes: tuple[int, ...], layout: str, bias: bool
) -> None:
    if layout == "packed" and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN in this torch")
    weights = [randn(size, 16, seed=size) for size in sizes]
    bases: list[BaseWeight] = [DenseWeight(weight) for weight in weights]
    a_RK, b_NR = randn(4, 16, seed=1), randn(sizes[0], 4, seed=2)
    adapters = [Adapter(a_RK, b_NR, a_RK, b_NR, 0.5), *[None] * (len(sizes) - 1)]
    bias_N = randn(sum(sizes), seed=3) if bias else None
    linear = DecodeLinear(FusedLinear(bases, adapters, bias_N), reference, torch.float32, CPU)
    if layout != "by projection" and linear.weight_NK is None:
        linear.fuse()
    if layout == "packed":
        linear.pack()
    x_TK, h_TN = randn(rows, 16, seed=4), randn(rows, sum(sizes), seed=5)
    adapter_T1 = (torch.arange(rows)[:, None] % 2 == 0).float()
    base_TN = functional.linear(x_TK, torch.cat(weights), bias_N)
    lora_TN = functional.pad(0.5 * x_TK @ a_RK.t() @ b_NR.t(), (0, sum(sizes[1:]))) * adapter_T1
    torch.testing.assert_close(linear(x_TK, None), base_TN, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear(x_TK, adapter_T1), base_TN + lora_TN, rtol=1e-4, atol=1e-5)
    total_TN = h_TN + base_TN + lora_TN
    linear.add_to(h_TN, x_TK, adapter_T1)
    torch.testing.assert_close(h_TN, total_TN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])  # an epsilon of 1e-5 matters for the smaller two
def test_the_norm_of_decoding_is_pytorchs(dtype: torch.dtype, scale: float) -> None:
    x_TD, weight_D = (scale * randn(3, 20, seed=0)).to(dtype), randn(20, seed=1).to(dtype)
    weights = SimpleNamespace(norm=RmsNorm(weight_D, 1e-5), device=CPU)
    model = DecoderModel(weights, [], None, {}, reference)  # type: ignore[arg-type]
    torch.testing.assert_close(model._norm(x_TD, weights.norm), functional.rms_norm(x_TD, (20,), weight_D, 1e-5))
