"""Turns in the ways that data sets write them: the same messages, and nothing that disappears."""

from __future__ import annotations

import json
from typing import Any

import pytest

from parley.data.example import Arguments
from parley.data.messages import parse_messages, with_system
from parley.data.tool_calls import parse_tools
from parley.errors import DataError


def parsed(*turns: Any, **names: Any) -> list[dict[str, Any]]:
    return parse_messages(list(turns), "row 1", "messages", **names)


def refused(*turns: Any, **names: Any) -> str:
    with pytest.raises(DataError) as caught:
        parsed(*turns, **names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Hello"}],
        [{"role": "human", "text": "Hi"}, {"role": "ai", "text": "Hello"}],
        [{"speaker": "user", "text": "Hi"}, {"speaker": "bot", "text": "Hello"}],
        [{"role": "user", "value": "Hi"}, {"role": "model", "value": "Hello"}],
        [{"from": "prompter", "content": "Hi"}, {"from": "chatbot", "content": "Hello"}],
        [{"type": "human", "data": {"content": "Hi"}}, {"type": "ai", "data": {"content": "Hello"}}],
        [{"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hi"]}},
         {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["Hello"]}}],
        [{"role": "user", "content": [{"type": "text", "value": "Hi"}]},
         {"role": "assistant", "content": [{"text": "Hel"}, "lo"]}],
        [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
         {"role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}],
        [{"role": "user", "content": "", "text": "Hi"}, {"role": "assistant", "content": None, "value": "Hello"}],
    ],
)  # fmt: skip
def test_roles_and_keys_of_many_data_sets(turns: list[Any]) -> None:
    assert parsed(*turns) == HELLO
    assert parse_messages(json.dumps(turns), "row 1", "messages") == HELLO


def test_own_names_of_roles_and_keys() -> None:
    turns = [{"who": "visitor", "says": "Hi"}, {"who": "Guide", "says": "Hello"}]
    names = {"keys": {"role": "who", "content": "says"}, "roles": {"visitor": "user", "Guide": "assistant"}}
    assert parsed(*turns, **names) == HELLO
    assert "role 'visitor', wanted one of system" in refused({"role": "visitor", "content": "Hi"})
    assert "data.roles" in refused({"role": "visitor", "content": "Hi"})


def test_a_context_turn_is_the_system_s() -> None:
    assert parsed({"role": "context", "content": "A page."}) == [{"role": "system", "content": "A page."}]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "user", "mesage": "Hi"}, "turn 1 has no content; if it is under 'mesage', set data.columns"),
        ({"role": "user", "content": [{"type": "text", "body": "Hi"}]}, "a part without text: it has body"),
        ({"role": "user", "content": {"body": "Hi"}}, "is an object with keys body; wanted text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "has a part 'image_url'"),
        ({"role": "user", "content": "Hi", "images": ["cat.png"]}, "turn 1 has 'images'"),
        ({"role": "user", "content": [3]}, "has a part that is a number"),
    ],
)
def test_text_that_would_disappear_is_refused(turn: Any, said: str) -> None:
    assert said in refused(turn)


def test_a_turn_of_its_role_alone_is_dropped() -> None:
    assert parsed({"role": "user", "name": "Ada", "images": []}, *HELLO) == HELLO


def test_reasoning_is_text_from_text_lists_and_parts() -> None:
    assert parsed({"role": "assistant", "content": "4", "reasoning": ["2", {"text": "+2"}]}) == [
        {"role": "assistant", "content": "4", "reasoning": "2+2"}
    ]
    parts = [{"type": "thinking", "thinking": "2"}, {"type": "reasoning", "text": "+2"}, {"type": "text", "text": "4"}]
    assert parsed({"role": "assistant", "content": parts}) == [
        {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    ]
    assert "'thinking' is a number" in refused({"role": "assistant", "content": "4", "thinking": 3})


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": [
            {"type": "tool_call", "name": "f", "arguments": {"a": 1}},
            {"type": "tool_use", "name": "g", "input": {"b": 2}},
        ]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}, call("g", b=2)]},
        {"role": "assistant", "tool_calls": json.dumps([call("f", a=1), call("g", b=2)])},
        {"from": "function_call", "value": json.dumps([{"name": "f", "arguments": {"a": 1}}, call("g", b=2)])},
    ],
)  # fmt: skip
def test_several_calls_in_one_turn(turn: Any) -> None:
    assert parsed(turn) == [{"role": "assistant", "content": "", "tool_calls": [call("f", a=1), call("g", b=2)]}]


def test_the_older_function_call_is_a_tool_call() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    assert parsed(turn) == [{"role": "assistant", "content": "", "tool_calls": [call("f", a=1)]}]


def test_arguments_given_as_text_keep_it() -> None:
    turn = {"role": "assistant", "tool_calls": [{"name": "pay", "arguments": '{"sum": 1.10}'}]}
    arguments = parsed(turn)[0]["tool_calls"][0]["function"]["arguments"]
    assert isinstance(arguments, Arguments)
    assert (arguments, arguments.text) == ({"sum": 1.1}, '{"sum": 1.10}')
    as_object = parsed({"role": "assistant", "tool_calls": [call("pay", sum=1.1)]})[0]["tool_calls"][0]
    assert not isinstance(as_object["function"]["arguments"], Arguments)


def test_tool_results_inside_a_user_s_turn_are_messages_of_their_own() -> None:
    parts = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "9"}]},
        {"type": "tool_result", "tool_use_id": "2", "content": "19"},
    ]
    results = [
        {"role": "tool", "content": "9", "tool_call_id": "1"},
        {"role": "tool", "content": "19", "tool_call_id": "2"},
    ]
    assert parsed({"role": "user", "content": parts}) == results
    assert parsed({"role": "user", "content": [*parts, {"type": "text", "text": "And?"}]}) == [
        *results,
        {"role": "user", "content": "And?"},
    ]


@pytest.mark.parametrize(
    "flag",
    ["weight", "loss_weight", "train", "training", "loss", "loss_mask", "train_on_turn", "trainable", "do_train"],
)
@pytest.mark.parametrize(("value", "weight"), [(0, 0.0), (False, 0.0), (0.25, 0.25), (True, 1.0), (1, 1.0)])
def test_flags_of_a_message_become_its_weight(flag: str, value: Any, weight: float) -> None:
    assert parsed({"role": "assistant", "content": "a", flag: value}) == [
        {"role": "assistant", "content": "a", "weight": weight}
    ]


def test_flags_multiply_and_nulls_are_none() -> None:
    assert parsed({"role": "assistant", "content": "a", "label": False})[0]["weight"] == 0
    assert parsed({"role": "assistant", "content": "a", "label": 3}) == [
        {"role": "assistant", "content": "a", "label": 3}
    ]
    turn = {"role": "assistant", "content": "a", "weight": 0.5, "train": False, "loss": None}
    assert parsed(turn)[0]["weight"] == 0
    assert "weight" not in parsed({"role": "assistant", "content": "a", "weight": None})[0]


def test_flags_of_parts_and_spans_become_spans() -> None:
    parts = [
        {"type": "text", "text": "BAD ", "train": False},
        {"text": ""},
        {"text": "GOOD"},
        {"text": "!", "weight": 0.5},
    ]
    message = parsed({"role": "assistant", "content": parts})[0]
    assert message["content"] == "BAD GOOD!"
    assert message["weight_spans"] == [[0, 4, 0.0], [8, 9, 0.5]]
    assert parsed(message) == [message]  # read again, as from a data set that was standardised
    alike = parsed({"role": "assistant", "content": [{"text": "a", "train": False}, {"text": "b", "train": False}]})[0]
    assert (alike["weight"], "weight_spans" in alike) == (0.0, False)
    detail = [{"begin_offset": 4, "end_offset": 7, "train": True}, {"begin_offset": 0, "end_offset": 3, "train": False}]
    message = parsed({"role": "assistant", "content": "BAD GOOD", "train_detail": detail})[0]
    assert message["weight_spans"] == [[0, 4, 0.0], [4, 8, 1.0]]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"weight": -1}, "'weight' is -1; wanted true, false or a number from 0 to 1"),
        ({"weight": 2}, "'weight' is 2"),
        ({"train": "no"}, "'train' is 'no'"),
        ({"loss_weight": float("nan")}, "'loss_weight' is nan"),
        ({"weight_spans": [[0, 9, 1]]}, "the span 0 to 9 overlaps another or leaves its 3 characters"),
        ({"weight_spans": [[0, 2, 1], [1, 3, 0]]}, "the span 1 to 3 overlaps"),
        ({"weight_spans": [[2, 2, 1]]}, "the span 2 to 2"),
        ({"weight_spans": "all"}, "is 'all', wanted a list of spans"),
        ({"weight_spans": [[0, float("inf"), 1]]}, "wanted [start, end, weight]"),
        ({"train_detail": [{"begin": 0}]}, "wanted begin_offset, end_offset and train"),
    ],
)
def test_flags_that_mean_nothing_are_refused(more: Any, said: str) -> None:
    assert said in refused({"role": "assistant", "content": "abc", **more})


def test_a_developer_turn_is_a_system_turn() -> None:
    system = {"role": "system", "content": "s"}
    assert with_system(HELLO, "s") == [system, *HELLO]
    for role in ("system", "developer"):
        own = [{"role": role, "content": "own"}, *HELLO]
        assert with_system(own, "s") == own
    assert with_system(HELLO, " ") == with_system(HELLO, None) == HELLO
    assert with_system([], "s") == [system]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("[1.10]", "the arguments are a list, wanted an object"),
        ("1.10", "the arguments are a number, wanted an object"),
        ('"Oslo"', "is not JSON"),
        (["Oslo"], "the arguments are a list, wanted an object"),
        (7, "the arguments are a number, wanted an object"),
        ('{"a": 1, "a": 2}', "the key 'a' is twice in"),
        ('{"b": [{"a": 1, "a": 2}]}', "the key 'a' is twice in"),
    ],
)
def test_arguments_that_templates_would_leave_out_are_refused(arguments: Any, said: str) -> None:
    with pytest.raises(DataError, match="of pay") as caught:
        parsed({"role": "assistant", "tool_calls": [{"name": "pay", "arguments": arguments}]})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "values"), [("null", {}), ('"{\\"a\\": 1.10}"', {"a": 1.1}), (None, {}), (" ", {})]
)
def test_arguments_may_be_null_or_text_of_text(arguments: Any, values: dict[str, Any]) -> None:
    turn = {"role": "assistant", "tool_calls": [{"name": "pay", "arguments": arguments}]}
    assert parsed(turn)[0]["tool_calls"][0]["function"]["arguments"] == values


def test_a_refusal_in_place_of_a_content_is_named() -> None:
    with pytest.raises(DataError, match="says its text under 'refusal'"):
        parsed({"role": "assistant", "content": None, "refusal": "I cannot help with that."})
    assert parsed({"role": "assistant", "content": "Aye.", "refusal": None}) == [
        {"role": "assistant", "content": "Aye."}
    ]


@pytest.mark.parametrize("tools", [{"pay": {}}, [{"function": {"name": "pay"}}, {}], [{"description": "pays"}]])
def test_tools_without_a_name_are_refused(tools: Any) -> None:
    with pytest.raises(DataError, match="wanted a description with a name"):
        parse_tools(tools, "row 1")
