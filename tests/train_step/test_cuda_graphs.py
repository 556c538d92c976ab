"""Which sizes of pass are captured. The graphs themselves are held to the eager step in tests/gpu."""

from __future__ import annotations

from parley.train_step.cuda_graphs import CAPTURE_COST_TOKENS, GraphSizes


def test_a_size_larger_than_all_before_it_gets_a_graph_of_its_own() -> None:
    assert GraphSizes(128).choose(1300, []) == 1408
    assert GraphSizes(128).choose(1300, [1024, 1280]) == 1408


def test_a_size_goes_through_the_next_larger_graph_until_that_has_wasted_enough() -> None:
    sizes, captured = GraphSizes(128), [1024, 1536, 3072]
    chosen = [sizes.choose(1300, captured) for _ in range(CAPTURE_COST_TOKENS // 128 + 1)]
    assert chosen[:-1] == [1536] * (CAPTURE_COST_TOKENS // 128)
    assert chosen[-1] == 1408
    assert sizes.choose(1500, captured) == 1536  # its own: nothing is wasted


def test_a_graph_that_is_far_too_large_is_not_taken() -> None:
    assert GraphSizes(128).choose(1000, [4096]) == 1024
