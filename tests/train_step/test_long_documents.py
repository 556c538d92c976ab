"""The lengths that cuDNN's attention is given. The attention itself is held to autograd in tests/gpu."""

from __future__ import annotations

import numpy as np

from parley.train_step.long_documents import LONG_DOCUMENT, MAX_PLANS, padded_length, planned_lengths


def test_documents_are_padded_to_few_lengths_and_by_at_most_a_quarter() -> None:
    lengths = range(LONG_DOCUMENT, 40_000)
    padded = [padded_length(length) for length in lengths]
    assert all(length <= longer <= 1.25 * length for length, longer in zip(lengths, padded, strict=True))
    assert padded == sorted(padded)
    assert len(set(padded)) < 24
    assert [padded_length(length) for length in (3072, 3073, 3538, 4095, 32_768)] == [3072, 3584, 3584, 4096, 32_768]


def test_plans_are_made_for_the_lengths_of_the_data() -> None:
    assert planned_lengths(np.array([10, 4096, 3538, 4095, 3071])) == [4096, 3584]
    assert planned_lengths(np.array([10, 3000])) == []
    many = planned_lengths(np.arange(2049, 60_000))
    assert len(many) == MAX_PLANS
    assert many[0] > 16_384  # of the widest range
