"""Which sizes of pass are captured. The graphs themselves are held to the eager step in tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest

from parley.train_step.cuda_graphs import CAPTURE_COST_TOKENS, MAX_PADDING, GraphSizes, graph_sizes
from parley.training.determinism import deterministic_algorithms


def test_a_size_larger_than_all_before_it_gets_a_graph_of_its_own() -> None:
    assert GraphSizes(128).choose(1300, []) == 1408
    assert GraphSizes(128).choose(1300, [1024, 1280]) == 1408


def test_a_size_goes_through_the_next_larger_graph_until_that_has_wasted_enough() -> None:
    sizes, captured = GraphSizes(128), [1024, 1664, 3072]
    chosen = [sizes.choose(1300, captured) for _ in range(CAPTURE_COST_TOKENS // 256 + 1)]
    assert chosen[:-1] == [1664] * (CAPTURE_COST_TOKENS // 256)
    assert chosen[-1] == 1408
    assert sizes.choose(1600, captured) == 1664  # its own: nothing is wasted


def test_a_graph_that_is_a_few_percent_larger_is_as_good_as_one_of_its_own() -> None:
    sizes = GraphSizes(128)
    assert {sizes.choose(1300, [1536, 3072]) for _ in range(CAPTURE_COST_TOKENS)} == {1536}


def test_a_graph_that_is_far_too_large_is_not_taken() -> None:
    assert GraphSizes(128).choose(1000, [4096]) == 1024


def test_with_deterministic_algorithms_a_size_does_not_depend_on_what_was_captured_before() -> None:
    with deterministic_algorithms():
        assert GraphSizes(128).choose(1300, [1408, 1536, 3072]) == 1408
        assert GraphSizes(128).choose(1300, [1536, 3072]) == 1408
    assert GraphSizes(128).choose(1300, [1536, 3072]) == 1536


@pytest.mark.parametrize(("least", "most"), [(700, 5400), (100, 130), (3000, 9000)])
def test_what_is_captured_before_the_first_step_serves_nearly_every_step(least: int, most: int) -> None:
    tokens_N = np.linspace(least, most, 1000).astype(int)
    sizes = graph_sizes(tokens_N, 128, 8192)
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(size % 128 == 0 for size in sizes)
    assert sizes[0] <= 8192
    chosen = [GraphSizes(128).choose(tokens, sizes) for tokens in tokens_N[10:-10] if tokens <= 8192]
    assert set(chosen) <= set(sizes)
    assert all(
        size - tokens < 128 or size <= MAX_PADDING * tokens for size, tokens in zip(chosen, tokens_N[10:], strict=False)
    )


def test_where_sizes_were_captured_before_the_first_step_no_others_are() -> None:
    sizes = GraphSizes(128)
    sizes.prepared = True
    assert {sizes.choose(100, [4096, 1024]) for _ in range(CAPTURE_COST_TOKENS)} == {1024}
    assert sizes.choose(1025, [4096, 1024]) == 4096


def test_a_single_step_size_is_captured_once() -> None:
    assert graph_sizes(np.array([1890]), 128, 8192) == [1920]
    assert graph_sizes(np.array([100]), 128, 8192) == [128]
    assert graph_sizes(np.array([20_000]), 128, 8192) == [8192]
    assert graph_sizes(np.array([20]), 128, 64) == []
