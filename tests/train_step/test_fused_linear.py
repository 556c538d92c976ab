"""The two forms of a product's matrix, and what they take."""

from typing import Any

import pytest
import torch

from parley.train_step import reference_ops as reference
from parley.train_step.fused_linear import Matrices, Matrix
from parley.train_step.matmul import takes_whole_weights

CPU = torch.device("cpu")


def filled(linear: Any, *, apart: bool) -> Matrix:
    matrix = linear.empty_matrix(torch.float32, CPU, apart=apart)
    linear.fill_base(matrix, reference)
    linear.fill_adapters(matrix, reference)
    return matrix


def test_two_halves_say_what_one_matrix_says(bound: Any) -> None:
    for linear in bound.linears:
        one, two = (filled(linear, apart=apart) for apart in (False, True))
        assert one.shape == two.shape == linear.matrix_shape
        assert torch.equal(one.across_NKP, two.across_NKP)
        assert torch.equal(one.down_NPK, two.down_NPK)
        assert two.across_NKP.is_contiguous()
        assert two.down_NPK.is_contiguous()


@pytest.mark.parametrize("apart", [True, False])
def test_elements_are_those_of_the_memory_it_takes(bound: Any, apart: bool) -> None:
    for linear in bound.linears:
        matrix = linear.empty_matrix(torch.float32, CPU, apart=apart)
        storages = {
            half.untyped_storage().data_ptr(): half.untyped_storage().nbytes()
            for half in (matrix.across_NKP, matrix.down_NPK)
        }
        assert len(storages) == 1 + apart
        assert sum(storages.values()) == 4 * linear.matrix_elements(apart=apart)


def test_kept_matrices_follow_the_adapters(bound: Any) -> None:
    matrices = Matrices(bound.linears, 4, reference, torch.float32, CPU)
    assert matrices.apart == takes_whole_weights(torch.float32, CPU)
    matrices.keep()
    bound.flat.weight_G.data.normal_()
    matrices.refresh()
    for linear in bound.linears:
        assert torch.equal(matrices[linear].across_NKP, filled(linear, apart=True).across_NKP)
        assert torch.equal(matrices[linear].down_NPK, filled(linear, apart=True).down_NPK)
        linear.matrix = None
