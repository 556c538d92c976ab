"""A conversation as its chat template writes it: transformers' own text, traced, with its errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from parley.data.example import LOSS_KEYS, Arguments, Message
from parley.data.template import ChatTemplate, RenderedText, compiled
from parley.data.template_limits import TemplateLimitError
from parley.data.written_numbers import has_written, without_texts, written_json
from parley.errors import DataError, ModelError
from parley.text import one_line

# A template is a program that runs on the user's data, and may do anything wrong that a program can.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def render_text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, prompt: bool = False
) -> RenderedText:
    """`tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)`, traced.

    Numbers of a call's arguments are as the row wrote them: 1.10 where apply_chat_template has 1.1.

    Raises DataError in one line where the template refuses the conversation; ModelError where it is not Jinja.
    """
    if not messages:
        raise DataError("got a conversation without messages, wanted at least one")
    template = template_of(tokenizer, tools)
    try:
        special = tokenizer.special_tokens_map
        # All supported versions of transformers give plain messages to the template unchanged, so the comparison,
        # which is a second rendering, is left out.
        if is_plain(tokenizer, messages, tools):
            return template.render(normalised(messages), tools, prompt, **special)
        written = list(messages)
        messages = without_texts(written) if has_written(written) else written
        expected = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        given: Callable[[Sequence[Message]], list[Message]] = normalised
        rendered = template.render(given(messages), tools, prompt, **special)
        if rendered.text != expected:  # before 5.24 transformers gave messages to the template as they are
            given = list
            rendered = template.render(given(messages), tools, prompt, **special)
        if rendered.text == expected and messages is not written:  # now with 1.10 in place of 1.1
            return template.render(given(written), tools, prompt, **special)
    except TemplateLimitError as error:
        raise DataError(f"the chat template was stopped: {error}; set model.chat_template") from None
    except TEMPLATE_ERRORS as error:
        raise DataError(f"the chat template refuses this conversation: {one_line(error)}") from None
    if rendered.text != expected:
        raise DataError("the chat template writes this conversation differently each time; set model.chat_template")
    return rendered


def check_bounds(
    tokenizer: Any,
    conversation: Any,
    tools: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    **settings: Any,
) -> None:
    """Run the chat template within its bounds, before `tokenizer.apply_chat_template` runs it without any.

    Raises ModelError where it is stopped. What else goes wrong, apply_chat_template reports in its own words.
    """
    settings.pop("documents", None)
    try:
        template = compiled(tokenizer.get_chat_template(chat_template, tools))
        batch = conversation if conversation and isinstance(conversation[0], list | tuple) else [conversation]
        for messages in batch:
            template.render(messages, tools, add_generation_prompt, **(tokenizer.special_tokens_map | settings))
    except TemplateLimitError as error:
        raise ModelError(f"the chat template was stopped: {error}; set another chat_template") from None
    except TEMPLATE_ERRORS:
        return


def template_of(tokenizer: Any, tools: Sequence[dict[str, Any]] | None) -> ChatTemplate:
    try:
        return compiled(tokenizer.get_chat_template(tools=tools))
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
    except RecursionError:
        raise ModelError("the chat template is nested too deeply; set model.chat_template") from None


def is_stock(tokenizer: Any) -> bool:
    """Whether it is transformers that renders. A tokenizer class with its own method, as for mistral-common, may write
    other text than its template."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template


def is_plain(tokenizer: Any, messages: Sequence[Message], tools: Any) -> bool:
    """Whether there is nothing that versions of transformers or tokenizers hand to the template in different ways."""
    return (
        is_stock(tokenizer)
        and tools is None
        and all(
            message.keys() <= {"role", "content"} and isinstance(message.get("content"), str) for message in messages
        )
    )


def for_template(tokenizer: Any, messages: Sequence[Message], tools: Any) -> list[Message]:
    """`messages` as the chat template takes them: without loss weights, arguments of calls as objects or as text."""
    cleaned = [
        {name: value for name, value in message.items() if name not in LOSS_KEYS}
        if any(name in message for name in LOSS_KEYS)
        else message
        for message in messages
    ]
    if not any(message.get("tool_calls") for message in cleaned):
        return cleaned
    template = template_of(tokenizer, tools)
    return [_with_arguments(message, template) if message.get("tool_calls") else message for message in cleaned]


def _with_arguments(message: Message, template: ChatTemplate) -> Message:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, template) for call in calls]}


def _call_with_arguments(call: Any, template: ChatTemplate) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, dict):
        return call
    # The object where a template takes both: Gemma 4's writes text inside braces of its own, {{"q": 1}}.
    if template.takes_object_arguments or not template.takes_text_arguments:
        return call
    text = arguments.text if isinstance(arguments, Arguments) else written_json(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def normalised(messages: Sequence[Message]) -> list[Message]:
    """Messages as transformers 5.24 gives them to a template: no null fields, reasoning under its usual names."""
    normal: list[Message] = []
    for message in messages:
        fields = {name: value for name, value in message.items() if value is not None}
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((fields[name] for name in names if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        normal.append(fields)
    return normal
