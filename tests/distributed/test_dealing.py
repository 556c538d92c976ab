"""Documents are dealt out by tokens, the longest first."""

import numpy as np
import pytest

from parley.training.dealing import deal


def test_the_longest_go_first_to_the_process_with_the_least_tokens() -> None:
    assert deal([3, 9, 4, 5], 2) == [[0, 1], [2, 3]]
    assert deal([2, 9, 4, 6], 2) == [[0, 1], [2, 3]]
    assert deal([1, 9, 1, 1], 2) == [[1], [0, 2, 3]]
    assert deal([3, 9, 4, 5], 1) == [[0, 1, 2, 3]]
    assert deal([7], 3) == [[0], [], []]


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_every_document_is_dealt_once_and_shares_are_even(count: int) -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(10, 2000, 64)]
    shares = deal(lengths, count)
    assert sorted(index for share in shares for index in share) == list(range(64))
    tokens = [sum(lengths[index] for index in share) for share in shares]
    assert max(tokens) <= 1.05 * sum(lengths) / count
