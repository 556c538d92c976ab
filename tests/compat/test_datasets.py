"""to_sharegpt, standardize_sharegpt and apply_chat_template on data sets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from datasets import Dataset

from parley.compat.unsloth import apply_chat_template, standardize_data_formats, standardize_sharegpt, to_sharegpt
from parley.data.render import render
from parley.errors import DataError, UsageError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]
ALPACA = Dataset.from_dict({"instruction": ["Add", "Say"], "input": ["1 and 2", ""], "output": ["3", "arr"]})


def test_sharegpt_turns_become_standard_ones() -> None:
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}], "score": 1.0}]
    dataset = standardize_sharegpt(Dataset.from_list(rows))
    assert dataset[0] == {"conversations": TURNS, "score": 1.0}
    with pytest.raises(DataError, match="columns text; wanted one named conversations or messages"):
        standardize_sharegpt(Dataset.from_dict({"text": ["a"]}))
    broken = [{"conversations": [{"from": "narrator", "value": "Once"}]}]
    with pytest.raises(DataError, match="row 1: turn 1 has from 'narrator'"):
        standardize_sharegpt(Dataset.from_list(broken))


def test_a_stream_is_standardised_too() -> None:
    rows = Dataset.from_dict({"conversations": [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}]]})
    assert list(standardize_data_formats(rows.to_iterable_dataset())) == [{"conversations": TURNS}]


def test_columns_become_turns_and_an_empty_column_s_part_is_left_out() -> None:
    made = to_sharegpt(ALPACA, merged_prompt="{instruction}[[\nYour input is:\n{input}]]")
    assert made["conversations"][:] == [
        [{"from": "human", "value": "Add\nYour input is:\n1 and 2"}, {"from": "gpt", "value": "3"}],
        [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "arr"}],
    ]
    assert made.column_names == ["conversations"]
    assert to_sharegpt(ALPACA)["conversations"][0][0] == {"from": "human", "value": "Add"}
    with pytest.raises(UsageError, match="found no column 'question'; the data set has instruction, input, output"):
        to_sharegpt(ALPACA, merged_prompt="{question}")


def test_conversations_are_extended_with_other_rows() -> None:
    made = to_sharegpt(ALPACA, conversation_extension=3, random_state=1)
    own = [row[:2] for row in to_sharegpt(ALPACA)["conversations"][:]]
    assert [row[:2] for row in made["conversations"][:]] == own
    assert all(len(row) == 6 for row in made["conversations"][:])
    assert to_sharegpt(ALPACA, conversation_extension=3, random_state=1)[:] == made[:]


@pytest.mark.parametrize(
    ("example", "plain", "with_system"),
    [
        (
            "Below is a task.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}",
            "<|begin_of_text|>Below is a task.\n\n### Instruction:\nHi\n\n### Response:\nAhoy<|eot_id|>"
            "### Instruction:\nHi\n\n### Response:\nAhoy<|eot_id|>",
            "<|begin_of_text|>Be brief\n\n### Instruction:\nHi\n\n### Response:\nAhoy<|eot_id|>",
        ),
        (
            "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}",
            "<|begin_of_text|>\nUSER: Hi\nASSISTANT: Ahoy<|eot_id|>\nUSER: Hi\nASSISTANT: Ahoy<|eot_id|>",
            "<|begin_of_text|>Be brief\nUSER: Hi\nASSISTANT: Ahoy<|eot_id|>",
        ),
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n{INPUT}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{OUTPUT}<|eot_id|>",
            "<|begin_of_text|>"
            + 2
            * (
                "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nAhoy<|eot_id|>"
            ),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nAhoy<|eot_id|>",
        ),
    ],
)
def test_an_example_of_an_exchange_becomes_the_template(
    tiny_tokenizer: Any, example: str, plain: str, with_system: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    rows = Dataset.from_dict({"conversations": [[*TURNS, *TURNS], [{"role": "system", "content": "Be brief"}, *TURNS]]})
    assert apply_chat_template(rows, tokenizer, example)["text"][:] == [plain, with_system]
    asked = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert plain.startswith(asked)
    rendered = render(tokenizer, TURNS)
    supervised = [token for token, kept in zip(rendered.input_ids, rendered.mask, strict=True) if kept]
    assert tokenizer.decode(supervised).strip() == "Ahoy<|eot_id|>"


def test_a_default_system_message_stands_in(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    rows = Dataset.from_dict({"conversations": [TURNS]})
    example = "{SYSTEM}\n\nUSER: {INPUT}\nASSISTANT: {OUTPUT}\n\nUSER: {INPUT}\nASSISTANT: {OUTPUT}"
    written = apply_chat_template(rows, tokenizer, example, default_system_message="Arr")["text"][0]
    assert written == "<|begin_of_text|>Arr\n\nUSER: Hi\nASSISTANT: Ahoy<|eot_id|>"
    with pytest.raises(UsageError, match=r"wanted a text with {INPUT} and, after it, {OUTPUT}"):
        apply_chat_template(rows, tokenizer, "USER: {INPUT}")
    with pytest.raises(DataError, match="got columns text; wanted one named conversations or messages"):
        apply_chat_template(Dataset.from_dict({"text": ["a"]}), tokenizer, example)
