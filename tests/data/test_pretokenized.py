"""Rows that bring their token ids: which tokens are supervised, and which rows fit no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parley.config import DataSection
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.prepare import Prepared, prepare
from parley.data.recognition import recognise
from parley.errors import DataError

IDS = [5, 6, 7, 8]


def parsed(**row: Any) -> tuple[list[int] | None, list[int] | None]:
    example = recognise([("row 1", row)], DataSection()).example(row, "row 1")
    return example.input_ids, example.labels


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({}, IDS),
        ({"labels": [IGNORE_INDEX, IGNORE_INDEX, 7, 8]}, [IGNORE_INDEX, IGNORE_INDEX, 7, 8]),
        ({"assistant_masks": [0, 0, 1, 1]}, [IGNORE_INDEX, IGNORE_INDEX, 7, 8]),
        ({"completion_mask": [False, False, True, True]}, [IGNORE_INDEX, IGNORE_INDEX, 7, 8]),
        ({"labels": [IGNORE_INDEX, 6, 7, 8], "assistant_mask": [1, 0, 1, 1]}, [IGNORE_INDEX, IGNORE_INDEX, 7, 8]),
        ({"attention_mask": [1, 1, 1, 1]}, IDS),
    ],
)
def test_labels_come_from_labels_or_a_mask(more: Any, labels: list[int]) -> None:
    assert parsed(input_ids=IDS, **more) == (IDS, labels)


def test_padding_is_removed() -> None:
    labels = [IGNORE_INDEX, 6, 7, IGNORE_INDEX]
    assert parsed(input_ids=IDS, labels=labels, attention_mask=[0, 1, 1, 0]) == ([6, 7], [6, 7])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": []}, "field 'input_ids' is [], wanted a list of token ids"),
        ({"input_ids": "5 6"}, "wanted a list of token ids"),
        ({"input_ids": [5, -1]}, "holds -1, wanted token ids"),
        ({"input_ids": [5, True]}, "holds True"),
        ({"input_ids": [5, 2**40]}, "wanted token ids"),
        ({"input_ids": IDS, "labels": [6, 7, 8, IGNORE_INDEX]}, "label 1 is 6 where the token is 5"),
        ({"input_ids": IDS, "labels": [5, 6]}, "has 2 entries, where the row has 4 token ids"),
        ({"input_ids": IDS, "assistant_masks": [0, 1, 2, 0]}, "holds more than zeros and ones"),
        ({"input_ids": IDS, "labels": "all"}, "wanted a list of whole numbers"),
    ],
)
def test_other_rows_are_refused(row: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parsed(**row)
    assert said in str(caught.value)


@pytest.fixture
def prepared(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    def of(*rows: Any, **settings: Any) -> Prepared:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare(DataSection(source=str(path), heldout_rows=0, **settings), tiny_tokenizer, 8)

    return of


def test_they_go_to_the_trainer_as_they_are(prepared: Any) -> None:
    rows = [{"input_ids": IDS, "labels": [IGNORE_INDEX, 6, 7, 8]}, {"input_ids": list(range(5, 14))}]
    data = prepared(*rows)
    assert data.train.remove_columns("origin")[:] == {"input_ids": [IDS], "labels": [[IGNORE_INDEX, 6, 7, 8]]}
    assert data.summary.format == "tokens"
    assert data.summary.dropped["longer than 8 tokens"].first == ["rows.jsonl line 2"]
    assert data.summary.supervised_tokens == 3


def test_an_id_beyond_the_vocabulary_is_refused(prepared: Any, tiny_tokenizer: Any) -> None:
    size = len(tiny_tokenizer)
    assert len(prepared({"input_ids": [5, size - 1]}).train) == 1
    with pytest.raises(DataError, match=f"token id {size} is not in the model's vocabulary of {size}"):
        prepared({"input_ids": [5, size]})
