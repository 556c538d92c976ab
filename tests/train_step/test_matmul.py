"""FusedMatrix products of a step against torch.matmul."""

import pytest
import torch

from parley.train_step.matmul import copy_if_elsewhere, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["whole", "transposed", "slice", "transposed slice"])
def test_writes_the_product_into_a_slice(dtype: torch.dtype, bias: bool, form: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(24, 19, dtype=dtype)
    weight_NK = {
        "whole": wide,
        "transposed": wide.t(),
        "slice": wide[:, :7],
        "transposed slice": wide[:, :7].t(),
    }[form]
    out_features, in_features = weight_NK.shape
    x_TK = torch.randn(5, in_features + 3, dtype=dtype)[:, :in_features]
    bias_N = torch.randn(out_features, dtype=dtype) if bias else None
    room = torch.zeros(5, out_features + 2, dtype=dtype)
    out_TN = room[:, :out_features]
    assert copy_if_elsewhere(linear(x_TK, weight_NK, out_TN, bias_N), out_TN) is out_TN
    wanted = x_TK.float() @ weight_NK.float().t() + (0 if bias_N is None else bias_N.float())
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(out_TN.float(), wanted, rtol=tolerance, atol=tolerance)
    assert not room[:, out_features:].any()


def test_what_is_in_its_place_is_not_copied() -> None:
    room = torch.zeros(3, 4)
    version = room._version
    assert copy_if_elsewhere(room[:, :2], room[:, :2]).data_ptr() == room.data_ptr()
    assert room._version == version
    assert copy_if_elsewhere(torch.ones(3, 2), room[:, :2]).sum() == 6
    assert room.sum() == 6
