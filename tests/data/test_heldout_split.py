"""A share of the data held out by a hash of each conversation: which rows, and that they stay there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from parley.config import RunConfig
from parley.data.example import Example
from parley.data.heldout_split import conversation_digest, is_heldout
from parley.data.prepare import STREAM_HELDOUT, Prepared, prepare
from parley.errors import DataError, UsageError


def conversation(number: int) -> dict[str, Any]:
    turns = [("user", f"What be {number}?"), ("assistant", f"It be {2 * number}, matey.")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, tokenizer: Any, **data: Any) -> Prepared:
    streaming = {"training": {"max_steps": 1}} if data.get("streaming") else {}
    config = RunConfig.create({"data": {"source": str(path), **data}, **streaming})
    return prepare(config.data, tokenizer, 256)


def asked(made: Prepared) -> set[str]:
    return {(example.messages or [])[-2]["content"] for example in made.heldout_examples}


def test_a_share_is_about_that_share(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation(number) for number in range(400)])
    made = prepared(path, tiny_tokenizer, heldout="10%")
    assert made.heldout is not None
    assert len(made.heldout) + len(made.train) == 400
    assert 20 <= len(made.heldout) <= 60
    line = f"{len(made.heldout)} held out from 10% of the conversations, split by their hash"
    assert line in " ".join(made.summary.lines())


def test_a_row_stays_on_its_side_when_the_data_grows_and_is_shuffled(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [conversation(number) for number in range(200)]
    small = asked(prepared(write(tmp_path / "a.jsonl", rows[:120]), tiny_tokenizer, heldout="10%"))
    random.Random(0).shuffle(rows)
    large = asked(prepared(write(tmp_path / "b.jsonl", rows), tiny_tokenizer, heldout="10%"))
    of_the_first = {f"What be {number}?" for number in range(120)}
    assert small
    assert large & of_the_first == small
    assert large - of_the_first  # new rows are split as well
    assert small < asked(prepared(tmp_path / "a.jsonl", tiny_tokenizer, heldout="30%"))  # a larger share contains it


def test_duplicates_are_on_one_side(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [conversation(number % 40) for number in range(120)]
    made = prepared(write(tmp_path / "rows.jsonl", rows), tiny_tokenizer, heldout="20%")
    assert len(made.heldout_examples) == 3 * len(asked(made))
    assert made.summary.heldout_repeated == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Example("1", text="Ahoy  there\n"), Example("2", text="Ahoy there"), True),
        (Example("1", text="Ahoy"), Example("1", text="ahoy!"), False),
        (
            Example("1", prompt="Hi", completion="Ahoy"),
            Example("1", messages=[{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Ahoy"}]),
            True,
        ),
        (  # a system turn, as data.system adds one, and loss weights do not move a conversation
            Example("1", messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]),
            Example("1", messages=[{"role": "user", "content": "Hi", "weight": 0.5}]),
            True,
        ),
        (
            Example("1", messages=[{"role": "user", "content": "Hi"}]),
            Example("1", messages=[{"role": "assistant", "content": "Hi"}]),
            False,
        ),
        (
            Example("1", prompt=[{"role": "user", "content": "a"}], completion=[{"role": "assistant", "content": "b"}]),
            Example("1", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
            True,
        ),
        (
            Example("1", messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]),
            Example("1", messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "b"}]}]),
            False,
        ),
        (Example("1", input_ids=[1, 2], labels=[1, 2]), Example("1", input_ids=[1, 2], labels=[-100, 2]), True),
        (Example("1", input_ids=[1, 2], labels=[1, 2]), Example("1", input_ids=[1, 3], labels=[1, 3]), False),
        (Example("1", text="So \ud83d?"), Example("1", text="So \ud83d?"), True),  # a lone surrogate
    ],
)
def test_what_makes_two_rows_one_conversation(one: Example, other: Example, same: bool) -> None:
    assert (conversation_digest(one) == conversation_digest(other)) == same


def test_the_split_is_the_same_on_every_machine_and_day() -> None:
    """Fixed for good: a run folder says 5%, and `parley eval` finds its held-out rows by it."""
    chosen = [number for number in range(60) if is_heldout(Example("x", text=f"row {number}"), 0.1)]
    assert chosen == CHOSEN


CHOSEN = [9, 19, 20, 26, 56, 58, 59]


def test_a_stream_trains_on_no_row_of_the_share(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [conversation(number) for number in range(150)]
    path = write(tmp_path / "rows.jsonl", rows)
    whole = prepared(path, tiny_tokenizer, heldout="20%")
    stream = prepared(path, tiny_tokenizer, heldout="20%", streaming=True)
    assert asked(stream) == asked(whole)
    assert len(asked(whole)) < STREAM_HELDOUT
    trained = [row["input_ids"] for row in stream.train]
    assert trained == [list(row["input_ids"]) for row in whole.train]
    assert "none trained on" in " ".join(stream.summary.lines())


@pytest.mark.parametrize("share", ["0%", "100%", "-5%", "250 %"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(UsageError, match=r"data\.heldout: got .*more than 0% and less than 100%"):
        RunConfig.create({"data": {"source": "rows.jsonl", "heldout": share}})


def test_a_number_without_its_sign_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.heldout: got 0\.05; .*such as 5%"):
        RunConfig.create({}, ["data.heldout=0.05"])


def test_a_share_of_no_rows_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation(1), conversation(2)])
    with pytest.raises(DataError, match=r"data\.heldout 0\.01%: none of the 2 rows"):
        prepared(path, tiny_tokenizer, heldout="0.01%")
    with pytest.raises(DataError, match="nothing left to train on"):
        prepared(path, tiny_tokenizer, heldout="99.999%")
