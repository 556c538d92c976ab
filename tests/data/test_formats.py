"""Formats are recognised by their columns, and every row becomes the conversation its writer meant."""

from __future__ import annotations

import json
from typing import Any

import pytest

from parley.config import DataSection
from parley.data.example import Example
from parley.data.recognition import Recognised, recognise
from parley.errors import DataError, UsageError


def recognised(row: dict[str, Any], **settings: Any) -> Recognised:
    return recognise([("row 1", row)], DataSection(**settings))


def example(row: dict[str, Any], **settings: Any) -> Example:
    return recognised(row, **settings).example(row, "row 1")


def messages(row: dict[str, Any], **settings: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in example(row, **settings).messages or []]


def refused(row: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        example(row, **settings)
    message = str(caught.value)
    assert message.startswith("row 1")
    assert "\n" not in message
    return message


USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ({"instruction": "q", "context": "c", "response": "a", "id": 1},
         "dolly", "Dolly (columns instruction, context, response)"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", "Alpaca (columns instruction, input, output)"),
        ({"conversations": [{"from": "human", "value": "q"}]},
         "sharegpt", "ShareGPT (column conversations, turns with from and value)"),
        ({"messages": [USER, ASSISTANT], "prompt": "q"},
         "messages", "messages (column messages, turns with role and content)"),
        ({"conversation": [USER]}, "messages", "messages (column conversation, turns with role and content)"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion", "prompt and completion (columns prompt, completion)"),
        ({"text": "words", "id": 3}, "text", "text (column text)"),
    ],
)  # fmt: skip
def test_formats_are_recognised_and_said(row: dict[str, Any], name: str, reason: str) -> None:
    found = recognised(row)
    assert (found.name, found.reason) == (name, reason)


def test_a_dolly_row_is_system_then_context_and_instruction_then_response() -> None:
    row = {"instruction": "q?", "context": "c", "response": "a"}
    expected = [("user", "c\n\nq?"), ("assistant", "a")]
    assert messages(row) == expected
    assert messages(row, system="You are an assistant") == [("system", "You are an assistant"), *expected]
    assert messages(row | {"system": "own"}, system="other") == [("system", "own"), *expected]
    assert messages(row | {"context": " \n", "instruction": "q? "}) == [("user", "q? "), ("assistant", "a")]
    assert messages(row | {"context": None, "instruction": ""}) == [("assistant", "a")]
    assert messages(row | {"response": "\t"}) == [("user", "c\n\nq?")]


def test_columns_are_mapped() -> None:
    row = {"question": "q", "answer": "a", "text": "elsewhere"}
    mapping = {"instruction": "question", "response": "answer"}
    assert messages(row, columns=mapping) == [("user", "q"), ("assistant", "a")]
    assert recognised(row, columns=mapping).reason == "Dolly (columns question, answer)"
    assert messages({"chat": [USER, ASSISTANT]}, columns={"messages": "chat"}) == [("user", "q"), ("assistant", "a")]
    both = {"instruction": "q", "response": "bad", "better": "good"}
    assert messages(both, columns={"response": "better"})[-1] == ("assistant", "good")
    assert "maps response to reply, which is missing; it has columns question, answer" in refused(
        row, columns={"instruction": "question", "response": "reply"}
    )
    with pytest.raises(UsageError, match="did you mean 'response'"):
        example(row, columns={"respones": "answer"})


def test_a_format_may_be_asked_for() -> None:
    row = {"prompt": "q", "completion": "a", "text": "words"}
    assert example(row, format="text").text == "words"
    assert "as data.format says" in recognised(row, format="text").reason
    assert "wanted instruction and response or output, as data.format says" in refused(row, format="dolly")


def test_unknown_columns_are_listed_with_what_to_do() -> None:
    message = refused({"frage": "q", "antwort": "a"})
    assert "got columns frage, antwort; wanted instruction, response" in message
    assert "data.columns" in message


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "q", "answer": "a"}, "{instruction: question, response: answer}"),
        ({"prompt": "q", "response": "a"}, "{instruction: prompt}"),
        ({"input": "q", "output": "a"}, "{instruction: input, response: output}"),
        ({"Instruction": "q", "Response": "a"}, "{instruction: Instruction, response: Response}"),
    ],
)
def test_columns_of_other_names_come_with_their_mapping(row: dict[str, Any], mapping: str) -> None:
    assert f"--set 'data.columns={mapping}'" in refused(row)
    columns = dict(part.split(": ") for part in mapping.strip("{}").split(", "))
    assert messages(row, columns=columns) == [("user", "q"), ("assistant", "a")]


def test_sharegpt_with_tools() -> None:
    call = {"name": "add", "arguments": {"a": 1.0, "b": None, "n": 12345678901234567890}}
    row = {
        "system": "You count.",
        "tools": json.dumps([{"name": "add"}]),
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "3", "weight": None},
        ],
    }
    found = example(row)
    assert found.tools == [{"name": "add"}]
    assert found.messages == [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "3"},
    ]


def test_messages_keep_their_tool_calls_and_lose_their_nulls() -> None:
    arguments = {"city": None, "days": 2, "share": 0.5}
    row = {
        "messages": [
            {"role": "human", "content": [{"type": "text", "text": "we"}, {"type": "text", "text": "ather?"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}},
                {"id": None, "function": {"name": "g", "arguments": arguments}},
                {"name": "h", "arguments": ""},
            ]},
            {"role": "tool", "content": "sun", "tool_call_id": "1", "name": None},
            {"role": "assistant", "content": "", "tool_calls": None},
            {"role": "assistant", "content": "", "reasoning_content": "hm"},
        ],
        "tools": [],
    }  # fmt: skip
    found = example(row, system="s")
    assert found.tools is None
    assert json.dumps(found.messages) == json.dumps([
        {"role": "system", "content": "s"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}},
            {"function": {"name": "g", "arguments": arguments}},
            {"type": "function", "function": {"name": "h", "arguments": {}}},
        ]},
        {"role": "tool", "content": "sun", "tool_call_id": "1"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ])  # fmt: skip


def test_a_conversation_with_a_system_turn_keeps_it() -> None:
    row = {"messages": [{"role": "system", "content": "own"}, USER, ASSISTANT]}
    assert messages(row, system="other")[0] == ("system", "own")


def test_prompt_and_completion_are_text_or_messages() -> None:
    text = example({"prompt": "q ", "completion": "a"})
    assert (text.prompt, text.completion) == ("q ", "a")
    chat = example({"prompt": [USER], "completion": [ASSISTANT]}, system="s")
    assert chat.prompt == [{"role": "system", "content": "s"}, USER]
    assert chat.completion == [ASSISTANT]
    assert "wanted both as text or both as lists" in refused({"prompt": [USER], "completion": "a"})


@pytest.mark.parametrize("row", [{"text": "t"}, {"prompt": "q", "completion": "a"}])
def test_a_system_turn_needs_turns(row: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"data\.system"):
        example(row, system="s")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": 5, "response": "a"}, "field 'instruction' is a number (5), wanted text"),
        ({"instruction": "q", "output": ["a"]}, "field 'output' is a list (['a']), wanted text"),
        ({"instruction": "q", "response": True}, "field 'response' is true/false"),
        ({"text": {"a": 1}}, "field 'text' is an object"),
        ({"text": "x\ud83d"}, "field 'text' holds half a character"),
        ({"messages": "hello"}, "field 'messages' is text, wanted a list of turns"),
        ({"messages": [USER, "hi"]}, "turn 2 is text"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "turn 2: 'content' is a number (3), wanted text"),
        ({"messages": [{"role": "pirate", "content": "arr"}]}, "turn 1 has role 'pirate', wanted one of system"),
        ({"messages": [{"human": "q", "assistant": "a"}]}, "turn 1 has no role, it has human, assistant; wanted role"),
        ({"messages": "[{'role': 'user', 'content': 'q'}]"}, "Python wrote it, not JSON: save the rows as .jsonl"),
        ({"messages": [{"role": ["x"], "content": "arr"}]}, "turn 1 has role ['x']"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1: 'content' has a part 'image'"),
        ({"messages": [ASSISTANT | {"tool_calls": [{"id": 1}]}]}, "turn 1: 'tool_calls' holds a call without a name"),
        ({"messages": [ASSISTANT | {"tool_calls": [{"name": "f", "arguments": "{a"}]}]}, "of f is not JSON: '{a'"),
        ({"messages": [USER], "tools": "nope"}, "field 'tools' is not JSON"),
        ({"messages": [USER], "tools": "[1]"}, "field 'tools' is a list, wanted a list of tool descriptions"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "turn 1: 'value' is not JSON"),
    ],
)
def test_wrong_fields_are_named_with_row_field_and_type(row: dict[str, Any], expected: str) -> None:
    assert expected in refused(row)


@pytest.mark.parametrize(
    "other",
    [{"messages": [USER]}, {"text": "t"}, {"instruction": None, "response": None, "prompt": "q", "completion": "a"}],
)
def test_mixed_formats_name_both_rows(other: dict[str, Any]) -> None:
    found = recognise([("rows.jsonl line 1", {"instruction": "q", "response": "a"})], DataSection())
    with pytest.raises(
        DataError, match=r"^rows\.jsonl line 8: is .*, but rows\.jsonl line 1 is Dolly; keep one format"
    ):
        found.example(other, "rows.jsonl line 8")


def test_rows_of_sharegpt_and_messages_do_not_mix() -> None:
    found = recognised({"conversations": [{"from": "human", "value": "q"}]})
    with pytest.raises(DataError, match="row 2: is messages, but row 1 is ShareGPT"):
        found.example({"conversations": [USER]}, "row 2")


def test_a_row_without_any_known_column_is_named() -> None:
    with pytest.raises(DataError, match="row 2: has columns junk, but row 1 is Dolly"):
        recognised({"instruction": "q", "response": "a"}).example({"junk": 1}, "row 2")


def test_rows_that_show_nothing_do_not_decide_the_format() -> None:
    rows = [("row 1", {"conversations": []}), ("row 2", {"conversations": [{"from": "human", "value": "q"}]})]
    found = recognise(rows, DataSection())
    assert found.example(rows[0][1], "row 1").messages == []
    assert found.name == "sharegpt"


def test_a_row_whose_answer_is_missing_has_no_answer() -> None:
    found = recognised({"instruction": "q", "response": "a"})
    assert found.example({"instruction": "q"}, "row 2").messages == [USER]


def test_alpaca_s_input_follows_its_instruction() -> None:
    row = {"instruction": "Translate to French:", "input": "cheese", "output": "fromage"}
    assert messages(row) == [("user", "Translate to French:\n\ncheese"), ("assistant", "fromage")]
    assert messages(row | {"input": ""}) == [("user", "Translate to French:"), ("assistant", "fromage")]
    swapped = {"instruction": "Translate to French:", "context": "cheese", "response": "fromage"}
    assert messages(swapped)[0] == ("user", "cheese\n\nTranslate to French:")
    for format in ("alpaca", "dolly"):  # the column decides the order, whatever the data set is called
        assert messages(row, format=format) == messages(row)
        assert messages(swapped, format=format) == messages(swapped)
    mapped = {"instruction": "Translate to French:", "passage": "cheese", "answer": "fromage"}
    names = {"input": "passage", "output": "answer"}
    assert messages(mapped, columns=names) == messages(row)
    assert messages(mapped, columns={"context": "passage", "response": "answer"}) == messages(swapped)


def test_alpaca_rows_without_an_input_stay_alpaca_s() -> None:
    rows = [{"instruction": "q", "input": "i", "output": "a"}, {"instruction": "q", "output": "a"}]
    found = recognised(rows[0])
    assert found.example(rows[1], "row 2").messages == [USER, ASSISTANT]
    assert recognised(rows[1]).name == "alpaca"
    dolly = recognised({"instruction": "q", "context": "c", "response": "a"})
    assert dolly.example({"instruction": "q", "context": None, "response": "a"}, "row 2").messages == [USER, ASSISTANT]


def test_history_is_earlier_turns() -> None:
    row = {"instruction": "And now?", "output": "ok", "history": [["Hi", "Hello"]]}
    assert messages(row, system="s") == [
        ("system", "s"), ("user", "Hi"), ("assistant", "Hello"), ("user", "And now?"), ("assistant", "ok"),
    ]  # fmt: skip
    assert messages(row | {"history": json.dumps(row["history"])}) == messages(row)
    assert messages(row | {"history": []}) == [("user", "And now?"), ("assistant", "ok")]
    assert "field 'history' holds ['Hi']; wanted pairs" in refused(row | {"history": [["Hi"]]})
    for history in ({"Hi": "Hello"}, 5, True):
        assert "wanted a list of pairs" in refused(row | {"history": history})


def test_columns_may_be_nested() -> None:
    row = {"id": 1, "chat": {"turns": [USER, ASSISTANT]}}
    assert messages(row, columns={"messages": "chat.turns"}) == [("user", "q"), ("assistant", "a")]
    assert recognised(row, columns={"messages": "chat.turns"}).reason.startswith("messages (column chat.turns")
    assert messages({"a.b": [USER, ASSISTANT]}, columns={"messages": "a.b"}) == [("user", "q"), ("assistant", "a")]
    assert "maps messages to chat.rows, which is missing" in refused(row, columns={"messages": "chat.rows"})


def test_keys_and_roles_of_turns_may_be_mapped() -> None:
    row = {"messages": [{"who": "visitor", "says": "q"}, {"who": "guide", "says": "a"}]}
    names = {"columns": {"role": "who", "content": "says"}, "roles": {"visitor": "user", "guide": "assistant"}}
    assert messages(row, **names) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(UsageError, match=r"data\.roles maps guide to 'guru'; wanted one of assistant"):
        example(row, **(names | {"roles": {"guide": "guru"}}))


def test_columns_that_nobody_reads_are_named() -> None:
    rows = [
        {"messages": [USER, ASSISTANT], "id": 1, "chosen": None, "notes": ""},
        {"messages": [USER, ASSISTANT], "rejected": "x"},
        {"messages": [USER, ASSISTANT], "notes": "n", "tools": [], "weight": 1},
    ]
    found = recognise([("row 1", rows[0])], DataSection())
    for row in rows:
        found.example(row, "row")
    assert list(found.unread) == ["id", "rejected", "notes"]


def test_keys_of_turns_that_neither_parley_nor_the_template_reads_are_named() -> None:
    answer = {**ASSISTANT, "ignore": True, "channel": "final", "name": "Bo", "weight": 1, "thinking": "Hm", "note": ""}
    found = recognise([("row 1", {"messages": [USER, answer]})], DataSection())
    found.example({"messages": [USER, answer]}, "row 1")
    found.example({"messages": [{**USER, "speed": 3}, ASSISTANT], "id": 1}, "row 2")
    assert found.unread_with("{% if m.channel %}{% endif %}") == ["id", "ignore of turns", "speed of turns"]
    assert found.unread_with(None) == ["id", "ignore of turns", "channel of turns", "speed of turns"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "t", "train": False}, "got a loss weight of 0 on text"),
        ({"messages": [USER, ASSISTANT], "weight": 5}, "field 'weight' is 5; wanted true, false or a number"),
        ({"messages": [USER, ASSISTANT], "images": ["cat.png"]}, "row 1: has 'images'; Parley trains on text alone"),
        ({"prompt": "q", "completion": "a", "audio": {"path": "x"}}, "row 1: has 'audio'"),
        ({"messages": [USER, ASSISTANT], "label": False}, "label is false, an undesired answer"),
        ({"prompt": "q", "completion": "a", "label": False}, "training.method: kto"),
        ({"prompt": "q", "chosen": "GOOD", "rejected": "BAD"}, "is a preference pair (columns prompt, chosen"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "is a preference pair"),
        ({"role": "user", "content": "q"}, "is a single turn; wanted a conversation a row"),
        ({"from": "human", "value": "q"}, "is a single turn"),
        ({"text": "t", "weight": 0.5}, "got a loss weight of 0.5 on text"),
    ],
)
def test_rows_that_mean_something_else_are_never_trained_on_in_silence(row: dict[str, Any], said: str) -> None:
    assert said in refused(row)


def test_a_preference_set_may_be_trained_on_its_chosen_answers() -> None:
    found = example({"prompt": "q", "chosen": "GOOD", "rejected": "BAD"}, columns={"completion": "chosen"})
    assert (found.prompt, found.completion) == ("q", "GOOD")


@pytest.mark.parametrize("row", [{"messages": [USER, ASSISTANT]}, {"instruction": "q", "output": "a"}])
def test_a_row_s_own_flag_is_on_its_answers(row: dict[str, Any]) -> None:
    found = example(row | {"weight": 0.5}).messages
    assert found == [USER, ASSISTANT | {"weight": 0.5}]
    assert recognised(row | {"train": True}).name == recognised(row).name


def test_a_conversation_may_be_json_text() -> None:
    assert messages({"messages": json.dumps([USER, ASSISTANT])}) == [("user", "q"), ("assistant", "a")]
    assert "field 'messages' is not JSON" in refused({"messages": "[{"})


def test_a_class_label_is_a_column_and_no_flag() -> None:
    found = recognised({"text": "t", "label": 0})
    assert found.example({"text": "t", "label": 0}, "row 1").text == "t"
    assert list(found.unread) == ["label"]


def test_the_first_row_that_shows_its_format_decides() -> None:
    rows = [
        ("row 1", {"instruction": "q", "output": "a"}),
        ("row 2", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
    ]
    assert recognise(rows, DataSection()).format.name == "alpaca"
    assert recognise(rows[::-1], DataSection()).format.name == "messages"
