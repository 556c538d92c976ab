"""Documents of a batch, and the padding-free row of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import DOCUMENTS, DocumentCollator, padding_free_row, split_by_tokens


def row_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return padding_free_row(DocumentCollator()(rows)[DOCUMENTS])


@pytest.mark.parametrize(
    "rows",
    [
        [{"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}],
        [{"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE_INDEX, 2, 3, 4, 5], "seq_lengths": [3, 2]}],
    ],
    ids=["rows", "a row that TRL packed"],
)
def test_documents_become_one_row_with_positions_that_restart(rows: list[dict[str, Any]]) -> None:
    documents = DocumentCollator()(rows)[DOCUMENTS]
    assert [document.ids_L.tolist() for document in documents] == [[1, 2, 3], [4, 5]]
    assert [document.label_L.tolist() for document in documents] == [[IGNORE_INDEX, 2, 3], [4, 5]]
    row = padding_free_row(documents)
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    # The first token of a document continues nothing.
    assert row["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5]]
    assert documents[1].label_L.tolist() == [4, 5]


def test_documents_of_a_row_do_not_see_each_other(family_folder: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(10, 200, (length,), generator=generator).tolist() for length in (7, 1, 12, 5)]
    batch = row_of([{"input_ids": ids, "labels": ids} for ids in documents])
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


def test_a_split_counts_tokens_exactly() -> None:
    assert split_by_tokens([3, 5], 7) == [slice(0, 1), slice(1, 2)]
    assert split_by_tokens([5, 3, 3, 2], 7) == [slice(0, 1), slice(1, 3), slice(3, 4)]
