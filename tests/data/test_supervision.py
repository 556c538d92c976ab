"""What is supervised of a row: flags of messages, parts and spans, train_on, end-of-turn policy, unwritten fields."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from parley.config import DataSection
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.encoding import MaskedText, token_mask
from parley.data.example import Example
from parley.data.prepare import prepare
from parley.data.render import AS_TEXT, AS_TOKENS, UNCLOSED, WEIGHTED, RenderOptions, render, render_example, unwritten

USER, ANSWER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Ahoy!"}
BYE = {"role": "assistant", "content": "Farewell."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}


def supervised(tokenizer: Any, rendered: Any) -> list[str]:
    runs: list[list[int]] = []
    previous = False
    for id, chosen in zip(rendered.input_ids, rendered.mask, strict=True):
        if chosen and not previous:
            runs.append([])
        if chosen:
            runs[-1].append(id)
        previous = chosen
    return [tokenizer.decode(run) for run in runs]


def of(tokenizer: Any, messages: list[Any], **options: Any) -> list[str]:
    return supervised(tokenizer, render(tokenizer, messages, **options))


@pytest.fixture
def trained(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """What is supervised of a row, by way of a file."""

    def of_row(row: dict[str, Any], **settings: Any) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = prepare(DataSection(source=str(path), heldout_rows=0, **settings), tiny_tokenizer, 512)
        return tiny_tokenizer.decode([label for label in data.train[0]["labels"] if label != IGNORE_INDEX])

    return of_row


BAD = {"role": "assistant", "content": "BAD"}
GOOD = {"role": "assistant", "content": "GOOD"}


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss_weight": 0}, {"label": False}, {"training": False}],
)
def test_a_flagged_turn_is_not_supervised(trained: Any, flag: dict[str, Any]) -> None:
    assert trained({"messages": [USER, BAD | flag, USER, GOOD]}) == "GOOD<|eot_id|>"
    assert trained({"messages": [USER, BAD | flag, USER, GOOD]}, train_on="inputs").count("GOOD") == 1
    assert "BAD" not in trained({"messages": [USER, BAD | flag, USER, GOOD]}, train_on="inputs")


def test_a_flagged_part_is_not_supervised(trained: Any) -> None:
    parts = [{"type": "text", "text": "BAD ", "train": False}, {"type": "text", "text": "GOOD"}]
    assert trained({"messages": [USER, {"role": "assistant", "content": parts}]}).strip() == "GOOD<|eot_id|>"


def test_a_flagged_span_is_not_supervised(trained: Any) -> None:
    detail = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    turn = {"role": "assistant", "content": "BAD GOOD", "train_detail": detail}
    assert trained({"messages": [USER, turn]}).strip() == "GOOD<|eot_id|>"
    only = {"role": "assistant", "content": "BAD GOOD", "weight": 0, "weight_spans": [[4, 8, 1]]}
    assert trained({"messages": [USER, only]}).strip() == "GOOD"


def test_no_token_reaches_from_an_excluded_span(tiny_tokenizer: Any) -> None:
    for border in range(1, 8):
        turn = {"role": "assistant", "content": "assistant", "weight_spans": [[0, border, 0]]}
        (got,) = of(tiny_tokenizer, [USER, turn])
        assert "assistant<|eot_id|>"[border:].endswith(got)


def weighted(tokenizer: Any, rendered: Any) -> list[tuple[str, float]]:
    """Runs of supervised tokens of one weight."""
    assert rendered.weights is not None
    runs: list[tuple[list[int], float]] = []
    for token, chosen, weight in zip(rendered.input_ids, rendered.mask, rendered.weights, strict=True):
        if not chosen:
            continue
        if not runs or runs[-1][1] != weight:
            runs.append(([], weight))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), weight) for ids, weight in runs]


AHOY_BYE = {"role": "assistant", "content": "AHOY bye"}


@pytest.mark.parametrize(
    ("turns", "options", "wanted"),
    [
        ([USER, GOOD | {"weight": 0.5}, USER, BYE], {}, [("GOOD<|eot_id|>", 0.5), ("Farewell.<|eot_id|>", 1.0)]),
        ([USER, GOOD | {"weight": 0.5}, USER, BYE | {"weight": 0.25}], {"train_on": "last"},
         [("GOOD<|eot_id|>", 0.5), ("Farewell.<|eot_id|>", 0.25)]),
        ([USER, GOOD | {"weight": 0.5}], {"end_tokens": "none"}, [("GOOD", 0.5)]),
        ([USER, AHOY_BYE | {"weight_spans": [[4, 8, 0.25]]}], {}, [("AHOY", 1.0), (" bye", 0.25), ("<|eot_id|>", 1.0)]),
        ([USER, AHOY_BYE | {"weight_spans": [[4, 8, 1]], "weight": 0.5}], {},
         [("AHOY", 0.5), (" bye", 1.0), ("<|eot_id|>", 0.5)]),
        ([USER, AHOY_BYE | {"weight_spans": [[0, 4, 0.25]], "weight": 0}], {}, [("AHOY", 0.25)]),
        ([USER, AHOY_BYE | {"weight_spans": [[0, 4, 0], [4, 8, 0.75]]}], {}, [(" bye", 0.75), ("<|eot_id|>", 1.0)]),
        ([USER, {"role": "assistant", "content": "<|eot_id|> x"} | {"weight": 0.5}, USER, BYE], {},
         [("<|eot_id|> x<|eot_id|>", 0.5), ("Farewell.<|eot_id|>", 1.0)]),
    ],
)  # fmt: skip
def test_fractional_weights_of_turns_and_spans(tiny_tokenizer: Any, turns: Any, options: Any, wanted: Any) -> None:
    rendered = render(tiny_tokenizer, turns, **options)
    assert weighted(tiny_tokenizer, rendered) == wanted
    assert WEIGHTED in rendered.notes
    ids, mask = rendered.input_ids, rendered.mask
    ones = render(tiny_tokenizer, [_with_weights_rounded_up(turn) for turn in turns], **options)
    assert (ones.input_ids, ones.mask, ones.weights) == (ids, mask, None)


def _with_weights_rounded_up(turn: dict[str, Any]) -> dict[str, Any]:
    spans = [[start, end, float(value > 0)] for start, end, value in turn.get("weight_spans", [])]
    weight = {"weight": float(turn["weight"] > 0)} if "weight" in turn else {}
    return turn | weight | ({"weight_spans": spans} if spans else {})


def test_of_all_inputs_a_turn_may_count_less(tiny_tokenizer: Any) -> None:
    rendered = render(tiny_tokenizer, [USER | {"weight": 0.5}, ANSWER], train_on="inputs")
    halves = [text for text, weight in weighted(tiny_tokenizer, rendered) if weight == 0.5]
    assert halves == ["Hello?<|eot_id|>"]


def test_fractional_weights_reach_the_data_set_and_the_summary(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    parts = [{"type": "text", "text": "AHOY"}, {"type": "text", "text": " bye", "weight": 0.25}]
    turns = [[USER, ANSWER], [USER, {"role": "assistant", "content": parts}], [USER, BYE | {"weight": 0.5}]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    for streaming in (False, True):
        section = DataSection(source=str(path), heldout_rows=0, streaming=streaming, overlong="truncate-start")
        data = prepare(section, tiny_tokenizer, 12)
        plain, spans, whole = [row["loss_weights"] for row in data.train]
        assert plain is None
        assert (len(spans), len(whole)) == (12, 12)
        assert spans[-5:] == [1.0, 0.25, 0.25, 0.25, 1.0]
        assert set(whole[-5:]) == {0.5}
        (line,) = [line for line in data.summary.lines() if WEIGHTED in line]
        assert line.startswith(f"{WEIGHTED}: 2 ")


def test_without_weights_there_is_no_column_of_them(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER | {"weight": 1}]}))
    data = prepare(DataSection(source=str(path), heldout_rows=0), tiny_tokenizer, 512)
    assert set(data.train.column_names) == {"input_ids", "labels", "origin"}
    assert not any(WEIGHTED in line for line in data.summary.lines())


def test_train_on(tiny_tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER, {"role": "user", "content": "Bye?"}, BYE]
    end = "<|eot_id|>"
    assert of(tiny_tokenizer, messages) == [f"Ahoy!{end}", f"Farewell.{end}"]
    assert of(tiny_tokenizer, messages, train_on="last") == [f"Farewell.{end}"]
    assert of(tiny_tokenizer, messages, train_on="nothing") == []
    assert of(tiny_tokenizer, messages, train_on=["user"]) == [f"Hello?{end}", f"Bye?{end}"]
    assert of(tiny_tokenizer, messages, train_on=["system", "assistant"]) == [
        f"Be brief.{end}",
        f"Ahoy!{end}",
        f"Farewell.{end}",
    ]
    whole = render(tiny_tokenizer, messages, train_on="inputs")
    assert all(whole.mask)
    assert of(tiny_tokenizer, [USER, ANSWER | {"weight": 1}, USER, BYE], train_on="nothing") == [f"Ahoy!{end}"]
    assert of(tiny_tokenizer, [USER | {"weight": 1}, ANSWER]) == [f"Hello?{end}", f"Ahoy!{end}"]


def test_rows_without_an_assistant_are_kept_where_another_role_is_supervised(trained: Any) -> None:
    assert trained({"messages": [USER]}, train_on=["user"]) == "Hello?<|eot_id|>"
    assert trained({"messages": [USER | {"train": True}]}) == "Hello?<|eot_id|>"
    assert "Hello?" in trained({"messages": [USER]}, train_on="inputs")


def test_a_prompt_is_never_supervised(tiny_tokenizer: Any) -> None:
    example = Example("row", prompt=[USER, ANSWER | {"weight": 1}, USER], completion=[BYE])
    assert supervised(tiny_tokenizer, render_example(tiny_tokenizer, example)) == ["Farewell.<|eot_id|>"]
    (text,) = supervised(tiny_tokenizer, render_example(tiny_tokenizer, example, RenderOptions(train_on="inputs")))
    assert "Hello" not in text
    assert text.endswith("Farewell.<|eot_id|>")


def test_end_of_turn_policy(tiny_tokenizer: Any) -> None:
    messages = [USER, ANSWER, USER, BAD | {"weight": 0}, USER, BYE]
    end = "<|eot_id|>"
    assert of(tiny_tokenizer, messages, end_tokens="turn") == [f"Ahoy!{end}", f"Farewell.{end}"]
    assert of(tiny_tokenizer, messages, end_tokens="last") == ["Ahoy!", f"Farewell.{end}"]
    assert of(tiny_tokenizer, messages, end_tokens="none") == ["Ahoy!", "Farewell."]
    assert of(tiny_tokenizer, messages, end_tokens="all") == [f"Ahoy!{end}", end, f"Farewell.{end}"]


def test_control_tokens_of_a_text_row_follow_the_setting(tiny_tokenizer: Any) -> None:
    end = tiny_tokenizer.eos_token_id
    example = Example("row", text="a<|eot_id|>b")
    as_tokens = render_example(tiny_tokenizer, example)
    assert as_tokens.input_ids.count(end) == 2
    assert as_tokens.notes == [AS_TOKENS]
    as_text = render_example(tiny_tokenizer, example, RenderOptions(control_tokens="text"))
    assert as_text.input_ids.count(end) == 1
    assert as_text.notes == [AS_TEXT]
    assert tiny_tokenizer.decode(as_text.input_ids) == tiny_tokenizer.decode(as_tokens.input_ids)
    twice = Example("row", text="<|begin_of_text|>a<|begin_of_text|>b")
    begin = tiny_tokenizer.bos_token_id
    assert render_example(tiny_tokenizer, twice, RenderOptions(control_tokens="text")).input_ids.count(begin) == 1


def test_a_question_about_a_control_token_is_plain_text(tiny_tokenizer: Any) -> None:
    question = {"role": "user", "content": "What does <|begin_of_text|> do?"}
    rendered = render(tiny_tokenizer, [question, ANSWER])
    assert rendered.input_ids.count(tiny_tokenizer.bos_token_id) == 1
    assert rendered.notes == [AS_TEXT]
    assert supervised(tiny_tokenizer, rendered) == ["Ahoy!<|eot_id|>"]
    assert "What does <|begin_of_text|> do?" in tiny_tokenizer.decode(rendered.input_ids)
    # The same words with another name in place of the control token are encoded alike but for the name.
    other = render(tiny_tokenizer, [{"role": "user", "content": "What does <|begin_of_texs|> do?"}, ANSWER])
    assert len(other.input_ids) == len(rendered.input_ids)


BARE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + (m.content or '') }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)
UNENDED = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)


def test_what_the_template_never_writes_is_counted(tiny_tokenizer: Any, template: Any) -> None:
    tokenizer = template(BARE)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    result = {"role": "tool", "content": "9"}
    notes = render(tokenizer, [USER, CALL, result, ANSWER], tools=tools).notes
    assert notes == [unwritten("tools"), unwritten("tool calls")]
    assert render(tokenizer, [USER, ANSWER | {"reasoning_content": "Hm"}]).notes == [unwritten("reasoning")]
    assert render(tokenizer, [USER, ANSWER | {"reasoning_content": "Hm"}, USER, ANSWER]).notes == []
    silent = template(
        "{% for m in messages if m.role != 'tool' %}{{ m.role + (m.content or '') }}<|eot_id|>{% endfor %}"
    )
    assert unwritten("tool results") in render(silent, [USER, CALL, result, ANSWER]).notes


def test_a_turn_that_is_never_ended_is_counted(template: Any) -> None:
    assert render(template(UNENDED), [USER, ANSWER]).notes == [UNCLOSED]
    assert render(template(BARE), [USER, ANSWER]).notes == []


def test_notes_are_in_the_summary(tmp_path: Path, template: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    data = prepare(DataSection(source=str(path), heldout_rows=0), template(UNENDED), 512)
    assert f"{UNCLOSED}: 1 (rows.jsonl line 1)" in data.summary.lines()


def test_arguments_are_text_where_the_template_wants_text(trained: Any, template: Any, tmp_path: Path) -> None:
    call = {"function": {"name": "pay", "arguments": '{"sum": 1.10}'}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    written = (
        "{{ m.tool_calls[0].function.arguments ~ '' if m.tool_calls[0].function.arguments is string else 1 + 'a' }}"
    )
    tokenizer = template(
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% if m.tool_calls %}" + written + "{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    data = prepare(DataSection(source=str(path), heldout_rows=0), tokenizer, 512)
    assert '{"sum": 1.10}' in tokenizer.decode(data.train[0]["input_ids"])
    plain = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    assert '{"a": 1}' in tokenizer.decode(render(tokenizer, [USER, plain]).input_ids)


@pytest.mark.parametrize(
    ("text", "tokens", "excluded", "wanted"),
    [
        ("BAD GOOD", ["BAD", " G", "OOD"], (0, 4), [" G", "OOD"]),
        ("BAD GOOD", ["BA", "D G", "OOD"], (0, 4), ["OOD"]),
        ("BAD  GOOD", ["BAD", " ", " G", "OOD"], (0, 5), [" G", "OOD"]),
        ("GOOD BAD", ["GOO", "D ", "BAD"], (4, 8), ["GOO", "D "]),
        ("GOOD BAD", ["GOO", "D B", "AD"], (4, 8), ["GOO"]),
        ("GO \n ON", ["GO", " \n ", "ON"], (3, 4), ["GO", " \n ", "ON"]),
    ],
)
def test_a_token_that_takes_white_space_alone_from_an_excluded_span_is_supervised(
    text: str, tokens: list[str], excluded: tuple[int, int], wanted: list[str]
) -> None:
    assert "".join(tokens) == text
    ends = list(accumulate(map(len, tokens)))
    masked = MaskedText(text, [(0, len(text))], excluded=[excluded])
    mask = token_mask(
        list(range(len(tokens))), lambda index: (ends[index] - len(tokens[index]), ends[index]), masked, frozenset()
    )
    assert [token for token, kept in zip(tokens, mask, strict=True) if kept] == wanted
