"""The doctor on preference pairs and labelled answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parley.config import DataSection
from parley.data.doctor.diagnose import diagnose, rows_to_drop
from parley.data.doctor.findings import Diagnosis
from parley.data.preferences import prepare_preferences
from parley.errors import DataError, UsageError

QUESTIONS = [
    "What is a fjord, and where are fjords found?",
    "How long does an egg boil until it is soft inside?",
    "Why does bread rise when it is left in a warm place?",
    "Which planet has the most moons that we know of?",
    "Who wrote the first dictionary of the English language?",
]


def pair(number: int, **changes: Any) -> dict[str, Any]:
    asked = QUESTIONS[number]
    chosen = f"Here is an honest answer about it, number {number}: {asked[::-1]}"
    rejected = f"That is nothing anyone would want to know, {number}: {asked.upper()}"
    return {"prompt": asked, "chosen": chosen, "rejected": rejected} | changes


def source(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> DataSection:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(source=str(path), **settings)


def found(diagnosis: Diagnosis) -> dict[str, list[int]]:
    return {f.check: [int(origin.split()[-1]) for origin in f.rows.first] for f in diagnosis.findings}


CLEAN = [pair(number) for number in range(3)]


def test_pairs_are_recognised_and_measured(tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = source(tmp_path, CLEAN)
    diagnosis = diagnose(data, tiny_tokenizer, 2048)
    assert diagnosis.findings == []
    assert (diagnosis.kind, diagnosis.rows) == ("pairs", 3)
    assert diagnosis.format == "preference pairs (columns prompt, chosen, rejected)"
    assert diagnosis.roles == {"user": 3, "assistant": 6}
    assert (diagnosis.turns.smallest, diagnosis.turns.largest) == (2, 2)
    assert diagnosis.characters.total == sum(len(text) for row in CLEAN for text in row.values())
    prepared = prepare_preferences(data, tiny_tokenizer, 2048, "pairs")
    assert diagnosis.tokens is not None
    assert (diagnosis.tokens.count, diagnosis.tokens.total) == (6, prepared.summary.tokens)
    assert diagnosis.supervised_tokens == prepared.summary.supervised_tokens


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("control-token", pair(3, rejected="It ends here<|eot_id|> and another turn begins")),
        ("control-token", pair(3, chosen="It ends here<|eot_id|> and another turn begins")),
        ("mojibake", pair(3, rejected="the cafÃ© is around the corner, as ever")),
        ("one-word-answer", pair(3, rejected="No.")),
        ("duplicate", pair(1)),
        ("bad-row", pair(3, rejected=pair(3)["chosen"])),
        ("bad-row", pair(3, chosen=" ")),
    ],
)
def test_a_fault_of_either_answer_is_found_and_dropping_cures_it(
    name: str, row: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    assert found(diagnose(source(tmp_path, [*CLEAN, row]))) == {name: [4]}
    if name == "bad-row":
        return
    data = source(tmp_path, [*CLEAN, row], drop=[name], heldout_rows=0)
    assert rows_to_drop(data, "pairs") == {3: name}
    prepared = prepare_preferences(data, tiny_tokenizer, 2048, "pairs")
    assert (prepared.summary.rows, prepared.summary.kept) == (4, 3)
    assert prepared.summary.dropped[f"by data.drop={name}"].first == ["pairs.jsonl line 4"]


def test_a_row_whose_answers_show_one_fault_counts_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    assistant = [{"role": "assistant", "content": "Yes, " + "very " * 60}]
    both = {
        "prompt": [{"role": "user", "content": "Is it?"}, {"role": "user", "content": "I ask you."}],
        "chosen": assistant,
        "rejected": [{"role": "assistant", "content": "No, " + "never " * 60}],
    }
    diagnosis = diagnose(source(tmp_path, [both]), tiny_tokenizer, 100)
    assert found(diagnosis) == {"repeated-role": [1], "overlong": [1]}
    assert all(finding.rows.count == 1 for finding in diagnosis.findings)


def test_another_answer_to_the_same_question_is_no_repetition(tmp_path: Path) -> None:
    assert diagnose(source(tmp_path, [pair(0), pair(0, rejected=pair(1)["rejected"])])).findings == []


def test_labelled_answers_are_recognised_by_a_boolean_label(tmp_path: Path) -> None:
    rows = [{"prompt": q, "completion": pair(0)["chosen"] + q, "label": n % 2 == 0} for n, q in enumerate(QUESTIONS)]
    diagnosis = diagnose(source(tmp_path, rows))
    assert (diagnosis.kind, diagnosis.findings) == ("labelled", [])
    assert diagnosis.roles == {"user": 5, "assistant": 5}
    classes = diagnose(source(tmp_path, [row | {"label": 3} for row in rows]))
    assert (classes.kind, classes.findings) == ("supervised", [])


def test_a_named_method_decides(tmp_path: Path) -> None:
    data = source(tmp_path, CLEAN)
    assert diagnose(data, kind="labelled").format.endswith("each pair as two labelled answers")
    with pytest.raises(DataError, match=r"training\.method: dpo"):
        diagnose(data, kind="supervised")
    mapped = source(tmp_path, CLEAN, columns={"completion": "chosen"})
    assert diagnose(mapped).kind == "supervised"
    with pytest.raises(DataError, match=r"set training\.method: sft"):
        diagnose(source(tmp_path, [{"instruction": "a", "response": "b"}]), kind="pairs")
    with pytest.raises(UsageError, match=r"data\.streaming is not followed"):
        diagnose(source(tmp_path, CLEAN, streaming=True))


def test_held_out_pairs_are_compared_with_the_training_pairs(tmp_path: Path, tiny_tokenizer: Any) -> None:
    heldout = tmp_path / "held.jsonl"
    heldout.write_text("".join(json.dumps(pair(number)) + "\n" for number in (4, 1)))
    data = source(tmp_path, CLEAN, heldout=str(heldout))
    assert found(diagnose(data)) == {"heldout-duplicate": [2]}
    dropping = data.model_copy(update={"drop": ["heldout-duplicate"]})
    prepared = prepare_preferences(dropping, tiny_tokenizer, 2048, "pairs")
    assert (prepared.summary.kept, prepared.summary.heldout) == (2, 2)
