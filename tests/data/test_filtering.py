"""Which rendered rows reach the trainer."""

from __future__ import annotations

import copy
from typing import Any

from parley.config import DataSection
from parley.data.example import Example
from parley.data.filtering import NO_ANSWER, NOTHING_SUPERVISED, render_examples
from parley.data.summary import DataSummary

USER, ANSWER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Ahoy!"}


def kept(tokenizer: Any, *examples: Example, max_length: int = 512, **settings: Any) -> tuple[list[str], DataSummary]:
    summary = DataSummary(source="rows")
    outcomes = render_examples(examples, tokenizer, DataSection(**settings), max_length, summary)
    return [outcome[0].origin for outcome in outcomes if outcome is not None], summary


def test_a_row_without_a_supervised_token_is_dropped(tiny_tokenizer: Any) -> None:
    nothing = [
        Example("blank text", text="  "),
        Example("blank completion", prompt="two", completion=" "),
        Example("blank answer", messages=[USER, {"role": "assistant", "content": " \n"}]),
    ]
    origins, summary = kept(tiny_tokenizer, Example("row 1", messages=[USER, ANSWER]), *nothing)
    assert origins == ["row 1"]
    assert summary.dropped[NOTHING_SUPERVISED].count == 3
    assert kept(tiny_tokenizer, Example("question", messages=[USER]))[1].dropped[NO_ANSWER].count == 1


def test_a_row_whose_first_token_alone_is_supervised_is_dropped(tiny_tokenizer: Any) -> None:
    # Nothing predicts the first token of a row, so its label never reaches the loss.
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    origins, summary = kept(tokenizer, Example("one token", text="a"), Example("two tokens", text="ab\nab"))
    assert origins == ["two tokens"]
    assert summary.dropped[NOTHING_SUPERVISED].count == 1


def test_the_longest_allowed_row_is_kept(tiny_tokenizer: Any) -> None:
    length = len(tiny_tokenizer.apply_chat_template([USER, ANSWER], return_dict=False))
    example = Example("row 1", messages=[USER, ANSWER])
    assert kept(tiny_tokenizer, example, max_length=length)[0] == ["row 1"]
    assert kept(tiny_tokenizer, example, max_length=length - 1)[0] == []
