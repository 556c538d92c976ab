"""Golden conversations: how a run proves later that it is served with the token ids it was trained with."""

from __future__ import annotations

from typing import Any

from parley.data.conversation_text import render_text
from parley.data.example import Message
from parley.data.render import render, render_prompt
from parley.errors import DataError

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello. How can I help?"}],
    [
        {"role": "system", "content": "You are an assistant"},
        {"role": "user", "content": "Two lines,\n\nand a naïve café – 42 °C ☕"},
        {"role": "assistant", "content": "Understood."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "You're welcome."},
    ],
]


def golden_ids(tokenizer: Any) -> list[dict[str, Any]]:
    """Each conversation with its ids, and the ids that ask for its last answer.

    Conversations go without their system turn where the template refuses one. Empty without a template.
    """
    if not tokenizer.chat_template:
        return []
    entries = []
    for messages in CONVERSATIONS:
        if not _accepts(tokenizer, messages):
            messages = [message for message in messages if message["role"] != "system"]
        ids = render(tokenizer, messages).input_ids
        entries.append({"messages": messages, "input_ids": ids, "prompt_ids": render_prompt(tokenizer, messages[:-1])})
    return entries


def _accepts(tokenizer: Any, messages: list[Message]) -> bool:
    try:
        render_text(tokenizer, messages, None)
    except DataError:
        return False
    return True
