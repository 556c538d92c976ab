"""Preference formats are recognised, said and rendered; malformed rows are refused in one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from parley.config import DataSection
from parley.data.example import Example
from parley.data.preference_recognition import recognise_preferences
from parley.data.preferences import Kind, prepare_preferences, render_preferences
from parley.data.render import render_example
from parley.errors import DataError, UsageError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED, GOOD, BAD = "Name a fish.", "Cod", "A horse is a fish"
PROMPT = [user(ASKED)]
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("preference pairs", {"prompt": PROMPT, "chosen": [said(GOOD)], "rejected": [said(BAD)]}),
    ("preference pairs", {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}),
    ("preference pairs", {"chosen": [*PROMPT, said(GOOD)], "rejected": [*PROMPT, said(BAD)]}),
    ("preference pairs", {"prompt": ASKED, "chosen": [*PROMPT, said(GOOD)], "rejected": [*PROMPT, said(BAD)]}),
    ("preference pairs", {"prompt": ASKED, "chosen": [said(GOOD)], "rejected": [said(BAD)]}),
    ("preference pairs", {"prompt": PROMPT, "chosen": [*PROMPT, said(GOOD)], "rejected": [*PROMPT, said(BAD)]}),
    (
        "ShareGPT ranking",
        {
            "conversations": [{"from": "human", "value": ASKED}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    ("Alpaca comparison", {"instruction": "Name a fish.", "input": "", "chosen": GOOD, "rejected": BAD}),
    ("Alpaca comparison", {"question": "Name a fish.", "chosen": GOOD, "rejected": BAD}),
    ("Alpaca comparison", {"input": ASKED, "chosen": GOOD, "rejected": BAD}),
    (
        "preference pairs",
        {"prompt": ASKED, "messages": [*PROMPT, said(GOOD)], "score_chosen": 8.5}
        | {"chosen": [*PROMPT, said(GOOD)], "rejected": [*PROMPT, said(BAD)]},
    ),
    ("Alpaca comparison (output as a list)", {"instruction": "Name a fish.", "output": [GOOD, BAD]}),
]


@pytest.mark.parametrize(("label", "row"), FORMATS)
def test_every_format_gives_the_same_pair(label: str, row: dict[str, Any], tiny_tokenizer: Any) -> None:
    data = DataSection(bad_rows="error")
    rows, summary = render_preferences(Dataset.from_list([row]), tiny_tokenizer, data, 512, kind="pairs", where="train")
    assert summary.reason.startswith(f"{label} (columns ")
    for side, answer in (("chosen", GOOD), ("rejected", BAD)):
        expected = render_example(tiny_tokenizer, Example("", prompt=PROMPT, completion=[said(answer)]))
        assert rows[0][f"{side}_input_ids"] == expected.input_ids
        supervised = [token != -100 for token in rows[0][f"{side}_labels"]]
        assert supervised == list(map(bool, expected.mask))


def test_system_and_tools_are_part_of_both_prompts(tiny_tokenizer: Any) -> None:
    row = {"instruction": ASKED, "chosen": GOOD, "rejected": BAD, "system": "Be short."}
    rows, _ = render_preferences(
        Dataset.from_list([row]), tiny_tokenizer, DataSection(), 512, kind="pairs", where="train"
    )
    for side in ("chosen", "rejected"):
        assert "Be short." in tiny_tokenizer.decode(rows[0][f"{side}_input_ids"])


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, "pairs"),
        ({"prompt": ASKED, "completion": GOOD, "label": True}, "labelled"),
    ],
)
@pytest.mark.parametrize("system", [{"system": "Be short."}, {}])
def test_a_prompt_of_text_with_a_system_prompt_is_a_conversation(
    system: dict[str, Any], row: dict[str, Any], kind: Kind, tiny_tokenizer: Any
) -> None:
    data = DataSection(bad_rows="error", system=None if system else "Be short.")
    rows, _ = render_preferences(Dataset.from_list([row | system]), tiny_tokenizer, data, 512, kind=kind, where="train")
    prompt = [{"role": "system", "content": "Be short."}, *PROMPT]
    expected = render_example(tiny_tokenizer, Example("", prompt=prompt, completion=[said(GOOD)]))
    assert rows[0]["chosen_input_ids" if kind == "pairs" else "input_ids"] == expected.input_ids


def test_an_implicit_prompt_of_text_is_what_both_begin_with(tiny_tokenizer: Any) -> None:
    row = {"chosen": "Two and two is four", "rejected": "Two and two is five"}
    rows, _ = render_preferences(
        Dataset.from_list([row]), tiny_tokenizer, DataSection(), 512, kind="pairs", where="train"
    )
    labels = [token for token in rows[0]["chosen_labels"] if token != -100]
    assert "our" in tiny_tokenizer.decode(labels)
    assert "Two" not in tiny_tokenizer.decode(labels)


LABELLED: list[dict[str, Any]] = [
    {"prompt": PROMPT, "completion": [said(GOOD)], "label": True},
    {"messages": [*PROMPT, said(GOOD)], "label": True},
    {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GOOD}], "kto_tag": True},
    {"instruction": ASKED, "output": GOOD, "kto_tag": True},
    {"question": ASKED, "completion": GOOD, "label": True},
    {"completion": [*PROMPT, said(GOOD)], "label": True},
]


@pytest.mark.parametrize("row", LABELLED)
def test_every_labelled_format_gives_the_same_answer(row: dict[str, Any], tiny_tokenizer: Any) -> None:
    rows, _ = render_preferences(
        Dataset.from_list([row]), tiny_tokenizer, DataSection(), 512, kind="labelled", where="train"
    )
    expected = render_example(tiny_tokenizer, Example("", prompt=PROMPT, completion=[said(GOOD)]))
    assert rows[0]["input_ids"] == expected.input_ids
    assert rows[0]["desirable"] is True


@pytest.mark.parametrize("answers", [{"chosen": GOOD, "rejected": BAD}, {"output": [GOOD, BAD]}])
def test_earlier_turns_of_an_instruction_are_part_of_its_prompt(answers: dict[str, Any], tiny_tokenizer: Any) -> None:
    row = {"instruction": ASKED, "history": [["Hi", "Hello"]], **answers}
    rows, summary = render_preferences(
        Dataset.from_list([row]), tiny_tokenizer, DataSection(bad_rows="error"), 512, kind="pairs", where="train"
    )
    prompt = [user("Hi"), said("Hello"), *PROMPT]
    expected = render_example(tiny_tokenizer, Example("", prompt=prompt, completion=[said(BAD)]))
    assert rows[0]["rejected_input_ids"] == expected.input_ids
    assert not summary.unread


def test_pairs_become_two_labelled_answers(tiny_tokenizer: Any) -> None:
    row = {"prompt": PROMPT, "chosen": [said(GOOD)], "rejected": [said(BAD)]}
    rows, summary = render_preferences(
        Dataset.from_list([row]), tiny_tokenizer, DataSection(), 512, kind="labelled", where="train"
    )
    assert rows["desirable"][:] == [True, False]
    assert "each pair as two labelled answers" in summary.reason


PAIR = {"prompt": PROMPT, "chosen": [said(GOOD)], "rejected": [said(BAD)]}
MALFORMED: list[tuple[dict[str, Any], str]] = [
    (PAIR | {"chosen": None}, "'chosen' is missing; wanted an answer"),
    (PAIR | {"rejected": None}, "'rejected' is missing; wanted an answer"),
    (PAIR | {"rejected": []}, "'rejected' is empty; wanted an answer"),
    (PAIR | {"rejected": "text"}, "'chosen' is turns and 'rejected' is text; wanted both as text or both as turns"),
    (PAIR | {"rejected": [said(GOOD)]}, "chosen and rejected are the same; leave the row out, nothing is preferred"),
    (PAIR | {"chosen": [user("Why?")]}, "'chosen' ends with the user's turn; wanted an answer of the assistant"),
    (PAIR | {"chosen": [said(" ")]}, "'chosen' has no turn with text; wanted an answer of the assistant"),
    (PAIR | {"prompt": [said("Hi")]}, "the prompt ends with the assistant's turn; wanted a user's or a tool's"),
    (PAIR | {"prompt": [{"role": "system", "content": "Be short."}]}, "the prompt has no question"),
    (PAIR | {"chosen": 7}, "'chosen' is a number; wanted an answer as text or turns"),
    (PAIR | {"chosen": [{"role": "robot", "content": "Hi"}]}, "wanted one of system"),
    (PAIR | {"chosen": [said(GOOD) | {"weight": 0.5}]}, "has loss weights between 0 and 1, which preference losses do"),
    (PAIR | {"image": "cat.png"}, "has 'image'; Parley trains on text alone"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "has no prompt"),
    ({"chosen": [user("a"), said("b")], "rejected": [user("c"), said("d")]}, "begin with other turns"),
    ({"instruction": "", "chosen": "a", "rejected": "b"}, "'instruction' is empty; wanted a question"),
    ({"instruction": ASKED, "output": ["a", "b", "c"]}, "'output' has 3 entries; wanted two texts, the better first"),
    ({"conversations": [], "chosen": said("a"), "rejected": said("b")}, "'conversations' is empty; wanted turns"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED)
def test_a_malformed_pair_is_one_line(row: dict[str, Any], message: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        render_preferences([row], tiny_tokenizer, DataSection(bad_rows="error"), 512, kind="pairs", where="train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "row 1" in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [("yes", "'label' is 'yes'; wanted true or false"), (None, "'label' is missing; wanted true or false")],
)
def test_a_label_is_true_or_false(value: Any, message: str, tiny_tokenizer: Any) -> None:
    row = {"prompt": PROMPT, "completion": [said(GOOD)], "label": value}
    with pytest.raises(DataError, match=message):
        render_preferences([row], tiny_tokenizer, DataSection(bad_rows="error"), 512, kind="labelled", where="train")


def test_rows_of_another_kind_are_refused_with_the_method_that_takes_them(tiny_tokenizer: Any) -> None:
    data = DataSection(bad_rows="error")
    with pytest.raises(DataError, match=r"set training\.method: kto"):
        render_preferences(LABELLED[:1], tiny_tokenizer, data, 512, kind="pairs", where="train")
    with pytest.raises(DataError, match=r"or set training\.method: sft"):
        render_preferences([{"messages": [user("a")]}], tiny_tokenizer, data, 512, kind="pairs", where="train")
    with pytest.raises(DataError, match="keep one format in a data set"):
        render_preferences([PAIR, LABELLED[0]], tiny_tokenizer, data, 512, kind="pairs", where="train")


@pytest.mark.parametrize(
    "settings",
    [{"format": "text"}, {"overlong": "split"}, {"train_on": "inputs"}],
)
def test_settings_of_supervised_data_are_refused(settings: dict[str, Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=f"data.{next(iter(settings))} is not followed with preferences"):
        render_preferences([PAIR], tiny_tokenizer, DataSection(**settings), 512, kind="pairs", where="train")


def test_an_overlong_answer_drops_or_cuts_its_pair(tiny_tokenizer: Any) -> None:
    long = PAIR | {"rejected": [said("very long " * 40)]}
    rows, summary = render_preferences([PAIR, long], tiny_tokenizer, DataSection(), 60, kind="pairs", where="train")
    assert len(rows) == 1
    assert "1 longer than 60 tokens" in summary.dropped_line()
    rows, _ = render_preferences(
        [PAIR, long], tiny_tokenizer, DataSection(overlong="truncate"), 60, kind="pairs", where="train"
    )
    assert len(rows[1]["rejected_input_ids"]) == 60


def test_bad_rows_are_skipped_and_counted_and_rows_held_out(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [PAIR | {"prompt": [user(f"Question {index}?")]} for index in range(20)]
    rows[3] = PAIR | {"rejected": [said(GOOD)]}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare_preferences(DataSection(source=str(path), heldout_rows=2), tiny_tokenizer, 512, "pairs")
    assert prepared.summary.bad.count == 1
    assert "pairs.jsonl line 4: chosen and rejected are the same" in prepared.summary.bad_error
    assert prepared.heldout is not None
    assert (len(prepared.train), len(prepared.heldout)) == (17, 2)
    assert prepared.heldout_examples[0].messages is not None


def test_supervised_rows_are_no_preferences() -> None:
    for row in ({"messages": PROMPT}, {"instruction": "a", "output": "b"}, {"text": "a"}):
        assert recognise_preferences(row, "row 1", DataSection()) is None


def test_swapped_repeated_and_biased_pairs_are_said(tiny_tokenizer: Any) -> None:
    rows = [
        PAIR
        | {"prompt": [user(f"Question {index}?")], "chosen": [said("a long and wordy answer")]}
        | {"rejected": [said("No")]}
        for index in range(20)
    ]
    _, summary = render_preferences(rows, tiny_tokenizer, DataSection(), 512, kind="pairs", where="train")
    assert any(
        line.startswith("length bias: pairs whose chosen answer is the longer one: 20") for line in summary.lines()
    )
    swapped = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    _, summary = render_preferences(
        [PAIR, swapped, PAIR], tiny_tokenizer, DataSection(), 512, kind="pairs", where="train"
    )
    lines = summary.lines()
    assert any("swapped pairs" in line and "train row 2" in line.replace("rows", "row") for line in lines)
    assert any("rows that repeat an earlier one: 1" in line for line in lines)
    assert not any("length bias" in line for line in lines)
