from __future__ import annotations

from typing import Any

import pytest
import torch

from parley.data.packing import IGNORE_INDEX, PackedCollator, split_by_tokens, split_documents


def test_documents_become_one_row_with_positions_that_restart() -> None:
    batch = PackedCollator()(
        [{"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    # The first token of a document is nobody's continuation.
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5]]


def test_documents_of_a_row_do_not_see_each_other(family_folder: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(10, 200, (length,), generator=generator).tolist() for length in (7, 1, 12, 5)]
    batch = PackedCollator()([{"input_ids": ids, "labels": ids} for ids in documents])
    with torch.no_grad():
        packed_TV = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone_TV = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in documents])
    torch.testing.assert_close(packed_TV, alone_TV, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "runs"),
    [
        ([3, 4, 9], 100, [[3, 4, 9]]),
        ([3, 4, 9], 7, [[3, 4], [9]]),  # exactly full is full, not over
        ([3, 4, 9], 1, [[3], [4], [9]]),
        ([9, 3, 8, 2], 8, [[9], [3], [8], [2]]),
        ([], 7, []),
    ],
)
def test_a_split_by_tokens_keeps_order_and_never_cuts_a_document(
    lengths: list[int], max_tokens: int, runs: list[list[int]]
) -> None:
    assert [lengths[run] for run in split_by_tokens(lengths, max_tokens)] == runs


def test_rows_are_split_only_between_documents() -> None:
    lengths = [3, 4, 2, 9, 1, 1]
    batch = PackedCollator()([{"input_ids": [n] * n, "labels": [n] * n} for n in lengths])
    parts = split_documents(batch, max_tokens=7)
    assert [part["input_ids"].shape[1] for part in parts] == [7, 2, 9, 2]
    for name, row_1T in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), row_1T)
    assert all(part["position_ids"][0, 0] == 0 for part in parts)
    assert len(split_documents(batch, max_tokens=20)) == 1
