"""Prompts in token ids, the length of a model's context, and the tokens that end an answer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parley.data.example import Message
from parley.data.render import render, render_prompt
from parley.data.supervision import ControlText
from parley.errors import DataError

Tools = list[dict[str, Any]]


def prompt_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Tools | None,
    control_tokens: ControlText = "auto",
) -> list[int]:
    """The rendered conversation with the generation prompt. Raises DataError where it fills the model's context.

    `control_tokens`: as in training, data.control_tokens.
    """
    prompt = render_prompt(tokenizer, messages, tools, control_tokens)
    context = context_length(model)
    if context is not None and len(prompt) >= context:
        raise DataError(
            f"the conversation is {len(prompt)} tokens and the model's context is {context}; "
            "shorten it or start a new one"
        )
    return prompt


def context_length(model: PreTrainedModel) -> int | None:
    """The model's maximum number of positions; None where it has no limit."""
    return model.config.get_text_config().to_dict().get("max_position_embeddings")


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the checkpoint's, the tokenizer's and the chat template's own."""
    return end_of_answer_ids(model.generation_config.eos_token_id, tokenizer)


def end_of_answer_ids(declared: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that `end_of_turn_ids` gives, without a model: `declared` are the checkpoint's own."""
    # The three differ in many checkpoints: base models that were tuned to chat keep the base's end of text.
    ends = set(declared if isinstance(declared, list) else [declared])
    ends |= {tokenizer.eos_token_id, template_end_of_turn(tokenizer)}
    return sorted(end for end in ends if end is not None)


def template_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that training teaches to end a turn with: the last supervised one of a rendered turn."""
    if not tokenizer.chat_template:
        return None
    turn = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    supervised = [token for token, is_supervised in zip(turn.input_ids, turn.mask, strict=True) if is_supervised]
    return supervised[-1] if supervised and supervised[-1] in tokenizer.added_tokens_decoder else None
