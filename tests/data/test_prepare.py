"""From a source to ids and labels: what is kept, cut, dropped, held out and said about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from parley.config import DataSection
from parley.data.filtering import BATCH
from parley.data.packing import IGNORE_INDEX
from parley.data.prepare import FEATURES, Prepared, prepare, read_examples, render_rows
from parley.data.render import AS_TEXT, render, render_example
from parley.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "dolly_pirate_13k.jsonl"
LONG = "long " * 200


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def dolly(n: int) -> dict[str, Any]:
    return {"instruction": f"question {n}?", "context": "", "response": f"answer {n}."}


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.fixture
def prepared(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """`prepared(rows, **settings)`: rows written to rows.jsonl and prepared, nothing held out unless asked for."""

    def of(rows: list[Any], max_length: int = 512, **settings: Any) -> Prepared:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = DataSection(**({"source": str(path), "heldout_rows": 0, "bad_rows": "error"} | settings))
        return prepare(section, tiny_tokenizer, max_length)

    return of


def refused(prepared: Any, *args: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepared(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_are_the_rendered_ids_and_their_learned_labels(prepared: Any, tiny_tokenizer: Any) -> None:
    data = prepared([dolly(1), dolly(2)], system="You are an assistant")
    assert data.train.features == FEATURES
    said = [turn("system", "You are an assistant"), turn("user", "question 2?"), turn("assistant", "answer 2.")]
    expected = render(tiny_tokenizer, said)
    row = data.train[1]
    assert row["input_ids"] == tiny_tokenizer.apply_chat_template(said)["input_ids"] == expected.input_ids
    learned = [id for id in row["labels"] if id != IGNORE_INDEX]
    assert tiny_tokenizer.decode(learned) == "answer 2.<|eot_id|>"
    assert data.preview[1] == expected
    assert data.preview_origins == ["rows.jsonl line 1", "rows.jsonl line 2"]


def test_the_summary_counts_and_says_everything(prepared: Any) -> None:
    rows = [
        dolly(1),
        dolly(2),
        dolly(2),
        dolly(3) | {"response": " "},
        dolly(4) | {"context": LONG},
        dolly(5) | {"context": LONG},
        dolly(6) | {"instruction": "what is <|eot_id|>?"},
    ]
    summary = prepared(rows, max_length=200).summary
    assert (summary.format, summary.rows, summary.kept, summary.heldout) == ("dolly", 7, 4, 0)
    assert {reason: group.count for reason, group in summary.dropped.items()} == {
        "without an assistant turn": 1,
        "longer than 200 tokens": 2,
    }
    assert summary.repeated.first == ["rows.jsonl line 3"]
    assert summary.notes[AS_TEXT].first == ["rows.jsonl line 7"]
    assert summary.length_max >= summary.length_p95 >= summary.length_median > 0
    assert summary.length_mean == summary.tokens / 4
    said = "\n".join(summary.lines())
    assert f"7 rows read from {summary.source}: Dolly (columns instruction, context, response)" in said
    assert "4 kept to train on, none held out" in said
    assert "3 dropped: 1 without an assistant turn (rows.jsonl line 4), 2 longer than 200 tokens" in said
    assert "(rows.jsonl lines 5, 6)" in said
    assert "rows that repeat an earlier one: 1 (rows.jsonl line 3)" in said
    assert "encoded as plain text: 1 (rows.jsonl line 7)" in said
    dumped = summary.model_dump(mode="json")
    assert json.loads(json.dumps(dumped))["length_max"] == summary.length_max


def test_supervised_tokens_are_the_targets_that_training_sees(prepared: Any) -> None:
    data = prepared([dolly(1), {**dolly(2), "context": "words"}])
    targets = [id for row in data.train for id in row["labels"][1:] if id != IGNORE_INDEX]
    assert data.summary.supervised_tokens == len(targets)
    assert data.summary.tokens == sum(len(row["input_ids"]) for row in data.train)


CHAT = [
    turn("system", "s"),
    turn("user", "q1"), turn("assistant", "first"),
    turn("user", "q2"), turn("assistant", "second"),
    turn("user", LONG), turn("assistant", "third"),
    turn("user", "q4"), turn("assistant", "fourth"),
]  # fmt: skip


@pytest.mark.parametrize(("turns", "fits"), [(9, 512), (5, 100), (3, 0)])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_overlong_rows_keep_whole_turns(
    prepared: Any, tiny_tokenizer: Any, turns: int, fits: int, train_on: Any
) -> None:
    expected = render(tiny_tokenizer, CHAT[:turns], train_on=train_on)
    max_length = len(expected.input_ids) + 5
    data = prepared([{"messages": CHAT}], max_length, overlong="keep-whole-turns", train_on=train_on)
    assert data.preview == [expected]
    assert data.train[0]["input_ids"] == expected.input_ids
    assert data.summary.shortened.count == (turns < len(CHAT))
    exact = prepared([{"messages": CHAT}], len(expected.input_ids), overlong="keep-whole-turns", train_on=train_on)
    assert exact.preview == [expected]


def test_a_row_ending_with_the_user_is_cut_only_when_too_long(prepared: Any, tiny_tokenizer: Any) -> None:
    open_end = [*CHAT[:5], turn("user", LONG)]
    expected = render(tiny_tokenizer, CHAT[:5])
    data = prepared([{"messages": open_end}], len(expected.input_ids), overlong="keep-whole-turns")
    assert data.preview == [expected]


def test_a_row_of_which_no_turn_fits_is_dropped(prepared: Any) -> None:
    rows = [{"messages": [turn("user", LONG), turn("assistant", "a")]}, {"messages": CHAT[1:3]}]
    data = prepared(rows, 100, overlong="keep-whole-turns")
    assert data.summary.dropped["longer than 100 tokens"].first == ["rows.jsonl line 1"]
    assert len(data.train) == 1


@pytest.mark.parametrize(
    ("overlong", "starts", "line"),
    [
        ("truncate", [0], "1 row cut to their first 60 tokens (line 1)"),
        ("truncate-start", [-60], "1 row cut to their last 60 tokens (line 1)"),
        ("split", range(0, 6000, 60), "1 row split into parts of at most 60 tokens (line 1)"),
    ],
)
def test_overlong_rows_are_cut_with_their_mask(
    prepared: Any, tiny_tokenizer: Any, overlong: str, starts: Iterable[int], line: str
) -> None:
    data = prepared([{"messages": CHAT}], 60, overlong=overlong)
    whole = render(tiny_tokenizer, CHAT)
    assert len(whole.input_ids) > 60
    labels = [token if kept else IGNORE_INDEX for token, kept in zip(whole.input_ids, whole.mask, strict=True)]
    wanted = [
        {"input_ids": whole.input_ids[start:][:60], "labels": labels[start:][:60]}
        for start in starts
        if any(label != IGNORE_INDEX for label in labels[start:][1:60])
    ]
    assert list(data.train.remove_columns("origin")) == wanted
    assert set(data.train["origin"]) == set(data.preview_origins)
    assert line.removesuffix("(line 1)") in "\n".join(data.summary.lines())
    assert data.summary.tokens == sum(len(row["input_ids"]) for row in wanted)


def test_overlong_rows_may_be_an_error(prepared: Any) -> None:
    message = refused(prepared, [dolly(1), dolly(2) | {"response": LONG}], 100, overlong="error")
    assert message.startswith("rows.jsonl line 2: ")
    assert "the longest allowed is 100; raise model.max_seq_length, or set data.overlong" in message


def test_text_and_prompt_completion(prepared: Any, tiny_tokenizer: Any) -> None:
    data = prepared([{"text": "words"}, {"text": "  "}])
    assert data.summary.dropped["without supervised tokens"].first == ["rows.jsonl line 2"]
    assert tiny_tokenizer.decode([id for id in data.train[0]["labels"] if id != IGNORE_INDEX]).startswith("words")
    data = prepared([{"prompt": "two and two is ", "completion": "four"}])
    assert tiny_tokenizer.decode([id for id in data.train[0]["labels"] if id != IGNORE_INDEX]).startswith("four")
    data = prepared([{"prompt": [*CHAT[1:3], turn("user", "q2")], "completion": [turn("assistant", "second")]}])
    assert tiny_tokenizer.decode([id for id in data.train[0]["labels"] if id != IGNORE_INDEX]) == "second<|eot_id|>"


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([dolly(1) | {"response": ""}], {}, "nothing left to train on; 1 dropped: 1 without an assistant turn"),
        ([{"messages": []}], {}, "1 without an assistant turn (rows.jsonl line 1)"),
        ([dolly(1)], {"max_length": 9}, "1 longer than 9 tokens (rows.jsonl line 1)"),
        ([dolly(1), {"text": "x"}], {}, "rows.jsonl line 2: is text, but rows.jsonl line 1 is Dolly"),
        ([dolly(1), dolly(2) | {"response": 5}], {}, "rows.jsonl line 2: field 'response' is a number (5)"),
        ([{"a": 1}], {}, "rows.jsonl line 1: got columns a; wanted"),
        (
            [dolly(1) | {"context": "<|begin_of_text|>"}],
            {"control_tokens": "tokens"},
            "rows.jsonl line 1: got <|begin_of_text|> inside",
        ),
    ],
)
def test_what_cannot_be_learned_is_named(prepared: Any, rows: Any, settings: Any, expected: str) -> None:
    for streaming in (False, True):
        assert expected in refused(prepared, rows, streaming=streaming, **settings)


def test_held_out_rows_are_the_same_each_time_and_at_most_a_tenth(prepared: Any, tiny_tokenizer: Any) -> None:
    rows = [dolly(n) for n in range(60)]
    data = prepared(rows, heldout_rows=64)
    again = prepared(rows, heldout_rows=64)
    assert len(data.heldout) == len(data.heldout_examples) == data.summary.heldout == 6
    assert data.summary.kept == len(data.train) == 54
    assert [example.origin for example in data.heldout_examples] == [e.origin for e in again.heldout_examples]
    assert [row["input_ids"] for row in data.heldout] == [
        render_example(tiny_tokenizer, example).input_ids for example in data.heldout_examples
    ]
    trained = {tuple(row["input_ids"]) for row in data.train}
    assert not trained & {tuple(row["input_ids"]) for row in data.heldout}
    places = [int(example.origin.split()[-1]) for example in data.heldout_examples]
    assert places != list(range(1, 7))
    assert len(prepared(rows, heldout_rows=2).heldout) == 2
    for none in (prepared(rows, heldout_rows=0), prepared(rows[:9], heldout_rows=64)):
        assert none.heldout is None
        assert none.heldout_examples == []


def test_a_second_source_is_held_out_whole(prepared: Any, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(dolly(n)) + "\n" for n in range(8, 20)))
    (folder / "train.jsonl").write_text(json.dumps(dolly(99) | {"response": ""}) + "\n")
    rows = [dolly(n) for n in range(10)]
    data = prepared(rows, heldout=f"{folder}#test", heldout_rows=64, limit=9)
    assert (len(data.train), len(data.heldout), len(data.heldout_examples)) == (9, 12, 12)
    assert data.summary.heldout_repeated == 1
    said = "\n".join(data.summary.lines())
    assert f"12 held out from {folder}#test" in said
    assert "held-out rows that are training rows as well: 1" in said
    assert "nothing left to evaluate on" in refused(prepared, rows, heldout=str(folder))


def test_streams_render_the_same_rows_as_files(prepared: Any) -> None:
    rows = [dolly(n) | {"response": "" if n % 7 == 3 else f"answer {n}."} for n in range(40)]
    data = prepared(rows, streaming=True, heldout_rows=5)
    kept = [row for n, row in enumerate(rows) if n % 7 != 3]
    assert isinstance(data.train, IterableDataset)
    assert [example.origin for example in data.heldout_examples] == [f"rows.jsonl line {n}" for n in (1, 2, 3, 5, 6)]
    for _ in range(2):
        seen = list(data.train)
        assert (data.summary.rows, data.summary.kept, data.summary.heldout) == (40, len(kept) - 5, 5)
        assert data.summary.dropped["without an assistant turn"].count == 6
    whole = prepared(kept[5:])
    assert [list(row["input_ids"]) for row in seen] == [row["input_ids"] for row in whole.train]
    assert [list(row["labels"]) for row in seen] == [row["labels"] for row in whole.train]
    assert "40 rows read so far" in data.summary.lines()[0]


def test_a_stream_is_read_only_as_far_as_needed(tiny_tokenizer: Any) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for n in range(101):
            yield dolly(n)
        raise AssertionError("read past row 100")

    stream = IterableDataset.from_generator(rows)
    train, summary = render_rows(stream, tiny_tokenizer, DataSection(), 512, where="train")
    assert len(list(train.take(50))) == 50
    assert 50 <= summary.rows < 101
    with pytest.raises(AssertionError, match="read past row 100"):
        list(train)


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
def test_rows_at_hand_are_rendered(tiny_tokenizer: Any, kind: str) -> None:
    rows: Any = [{"messages": [turn("user", f"q{n}"), turn("assistant", f"a{n}")]} for n in range(3)]
    if kind != "list":
        rows = Dataset.from_list(rows)
    if kind == "stream":
        rows = rows.to_iterable_dataset()
    train, summary = render_rows(rows, tiny_tokenizer, DataSection(), 512, where="train")
    assert len(list(train)) == 3
    assert summary.kept == 3
    with pytest.raises(DataError, match=r"^train row 2: "):
        render_rows([dolly(1), {"text": "x"}], tiny_tokenizer, DataSection(bad_rows="error"), 512, where="train")


def test_examples_come_in_order_and_unsifted(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,response\nq1,\nq2,a2\n")
    examples = list(read_examples(DataSection(source=str(path)))[1])
    assert [example.origin for example in examples] == ["rows.csv row 1", "rows.csv row 2"]
    assert examples[0].messages == [turn("user", "q1")]


@pytest.mark.skipif(not SHARED.exists(), reason="the real data set is not at hand")
def test_hundreds_of_real_rows(tiny_tokenizer: Any) -> None:
    section = DataSection(source=str(SHARED), limit=600)
    start = time.process_time()
    data = prepare(section, tiny_tokenizer, 100_000)
    assert time.process_time() - start < 20
    assert (data.summary.rows, data.summary.kept, data.summary.heldout) == (600, 540, 60)
    assert data.summary.dropped == {}


def test_rows_of_many_batches_keep_their_order(prepared: Any, tiny_tokenizer: Any) -> None:
    data = prepared([dolly(n) for n in range(3 * BATCH + 1)])
    ids = [row["input_ids"] for row in data.train]
    alone = [
        render(tiny_tokenizer, [turn("user", f"question {n}?"), turn("assistant", f"answer {n}.")])
        for n in range(3 * BATCH + 1)
    ]
    assert ids == [rendered.input_ids for rendered in alone]


def test_the_first_of_several_wrong_rows_is_the_one_named(prepared: Any) -> None:
    """The second one is met while the batch of the first is still being encoded."""
    rows: list[Any] = [dolly(n) for n in range(2 * BATCH)]
    rows[2]["response"] = "<|begin_of_text|>Ahoy."
    rows[BATCH + 2] = {"text": "of another format"}
    assert "line 3:" in refused(prepared, rows, control_tokens="tokens")
    rows[2] = dolly(2)
    assert f"line {BATCH + 3}:" in refused(prepared, rows)
