from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from parley.config import DataSection, Droppable, RunConfig
from parley.data.doctor import tokens
from parley.data.doctor.checks import DROPPABLE, SEVERITIES
from parley.data.doctor.diagnose import diagnose, rows_to_drop
from parley.data.doctor.findings import Diagnosis
from parley.data.doctor.histogram import RELATIVE_ERROR, LogHistogram
from parley.data.doctor.text_faults import media_placeholder
from parley.data.heldout_split import sampled_rows
from parley.data.prepare import prepare
from parley.errors import UsageError

WORDS = re.findall(
    r"\w+",
    "harbour lantern copper window orchard velvet thunder marble saddle candle river pepper castle ribbon anchor "
    "meadow silver basket winter garden pencil hollow market timber violin butter",
)


def sentence(number: int, words: int = 30) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=words)).capitalize() + "."


def chat(number: int, *more: tuple[str, str]) -> dict[str, Any]:
    """A clean conversation, the same for a number and unlike that of any other."""
    turns = [("user", sentence(2 * number)), ("assistant", sentence(2 * number + 1)), *more]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def write(path: Path, rows: list[Any]) -> Path:
    # ASCII escapes, so that a lone surrogate reaches the file; a text is a line as it is.
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def found(diagnosis: Diagnosis) -> dict[str, list[int]]:
    """Line numbers by check; every row of a finding is named here, so counts must agree."""
    lines = {}
    for finding in diagnosis.findings:
        lines[finding.check] = [int(origin.rpartition(" ")[2]) for origin in finding.rows.first]
        assert finding.rows.count == len(finding.rows.first), finding.check
    return lines


USER, ASSISTANT = ("user", sentence(9001)), ("assistant", sentence(9002))
WEATHER = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}

# Each kind of fault with rows that have it and no other.
PLANTED: dict[str, list[Any]] = {
    "bad-row": ["{broken", {"messages": "no list"}],
    "lone-surrogate": [turns(USER, ("assistant", "Half a face \ud83d of it, " + sentence(1)))],
    "no-answer": [turns(("user", sentence(100))), turns(("system", sentence(101)), ("user", sentence(102)))],
    "empty-answer": [
        turns(("user", sentence(103)), ("assistant", "")),
        turns(("user", sentence(104)), ("assistant", " \n"), ("user", sentence(105)), ("assistant", sentence(106))),
    ],
    "duplicate": [chat(1), chat(2)],
    "near-duplicate": [turns(("user", sentence(6).upper()), ("assistant", sentence(7) + "  Velvet!"))],
    "one-word-answer": [
        turns(("user", sentence(110)), ("assistant", "Yes.")),
        turns(("user", sentence(111)), ("assistant", "42")),
        turns(("user", sentence(112)), ("assistant", "是的。")),
    ],
    "control-token": [
        turns(("user", sentence(120)), ("assistant", sentence(121) + "<|eot_id|>")),
        turns(("user", "<|im_start|>user\n" + sentence(122)), ("assistant", sentence(123))),
        turns(("user", "[INST] " + sentence(124) + " [/INST]"), ("assistant", sentence(125))),
        turns(("user", sentence(126)), ("assistant", sentence(127) + "</s>")),
        turns(("user", sentence(128)), ("assistant", "<start_of_turn>model " + sentence(129))),
    ],
    "media-placeholder": [
        turns(("user", "<|image|>" + sentence(400)), ("assistant", sentence(401))),
        turns(("user", "<image>\n" + sentence(402)), ("assistant", sentence(403))),
    ],
    "template-text": [
        turns(("user", "### Instruction:\n" + sentence(130)), ("assistant", sentence(131))),
        turns(("user", sentence(132)), ("assistant", sentence(133) + "\n\n### Response:\nmore")),
        turns(("user", sentence(134)), ("assistant", "USER: one more thing? ASSISTANT: " + sentence(135))),
        turns(("user", "Human: " + sentence(136) + "\n\nAssistant: yes"), ("assistant", sentence(137))),
    ],
    "mojibake": [
        turns(("user", sentence(140)), ("assistant", "the cafÃ© is open " + sentence(141))),
        turns(("user", sentence(142)), ("assistant", "itâ€™s late " + sentence(143))),
        turns(("user", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚ " + sentence(144)), ("assistant", sentence(145))),
        turns(("user", sentence(146)), ("assistant", "smile ðŸ˜€ " + sentence(147))),
        turns(("user", sentence(148)), ("assistant", "a dash \x96 here " + sentence(149))),
    ],
    "replacement-character": [turns(("user", sentence(150)), ("assistant", "lost \ufffd " + sentence(151)))],
    "nul": [turns(("user", sentence(152) + "\0"), ("assistant", sentence(153)))],
    "system-later": [chat(77, ("system", sentence(160)), ("user", sentence(161)), ("assistant", sentence(162)))],
    "repeated-role": [
        turns(("user", sentence(170)), ("user", sentence(171)), ("assistant", sentence(172))),
        turns(("user", sentence(173)), ("assistant", sentence(174)), ("assistant", sentence(175))),
    ],
    "orphan-result": [turns(("user", sentence(176)), ("tool", "sunny"), ("assistant", sentence(177)))],
    "assistant-first": [turns(("assistant", sentence(180)), ("user", sentence(181)), ("assistant", sentence(182)))],
    "unanswered": [chat(78, ("user", sentence(183)))],
}

# What looks like a fault and is none.
CLEAN: list[Any] = [
    *(chat(number) for number in range(1, 40)),
    turns(("system", sentence(200)), ("user", sentence(201)), ("assistant", sentence(202))),
    {"messages": [dict(zip(("role", "content"), USER, strict=True)), WEATHER, {"role": "tool", "content": "sunny"},
                  {"role": "assistant", "content": sentence(203)}]},
    turns(("user", "Où est le CAFÉ? «NÃO», SÃO, Â, âge, ÐÑ " + sentence(210)), ("assistant", sentence(211))),
    turns(("user", "an <image> tag and [IMG]http://x/y.png[/IMG] " + sentence(230)), ("assistant", sentence(231))),
    turns(("user", sentence(212)), ("assistant", "was <s>9</s> now 8, <b>x</b> and a[0] " + sentence(213))),
    turns(("user", "<s>9 coins</s> 8 coins " + sentence(220)), ("assistant", sentence(221) + " <s>x</s>")),
    turns(("user", sentence(214)), ("assistant", '{"a":1}')),
    turns(("user", sentence(215)), ("assistant", "我觉得今天的天气很好。")),
    turns(("user", sentence(216)), ("assistant", "## Introduction\n\nUser: a person. " + sentence(217))),
    turns(("user", sentence(218)), ("assistant", "An emoji 😀 and a quote ’ " + sentence(219))),
]  # fmt: skip


def test_each_planted_fault_is_found_in_its_rows_and_nothing_else(tmp_path: Path) -> None:
    rows, expected = list(CLEAN), {}
    for name, faulty in PLANTED.items():
        expected[name] = list(range(len(rows) + 1, len(rows) + 1 + len(faulty)))
        rows += faulty
    diagnosis = diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", rows))))
    assert found(diagnosis) == expected
    assert diagnosis.rows == len(rows)
    assert set(expected) | {"heldout-duplicate", "heldout-near-duplicate"} >= set(DROPPABLE)


def test_a_clean_set_has_no_findings(tmp_path: Path) -> None:
    assert diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", CLEAN)))).findings == []


def test_the_demo_data_has_no_findings_but_two_rows_that_nearly_repeat_another() -> None:
    diagnosis = diagnose(DataSection())
    # "How can you help me?" with and without "Hi!"; "Count from 11 to 13." with and without "me".
    assert found(diagnosis) == {"near-duplicate": [966, 1651]}


def test_findings_are_worst_first(tmp_path: Path) -> None:
    rows = [row for faulty in PLANTED.values() for row in faulty]
    findings = diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", [*CLEAN, *rows])))).findings
    keys = [(SEVERITIES.index(finding.severity), -finding.rows.count) for finding in findings]
    assert keys == sorted(keys)
    assert len(keys) > 10
    assert all(finding.cure for finding in findings)


def test_every_setting_that_a_cure_names_exists() -> None:
    assert set(get_args(Droppable)) == set(DROPPABLE)
    for name, check in DROPPABLE.items():
        assert f"data.drop=[{name}]" in check.cure


def test_rows_shared_with_held_out_data_are_found_and_can_be_dropped(tmp_path: Path, tiny_tokenizer: Any) -> None:
    near = turns(("user", sentence(10).lower()), ("assistant", sentence(11) + " Ribbon!"))
    train = write(tmp_path / "rows.jsonl", [chat(number) for number in range(1, 9)])
    heldout = write(tmp_path / "held.jsonl", [chat(50), chat(3), near, chat(51)])
    data = DataSection(source=str(train), heldout=str(heldout))
    diagnosis = diagnose(data)
    assert found(diagnosis) == {"heldout-duplicate": [2], "heldout-near-duplicate": [3]}
    assert [finding.example for finding in diagnosis.findings] == [
        "the first repeats rows.jsonl line 3",
        "the first repeats rows.jsonl line 5",
    ]
    assert [finding.share for finding in diagnosis.findings] == [0.25, 0.25]
    assert diagnosis.heldout_rows == 4

    dropping = data.model_copy(update={"drop": ["heldout-duplicate", "heldout-near-duplicate"]})
    assert rows_to_drop(dropping, None) == {2: "heldout-duplicate", 4: "heldout-near-duplicate"}
    assert diagnose(dropping).findings == []
    prepared = prepare(dropping, tiny_tokenizer, 2048)
    assert len(prepared.train) == 6
    assert prepared.heldout is not None
    assert len(prepared.heldout) == 4


def test_rows_held_out_of_the_source_are_compared_with_the_others(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Each row comes twice, so that a held-out one repeats a training row unless its twin is held out too."""
    path = write(tmp_path / "rows.jsonl", [chat(number % 40) for number in range(80)])
    data = DataSection(source=str(path), heldout_rows=5)
    held = sampled_rows(5, 80)
    leaked = {(row + 40) % 80 for row in held} - held
    assert len(leaked) == 5
    findings = {finding.check: finding for finding in diagnose(data, for_training=True).findings}
    assert findings["heldout-duplicate"].rows.first == [f"rows.jsonl line {row + 1}" for row in sorted(held)]
    assert "heldout-duplicate" not in {finding.check for finding in diagnose(data).findings}
    dropping = data.model_copy(update={"drop": ["heldout-duplicate"]})
    assert set(rows_to_drop(dropping, None)) == leaked
    prepared = prepare(dropping, tiny_tokenizer, 2048)
    assert (prepared.summary.heldout, prepared.summary.heldout_repeated) == (5, 0)
    assert prepared.summary.kept == 70


def test_rows_nearly_in_the_held_out_share_are_found(tmp_path: Path) -> None:
    rows = [chat(number) for number in range(40)]
    near = [
        turns(("user", sentence(2 * n).lower()), ("assistant", sentence(2 * n + 1) + " Ribbon!")) for n in range(40)
    ]
    data = DataSection(source=str(write(tmp_path / "rows.jsonl", [*rows, *near])), heldout="20%")
    findings = {finding.check: finding for finding in diagnose(data).findings}
    assert "heldout-duplicate" not in findings
    assert findings["heldout-near-duplicate"].rows.count > 5
    dropping = data.model_copy(update={"drop": ["heldout-near-duplicate"]})
    assert "heldout-near-duplicate" not in {finding.check for finding in diagnose(dropping).findings}


@pytest.mark.parametrize("name", [name for name in DROPPABLE if not name.startswith("heldout")])
def test_dropping_cures_each_fault(name: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [*CLEAN, *PLANTED[name]])
    data = DataSection(source=str(path), drop=[name], heldout_rows=0)
    numbers = range(len(CLEAN), len(CLEAN) + len(PLANTED[name]))
    assert rows_to_drop(data, None) == dict.fromkeys(numbers, name)
    diagnosis = diagnose(data)
    assert diagnosis.findings == []
    assert diagnosis.left_out == {name: len(PLANTED[name])}
    prepared = prepare(data, tiny_tokenizer, 2048)
    assert prepared.summary.kept == len(CLEAN)
    assert prepared.summary.dropped[f"by data.drop={name}"].count == len(PLANTED[name])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"drop": ["duplicate"], "streaming": True}, "data.streaming"),
        ({"drop": ["heldout-duplicate"], "heldout_rows": 0}, "data.heldout"),
        ({"drop": ["duplicates"]}, "duplicate"),
    ],
)
def test_what_cannot_be_dropped_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RunConfig.create({"data": settings, "training": {"max_steps": 1}})


def test_what_the_data_set_holds(tmp_path: Path) -> None:
    rows = [
        turns(("system", "ab"), ("user", "abc"), ("assistant", "one two")),
        turns(("user", "a"), ("assistant", "b c")),
    ]
    diagnosis = diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", rows))))
    assert diagnosis.roles == {"user": 2, "assistant": 2, "system": 1}
    assert (diagnosis.turns.smallest, diagnosis.turns.largest, diagnosis.turns.total) == (2, 3, 5)
    assert (diagnosis.characters.smallest, diagnosis.characters.largest) == (4, 12)
    assert diagnosis.format == "messages (column messages, turns with role and content)"
    assert diagnosis.tokens is None


def test_tokens_and_what_the_length_limit_takes(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [chat(number) for number in range(5)] + [turns(("user", "Long?"), ("assistant", sentence(1, words=400)))]
    data = DataSection(source=str(write(tmp_path / "rows.jsonl", rows)), heldout_rows=0)
    whole = prepare(data, tiny_tokenizer, 100_000)
    lengths = [len(row["input_ids"]) for row in whole.train]
    diagnosis = diagnose(data, tiny_tokenizer, 500)
    assert diagnosis.tokens is not None
    assert (diagnosis.tokens.total, diagnosis.tokens.largest) == (sum(lengths), max(lengths))
    assert diagnosis.supervised_tokens == whole.summary.supervised_tokens
    assert found(diagnosis) == {"overlong": [6]}
    (finding,) = diagnosis.findings
    assert f"{max(lengths) - 500:,} tokens past the limit" in finding.cure
    assert f"model.max_seq_length={max(lengths)} takes them whole" in finding.cure
    assert diagnose(data, tiny_tokenizer, max(lengths)).findings == []


def test_rows_without_a_supervised_token_are_found_with_a_tokenizer(tmp_path: Path, tiny_tokenizer: Any) -> None:
    unweighted = chat(2)
    unweighted["messages"][1]["weight"] = 0
    data = DataSection(source=str(write(tmp_path / "rows.jsonl", [chat(1), unweighted])))
    assert found(diagnose(data, tiny_tokenizer, 2048)) == {"unsupervised": [2]}


def test_of_a_stream_the_first_rows_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chat(1), *(chat(number) for number in range(1, 1100))])
    diagnosis = diagnose(DataSection(source=str(path), streaming=True))
    assert (diagnosis.rows, diagnosis.complete) == (1000, False)
    assert ("rows", "the first 1,000 of a stream") in diagnosis.facts()
    assert found(diagnosis) == {"duplicate": [2]}


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"instruction": "Who?", "response": ""}, ["empty-answer"]),
        ({"instruction": "Who?", "output": "", "input": ""}, ["empty-answer"]),
        ({"prompt": "Who is it?", "completion": " "}, ["empty-answer"]),
        ({"prompt": "Who is it?", "completion": "Me"}, ["one-word-answer"]),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": ""}]}, ["empty-answer"]),
        ({"messages": '[{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]'}, ["empty-answer"]),
        ({"text": "<s>[INST] Who? [/INST] Me.</s>"}, []),
        ({"text": "caf\u00c3\u00a9 is open"}, ["mojibake"]),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, []),
    ],
)
def test_every_format_is_checked(row: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    diagnosis = diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", [row]))))
    assert list(found(diagnosis)) == names


def test_rows_of_token_ids_that_repeat_are_found(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(start, start + 30))} for start in (0, 100, 0)]
    assert found(diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", rows))))) == {"duplicate": [3]}


def test_rows_about_one_passage_with_other_answers_are_not_near(tmp_path: Path) -> None:
    passage = sentence(1, words=300)
    rows = [turns(("user", f"{passage} {sentence(n, words=6)}"), ("assistant", sentence(n + 50))) for n in range(10)]
    assert diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", rows)))).findings == []


def test_a_shared_system_turn_makes_no_rows_near(tmp_path: Path) -> None:
    system, answer = ("system", sentence(5000, words=300)), ("assistant", sentence(5001))
    rows = [turns(system, ("user", sentence(n)), answer) for n in range(10)]
    assert diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", rows)))).findings == []


def test_near_duplicates_among_many_rows_of_one_system_turn(tmp_path: Path) -> None:
    """One word of sixty changed is near, nine words are not."""
    rng = random.Random(0)

    def changed(text: str, count: int) -> str:
        words = text.split()
        for place in rng.sample(range(len(words)), count):
            words[place] = f"other{rng.random()}"
        return " ".join(words)

    system = ("system", sentence(5000, words=200))

    def row(number: int, words_changed: int) -> dict[str, Any]:
        return turns(
            system, ("user", sentence(number)), ("assistant", changed(sentence(number + 1000, 60), words_changed))
        )

    rows = [row(number, 0) for number in range(200)]
    near, far = [row(number, 1) for number in range(50)], [row(number, 9) for number in range(50, 100)]
    (finding,) = diagnose(DataSection(source=str(write(tmp_path / "rows.jsonl", [*rows, *near, *far])))).findings
    assert (finding.check, finding.rows.count, finding.rows.first[0]) == ("near-duplicate", 50, "rows.jsonl line 201")


def test_percentiles_are_within_the_stated_error() -> None:
    values = np.random.default_rng(0).lognormal(6, 1.5, 20_000).astype(int)
    histogram = LogHistogram()
    for value in values.tolist():
        histogram.add(value)
    assert (histogram.count, histogram.total, histogram.largest) == (20_000, values.sum(), values.max())
    for percent in (5, 50, 95, 99):
        expected = np.percentile(values, percent, method="lower")
        assert abs(histogram.percentile(percent) - expected) <= RELATIVE_ERROR * expected + 1


@pytest.mark.parametrize("settings", [{}, {"drop": ["duplicate", "bad-row"]}, {"heldout": "20%"}, {"heldout_rows": 3}])
def test_rows_are_diagnosed_while_they_are_rendered_as_alone(
    tmp_path: Path, tiny_tokenizer: Any, settings: dict[str, Any]
) -> None:
    if "drop" in settings:
        settings = {"drop": [name for name in settings["drop"] if name in DROPPABLE]}
    rows = [*CLEAN, *(row for faulty in PLANTED.values() for row in faulty)]
    data = DataSection(source=str(write(tmp_path / "rows.jsonl", rows)), **settings)
    prepared = prepare(data, tiny_tokenizer, 2048, diagnosed=True)
    assert prepared.diagnosis == diagnose(data, for_training=True, kind="supervised")
    assert prepare(data, tiny_tokenizer, 2048).diagnosis is None
    # The summary counts the same where no token is kept.
    counted = prepare(data, tiny_tokenizer, 2048, keep_tokens=False)
    assert counted.summary == prepared.summary
    assert (counted.preview_origins, counted.heldout_examples) == (prepared.preview_origins, prepared.heldout_examples)
    assert (len(counted.train), len(prepared.train)) == (0, prepared.summary.kept)


def test_of_many_rows_a_sample_is_tokenised_and_each_that_may_be_too_long(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(number) for number in range(300)]
    rows[250] = turns(("user", sentence(1)), ("assistant", sentence(2, words=1500)))
    unweighted = chat(500)
    unweighted["messages"][1]["weight"] = 0
    rows[251] = unweighted
    data = DataSection(source=str(write(tmp_path / "rows.jsonl", rows)))
    exact = diagnose(data, tiny_tokenizer, 1500)
    assert exact.tokenised is None
    monkeypatch.setattr(tokens, "EXACT_ROWS", 20)
    sampled = diagnose(data, tiny_tokenizer, 1500)
    assert sampled.tokenised is not None
    assert 20 < sampled.tokenised < 100
    assert ("tokens are of", f"a sample of {sampled.tokenised}; all that may be too long are in it") in sampled.facts()
    assert found(sampled) == found(exact) == {"overlong": [251], "unsupervised": [252]}
    assert sampled.tokens_over == exact.tokens_over
    assert exact.tokens is not None
    assert sampled.tokens is not None
    assert sampled.tokens.largest == exact.tokens.largest
    assert sampled.tokens.count == pytest.approx(300, rel=0.25)
    assert sampled.tokens.total / sampled.tokens.count == pytest.approx(exact.tokens.total / 300, rel=0.05)
    assert sampled.tokens.percentiles["p50"] == pytest.approx(exact.tokens.percentiles["p50"], rel=0.05)
    assert sampled.supervised_share == pytest.approx(exact.supervised_share, rel=0.05)


@pytest.mark.parametrize(
    "placeholder",
    ["<|vision_start|><|image_pad|><|vision_end|>", "<|image_1|>\n", "<|audio|>", "[IMG]", "<start_of_image>",
     "<image_soft_token>", "Listen:\n<audio>\n", "<|begin_of_image|>", "<|AUDIO|>", "<|audio_bos|>"],
)  # fmt: skip
def test_placeholders_of_media_in_other_families(placeholder: str) -> None:
    assert media_placeholder(f"{placeholder}What is it?")
