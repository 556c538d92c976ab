"""train_on_responses_only: labels equal the masks that Parley renders itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from parley.compat.unsloth import train_on_responses_only
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.render import render
from parley.errors import DataError, UsageError

USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy, matey!"}],
    [
        {"role": "system", "content": "Naïve 🏴‍☠️ system"},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "🏴‍☠️ Arr\n\n- one"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": "two ☕"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": '{"name": "weather"}'},
        {"role": "ipython", "content": "sunny"},
        {"role": "assistant", "content": "It be sunny."},
        {"role": "system", "content": "Now stop."},
    ],
]


def trainer_with(tokenizer: Any, conversations: list[Any], eval_dataset: Any = None) -> Any:
    """What a trainer holds after it has made tokens of text: all of it learned."""
    ids = [render(tokenizer, conversation).input_ids for conversation in conversations]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return SimpleNamespace(train_dataset=rows, eval_dataset=eval_dataset, processing_class=tokenizer)


def rendered_labels(tokenizer: Any, conversation: list[Any], train_on: Any = "all") -> list[int]:
    rendered = render(tokenizer, conversation, train_on=train_on)
    return [
        token if learned else IGNORE_INDEX for token, learned in zip(rendered.input_ids, rendered.mask, strict=True)
    ]


def test_labels_are_the_rendered_masks(tiny_tokenizer: Any) -> None:
    trainer = trainer_with(tiny_tokenizer, CONVERSATIONS)
    assert train_on_responses_only(trainer, USER, ASSISTANT) is trainer
    assert trainer.train_dataset["labels"][:] == [rendered_labels(tiny_tokenizer, each) for each in CONVERSATIONS]
    learned = [token for token in trainer.train_dataset[2]["labels"] if token != IGNORE_INDEX]
    assert tiny_tokenizer.decode(learned) == '{"name": "weather"}<|eot_id|>It be sunny.<|eot_id|>'


def test_without_parts_those_of_the_template_are_taken(tiny_tokenizer: Any) -> None:
    trainer = train_on_responses_only(trainer_with(tiny_tokenizer, CONVERSATIONS))
    assert trainer.train_dataset["labels"][:] == [rendered_labels(tiny_tokenizer, each) for each in CONVERSATIONS]


def test_last_response_only(tiny_tokenizer: Any) -> None:
    trainer = train_on_responses_only(trainer_with(tiny_tokenizer, CONVERSATIONS), last_response_only=True)
    wanted = [rendered_labels(tiny_tokenizer, each, "last") for each in CONVERSATIONS]
    assert trainer.train_dataset["labels"][:] == wanted


def test_held_out_rows_are_labelled_too(tiny_tokenizer: Any) -> None:
    heldout = trainer_with(tiny_tokenizer, CONVERSATIONS[:1]).train_dataset
    trainer = train_on_responses_only(trainer_with(tiny_tokenizer, CONVERSATIONS, heldout), USER, ASSISTANT)
    assert trainer.eval_dataset["labels"][:] == [rendered_labels(tiny_tokenizer, CONVERSATIONS[0])]
    trainer = train_on_responses_only(trainer_with(tiny_tokenizer, CONVERSATIONS, {"a": heldout}), USER, ASSISTANT)
    assert trainer.eval_dataset["a"]["labels"][:] == [rendered_labels(tiny_tokenizer, CONVERSATIONS[0])]


def test_text_without_end_of_turn_tokens_is_learned_up_to_the_next_part(tiny_tokenizer: Any) -> None:
    text = "### Instruction:\nOne\n### Response:\nArr\n### Instruction:\nTwo\n### Response:\nAye<|end_of_text|>"
    trainer = SimpleNamespace(processing_class=tiny_tokenizer, eval_dataset=None)
    trainer.train_dataset = Dataset.from_dict({"input_ids": [tiny_tokenizer(text)["input_ids"]]})
    train_on_responses_only(trainer, "### Instruction:\n", "### Response:\n")
    learned = [token for token in trainer.train_dataset[0]["labels"] if token != IGNORE_INDEX]
    assert tiny_tokenizer.decode(learned) == "Arr\nAye<|end_of_text|>"


def test_white_space_of_parts_may_differ_where_the_text_has_them_otherwise(tiny_tokenizer: Any) -> None:
    trainer = trainer_with(tiny_tokenizer, CONVERSATIONS)
    train_on_responses_only(trainer, USER.replace("\n\n", " "), ASSISTANT.strip() + "\n \n")
    assert trainer.train_dataset["labels"][:] == [rendered_labels(tiny_tokenizer, each) for each in CONVERSATIONS]


def test_rows_without_a_response_go_and_a_data_set_of_them_is_an_error(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    silent = [{"role": "user", "content": "Anybody?"}, {"role": "assistant", "content": " "}]
    trainer = trainer_with(tiny_tokenizer, [*CONVERSATIONS, silent])
    train_on_responses_only(trainer, USER, ASSISTANT)
    assert len(trainer.train_dataset) == 3
    assert "1 of 4 rows have nothing to learn" in caplog.text
    with pytest.raises(DataError, match=r"no row has anything after '<\|im_start\|>assistant"):
        train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n")


def test_parts_that_say_nothing_and_rows_without_ids_are_errors(tiny_tokenizer: Any) -> None:
    trainer = trainer_with(tiny_tokenizer, CONVERSATIONS)
    for parts in [(USER, None), (None, ASSISTANT), (USER, " ")]:
        with pytest.raises(UsageError, match=r"got (no|an empty) instruction_part"):
            train_on_responses_only(trainer, *parts)
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    with pytest.raises(UsageError, match="give both"):
        train_on_responses_only(trainer, tokenizer=plain)
    trainer.train_dataset = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(DataError, match=r"no input_ids; make the trainer first, with parley\.SFTTrainer"):
        train_on_responses_only(trainer, USER, ASSISTANT)


def test_return_function_labels_a_batch(tiny_tokenizer: Any) -> None:
    trainer = trainer_with(tiny_tokenizer, CONVERSATIONS)
    label = train_on_responses_only(trainer, USER, ASSISTANT, return_function=True)
    labels = label({"input_ids": trainer.train_dataset["input_ids"][:]})["labels"]
    assert labels == [rendered_labels(tiny_tokenizer, each) for each in CONVERSATIONS]


# Turns as the templates of these families write them: control tokens, the user's header, the assistant's, the end.
FAMILY_TURNS = {
    "gemma-4": (["<|turn>", "<turn|>"], "<|turn>user\n", "<|turn>model\n", "<turn|>", "\n"),
    "granite": (
        ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
        "<|start_of_role|>user<|end_of_role|>",
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>",
        "\n",
    ),
    "gpt-oss": (
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
        "<|start|>user<|message|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "<|end|>",
        "",
    ),
    "cohere": (
        ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"],
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "",
    ),
    "deepseek": (["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], "<｜User｜>", "<｜Assistant｜>", "", ""),
}


@pytest.mark.parametrize("family", FAMILY_TURNS)
def test_without_parts_those_of_each_family_s_template_are_taken(tiny_tokenizer: Any, family: str) -> None:
    tokens, user, assistant, end, gap = FAMILY_TURNS[family]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    last = "<｜end▁of▁sentence｜>" if family == "deepseek" else end
    if family == "deepseek":
        tokenizer.eos_token = last
    if family == "gpt-oss":
        last, tokenizer.eos_token = "<|return|>", "<|return|>"
    tokenizer.chat_template = (
        "{%- for message in messages %}{%- if message['role'] == 'user' %}"
        f"{{{{- {user!r} + message['content'] + {end + gap!r} }}}}{{%- else %}}"
        f"{{{{- {assistant!r} + message['content'] + ({last + gap!r} if loop.last or {not end} else {end + gap!r}) }}}}"
        "{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {assistant!r} }}}}{{%- endif %}}"
    )
    turns = [*CONVERSATIONS[0], *CONVERSATIONS[1][1:]]
    trainer = train_on_responses_only(trainer_with(tokenizer, [turns]))
    supervised = tokenizer.decode([token for token in trainer.train_dataset[0]["labels"] if token != IGNORE_INDEX])
    header = assistant.removeprefix("<|start|>assistant") if family == "gpt-oss" else ""
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    ends = [end or last] * (len(answers) - 1) + [last]
    assert supervised == "".join(f"{header}{answer}{each}" for answer, each in zip(answers, ends, strict=True))
