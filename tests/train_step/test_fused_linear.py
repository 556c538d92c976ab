"""The two forms of a product's matrix, and what they take."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from parley.train_step import reference_ops as reference
from parley.train_step.fused_linear import Dropout, FusedLinear, FusedMatrix, FusedMatrixCache
from parley.train_step.matmul import uses_onednn

CPU = torch.device("cpu")


def filled(linear: Any, *, contiguous: bool) -> FusedMatrix:
    matrix = linear.allocate(torch.float32, CPU, contiguous=contiguous)
    linear.fill_base(matrix, reference)
    linear.fill_adapters(matrix, reference)
    return matrix


def test_two_halves_say_what_one_matrix_says(bound: Any) -> None:
    for linear in bound.linears:
        one, two = (filled(linear, contiguous=contiguous) for contiguous in (False, True))
        assert one.shape == two.shape == linear.matrix_shape
        assert torch.equal(one.forward_NKP, two.forward_NKP)
        assert torch.equal(one.backward_NPK, two.backward_NPK)
        assert two.forward_NKP.is_contiguous()
        assert two.backward_NPK.is_contiguous()


@pytest.mark.parametrize("contiguous", [True, False])
def test_elements_are_those_of_the_memory_it_takes(bound: Any, contiguous: bool) -> None:
    for linear in bound.linears:
        matrix = linear.allocate(torch.float32, CPU, contiguous=contiguous)
        storages = {
            half.untyped_storage().data_ptr(): half.untyped_storage().nbytes()
            for half in (matrix.forward_NKP, matrix.backward_NPK)
        }
        assert len(storages) == 1 + contiguous
        assert sum(storages.values()) == 4 * linear.matrix_numel(contiguous=contiguous)


def test_kept_matrices_follow_the_adapters(bound: Any) -> None:
    matrices = FusedMatrixCache(bound.linears, 4, reference, torch.float32, CPU)
    assert matrices.contiguous == uses_onednn(torch.float32, CPU)
    matrices.allocate_all()
    bound.flat.weight_Z.data.normal_()
    matrices.refresh_adapters()
    for linear in bound.linears:
        assert torch.equal(matrices[linear].forward_NKP, filled(linear, contiguous=True).forward_NKP)
        assert torch.equal(matrices[linear].backward_NPK, filled(linear, contiguous=True).backward_NPK)
        linear.matrix = None


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_padding_of_the_lora_columns_is_zero_whatever_the_memory_held(
    bound: Any, contiguous: bool, dropout: bool
) -> None:
    """On a GPU ranks are padded to 64 columns. NaN left there would spread: zero times NaN is NaN."""
    source = bound.linears[0]
    adapters = [None if adapter is None else replace(adapter, dropout=0.5 * dropout) for adapter in source.adapters]
    linear = FusedLinear(source.bases, adapters, rank_multiple=16)
    rank = source.lora_columns
    assert linear.lora_columns == 16 > rank
    matrix = linear.allocate(torch.float32, CPU, contiguous=contiguous)
    matrix.forward_NKP.fill_(torch.nan)
    matrix.backward_NPK.fill_(torch.nan)
    linear.fill_base(matrix, reference)
    linear.fill_adapters(matrix, reference)
    assert not matrix.forward_NKP[:, linear.in_features + rank :].any()
    assert not matrix.backward_NPK[linear.out_features + rank :].any()
    x_TKP = torch.full((3, linear.in_features + 16), torch.nan)
    x_TKP[:, : linear.in_features] = torch.arange(linear.in_features)
    scratch = torch.full_like(x_TKP, torch.nan)
    linear.lora_down(matrix, x_TKP, Dropout(reference, torch.tensor(0), scratch) if dropout else None)
    assert torch.isfinite(linear.forward(matrix, x_TKP, torch.empty(3, linear.out_features), reference)).all()
