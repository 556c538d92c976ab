"""Conversations to token ids and a mask of what is supervised, in one pass from the tokenizer's own chat template.

The template writes the text once, and every character of it knows the message that wrote it (data/template.py). Turns
become spans of the text (data/assistant_spans.py), some of them supervised (data/supervision.py), and the tokens'
character offsets carry the spans over (data/encoding.py). So ids are apply_chat_template's own, and ids and mask
cannot drift apart.

    <|start_header_id|>assistant<|end_header_id|>\\n\\nAhoy there!<|eot_id|>
    ------------- not supervised ----------------- -- supervised -------
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from parley.data.assistant_spans import RenderedConversation
from parley.data.control_tokens import ControlTokens, control_tokens, control_tokens_in, strings
from parley.data.date import pin_date
from parley.data.encoding import MaskedText, Rendered, encode_texts, plain_control_tokens
from parley.data.example import Example, Message
from parley.data.supervision import ControlText, EndTokens, RenderOptions, TrainOn, supervise
from parley.data.template_settings import pin_settings, with_row_settings
from parley.data.text_layouts import TextLayouts, text_layouts
from parley.data.text_regions import Span
from parley.errors import DataError, ModelError

__all__ = [
    "RenderOptions",
    "Rendered",
    "control_tokens_in",
    "pin_date",
    "pin_settings",
    "render",
    "render_example",
    "render_many",
    "render_prompt",
]

Tools = list[dict[str, Any]]

AS_TEXT = "rows with control tokens in their text, encoded as plain text"
AS_TOKENS = "rows with control tokens in their text, which the model reads as control tokens"
WEIGHTED = "rows with loss weights between 0 and 1"
UNCLOSED = "rows whose turns the chat template never ends, so that the model does not learn to stop"


def unwritten(what: str) -> str:
    return f"rows whose {what} the chat template never writes"


def render(
    tokenizer: Any,
    messages: list[Message],
    *,
    tools: Tools | None = None,
    train_on: TrainOn = "all",
    end_tokens: EndTokens = "turn",
    control_tokens: ControlText = "auto",
) -> Rendered:
    """The ids that `tokenizer.apply_chat_template(messages, tools=tools)` gives, and their mask.

    Supervised are the assistant's words, calls and reasoning as the template writes them, each with its end-of-turn
    token; RenderOptions and a message's `weight` change that. A token across the edge of the content is supervised. A
    turn of which the template writes no content is not. Control tokens inside content are plain text, where
    apply_chat_template has them as tokens (its `sanitize_control_tokens`); `control_tokens="tokens"` keeps them.

    Raises DataError for a row the template refuses, or one with a second beginning-of-text token; ModelError for a
    tokenizer without chat template or without character offsets.
    """
    options = RenderOptions(train_on, end_tokens, control_tokens)
    return render_example(tokenizer, Example("conversation", messages=messages, tools=tools), options)


def render_example(tokenizer: Any, example: Example, options: RenderOptions | TrainOn = "all") -> Rendered:
    """`render` for a row of any form. Raises as `render` does; the messages leave the row's origin to the caller.

    Text is supervised whole and prompt-completion rows from the completion on; both get one beginning-of-text token
    and one end-of-text token where the tokenizer has them and the text does not bring them along.
    """
    outcome = render_many(tokenizer, [example], options)[0]
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


def render_many(
    tokenizer: Any, examples: Iterable[Example], options: RenderOptions | TrainOn = "all"
) -> list[Rendered | DataError]:
    """`render_example` for many rows at once, encoded as one batch; a DataError in place of a row that has one."""
    return encode(tokenizer, write_texts(tokenizer, examples, options))


def write_texts(
    tokenizer: Any, examples: Iterable[Example], options: RenderOptions | TrainOn = "all"
) -> list[MaskedText | DataError]:
    """The first half of `render_many`: what the template writes. All of it is Python."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer (tokenizer.json)"
        )
    options = options if isinstance(options, RenderOptions) else RenderOptions(options)
    control = control_tokens(tokenizer)
    layouts = text_layouts(tokenizer, control, options)
    outcomes: list[MaskedText | DataError] = []
    for example in examples:
        try:
            outcomes.append(_text(tokenizer, control, example, options, layouts))
        except DataError as error:
            outcomes.append(error)
    return outcomes


def encode(tokenizer: Any, texts: list[MaskedText | DataError]) -> list[Rendered | DataError]:
    """The second half: ids and masks. Most of it is the tokenizer's, which lets other threads run meanwhile."""
    rendered = iter(encode_texts(tokenizer, [text for text in texts if isinstance(text, MaskedText)]))
    return [next(rendered) if isinstance(text, MaskedText) else text for text in texts]


def render_prompt(
    tokenizer: Any, messages: list[Message], tools: Tools | None = None, control_tokens: ControlText = "auto"
) -> list[int]:
    """The ids that ask the model for the next turn: `apply_chat_template(..., add_generation_prompt=True)`'s own, but
    for control tokens inside content, as `render` has them.

    Raises as `render` does.
    """
    _check_template(tokenizer, tools)
    conversation = RenderedConversation(tokenizer, messages, tools, _control_tokens(tokenizer).pattern, prompt=True)
    plain = conversation.control_tokens_in_content() if control_tokens != "tokens" else []
    if plain:
        return plain_control_tokens(tokenizer, MaskedText(conversation.text, [], plain=plain))
    # The template writes the special tokens itself; the tokenizer would add a second beginning of text.
    return tokenizer(conversation.text, add_special_tokens=False)["input_ids"]


def _text(
    tokenizer: Any, control: ControlTokens, example: Example, options: RenderOptions, layouts: TextLayouts | None
) -> MaskedText:
    prompt, completion = example.prompt, example.completion
    if example.template:
        try:
            tokenizer, layouts = with_row_settings(tokenizer, example.template), None  # in a template of its own
        except ModelError as error:
            raise DataError(str(error)) from None
    if example.messages is not None or isinstance(prompt, list):
        first = len(prompt) if isinstance(prompt, list) else 0
        messages = example.messages or [*(prompt or ()), *(completion or ())]
        render = partial(_conversation, tokenizer, control, tools=example.tools, options=options, first=first)
        laid_out = layouts.masked_text(messages, first, render) if layouts and example.tools is None else None
        return laid_out or render(messages)
    if prompt is not None:
        assert isinstance(completion, str)
        supervised_from = 0 if options.train_on == "inputs" else len(prompt)
        return _plain_text(tokenizer, control, prompt + completion, options, supervised_from)
    assert example.text is not None
    return _plain_text(tokenizer, control, example.text, options)


def _conversation(
    tokenizer: Any,
    control: ControlTokens,
    messages: list[Message],
    tools: Tools | None,
    options: RenderOptions,
    first: int = 0,
) -> MaskedText:
    """The text of a conversation that is supervised from message `first` on."""
    _check_template(tokenizer, tools)
    conversation = RenderedConversation(tokenizer, messages, tools, control.pattern)
    in_content = conversation.control_tokens_in_content()
    plain = in_content if options.control_tokens != "tokens" else []
    _check_beginning(tokenizer, conversation.text, plain, messages)
    supervision = supervise(conversation, messages, options, first)
    notes = [unwritten(what) for what in conversation.unwritten()]
    if not supervision.closed:
        notes.append(UNCLOSED)
    if in_content:
        notes.append(AS_TEXT if plain else AS_TOKENS)
    if supervision.weighted:
        notes.append(WEIGHTED)
    spans, excluded, weighted = supervision.spans, supervision.excluded, supervision.weighted
    return MaskedText(conversation.text, spans, excluded, weighted, plain, notes=notes)


def _plain_text(
    tokenizer: Any, control: ControlTokens, text: str, options: RenderOptions, supervised_from: int = 0
) -> MaskedText:
    """The text of a row supervised from one character on, with the tokens for its beginning and end."""
    beginning, end = tokenizer.bos_token, tokenizer.eos_token
    found = [token.span() for token in control.pattern.finditer(text)]
    as_text = options.control_tokens == "text"
    begins = beginning is not None and not as_text and text.startswith(beginning)
    if not as_text and beginning is not None and beginning in text[len(beginning) * begins :]:
        raise _second_beginning(beginning)
    start = max(supervised_from, len(beginning) if begins else 0)
    # A blank completion would supervise the end of text alone, and so teach empty answers.
    if not text[start:].strip() or options.train_on == "nothing":
        start = len(text)
    ends = end is not None and not as_text and text.endswith(end)
    # As ids rather than text, so that the character offsets of the row stay valid.
    head = [] if begins or beginning is None else [tokenizer.bos_token_id]
    tail = [] if end is None or ends else [tokenizer.eos_token_id]
    inside = [span for span in found if not (begins and span[0] == 0) and not (ends and span[1] == len(text))]
    notes = [AS_TEXT if as_text else AS_TOKENS] if inside else []
    spans = [(start, len(text))] if start < len(text) else []
    return MaskedText(text, spans, plain=found if as_text else [], head=head, tail=tail, notes=notes)


def _control_tokens(tokenizer: Any) -> ControlTokens:
    return control_tokens(tokenizer)


def _check_template(tokenizer: Any, tools: Tools | None) -> None:
    try:
        tokenizer.get_chat_template(tools=tools)
    except ValueError:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; set model.chat_template "
            "to a Jinja file, or train on rows of text"
        ) from None


def _check_beginning(tokenizer: Any, text: str, plain: list[Span], messages: list[Message]) -> None:
    """One beginning of text. Templates that write one before every turn, as Llama 2's does, are followed."""
    beginning = tokenizer.bos_token
    if beginning is None or text.count(beginning) < 2:
        return
    if text.startswith(beginning * 2) and (len(beginning), 2 * len(beginning)) not in plain:
        raise DataError(f"the chat template writes {beginning} twice at the start; remove one from it")
    if not plain and any(beginning in string for string in strings(messages)):
        raise _second_beginning(beginning)


def _second_beginning(beginning: str) -> DataError:
    return DataError(
        f"got {beginning} inside the row's own text, where it would begin a second text; remove it, or set "
        "data.control_tokens: text"
    )
