"""Numbers in the arguments of calls: learned and served as they were written, whatever a template does with them."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import trl

from parley.config import DataSection
from parley.data.messages import parse_messages
from parley.data.prepare import prepare
from parley.data.render import render, render_prompt
from parley.data.written_numbers import WrittenNumber, parse_written, without_texts, written_json

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from template_masks import TOOL, tokenizer_for

TRL = Path(trl.__file__).parent / "chat_templates"
LITERALS = ("1.10", "1E5", "2.50", "0.00001")
TEXT = '{"sum": 1.10, "large": 1E5, "of": [2.50, {"small": 0.00001}], "plain": 1.5, "city": "Oslo"}'
CALL = {"type": "function", "id": "call00001"}
# Families that differ in how they write arguments: JSON, one by one, XML, their own notation, as text.
TEMPLATES = [
    "qwen3",
    "qwen3_5_think",
    "gemma4",
    "glm4moe",
    "llama3_1",
    "deepseekv3",
    "gptoss",
    "nemotron_3_nano",
    "lfm2_v2",
]


def conversation(arguments: Any) -> list[dict[str, Any]]:
    turns = [
        {"role": "user", "content": "Pay."},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "pay", "arguments": arguments}}]},
        {"role": "tool", "content": "paid", "name": "pay", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Paid."},
    ]
    return parse_messages(turns, "row 1", "messages")


def tokenizers() -> list[Any]:
    files = [TRL / f"{name}.jinja" for name in TEMPLATES]
    found = [file for file in files if file.exists()]
    assert len(found) > 5
    return [pytest.param(file.read_text(encoding="utf-8"), id=file.stem) for file in found]


@pytest.mark.parametrize("source", tokenizers())
def test_numbers_of_a_call_are_written_as_the_row_has_them(source: str, request: pytest.FixtureRequest) -> None:
    tokenizer = tokenizer_for(source)
    messages = conversation(TEXT)
    text = tokenizer.decode(render(tokenizer, messages, tools=[TOOL]).input_ids)
    assert [number for number in LITERALS if number not in text] == []
    # And nothing else is different from what transformers writes for the arguments parsed, or as text.
    arguments = TEXT if "deepseek" in request.node.name else json.loads(TEXT)
    given = [dict(message) for message in messages]
    given[1]["tool_calls"] = [{**CALL, "function": {"name": "pay", "arguments": arguments}}]
    expected = tokenizer.apply_chat_template(given, tools=[TOOL], tokenize=False)
    for written in LITERALS:
        text, expected = (whole.replace(written, str(json.loads(written))) for whole in (text, expected))
    assert text == expected
    asked = tokenizer.decode(render_prompt(tokenizer, messages[:-1], tools=[TOOL]))
    assert "1.10" in asked


@pytest.mark.parametrize("source", tokenizers()[:3])
def test_arguments_that_are_objects_are_transformers_own(source: str) -> None:
    tokenizer = tokenizer_for(source)
    messages = conversation(json.loads(TEXT))
    expected = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    assert (
        render(tokenizer, messages, tools=[TOOL]).input_ids
        == tokenizer(expected, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "tool_calls": '[{"name": "pay", "arguments": {"sum": 1.10}}]'},
        {"role": "assistant", "function_call": {"name": "pay", "arguments": '{"sum": 1.10}'}},
        {"from": "function_call", "value": '{"name": "pay", "arguments": {"sum": 1.10}}'},
    ],
)
def test_every_way_to_give_a_call_as_text_keeps_numbers(tmp_path: Path, turn: dict[str, Any]) -> None:
    key, role = ("value", "from") if "from" in turn else ("content", "role")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{role: "user", key: "Pay."}, turn]}) + "\n", encoding="utf-8")
    tokenizer = tokenizer_for((TRL / "qwen3.jinja").read_text(encoding="utf-8"))
    data = prepare(DataSection(source=str(path), heldout_rows=0), tokenizer, 512)
    assert '{"sum": 1.10}' in tokenizer.decode(data.train[0]["input_ids"])


def test_json_of_written_numbers() -> None:
    value = parse_written('{"b": [1.10, 1.5, -0], "a": "number 0 0", "c": 1e999}')
    assert written_json(value) == '{"b": [1.10, 1.5, -0], "a": "number 0 0", "c": 1e999}'
    assert written_json(value, sort_keys=True).startswith('{"a": "number 0 0", "b": [1.10')
    assert without_texts(value)["b"] == [1.1, 1.5, 0]
    assert not isinstance(without_texts(value)["b"][0], WrittenNumber)
    number = value["b"][0]
    assert number == 1.1
    assert f"{number}" == str(number) == repr([number])[1:-1] == "1.10"
    assert [str(copied) for copied in (copy.deepcopy(number), pickle.loads(pickle.dumps(number)))] == ["1.10"] * 2
    assert str(parse_written("1.5")) == "1.5"
    assert type(parse_written("1.5")) is float
