"""Greedy answers of a model whose weights are sharded: every process generates the same answers at the same time.

Each forward pass gathers weights from all processes, so that none may run one alone. The schedulers of the other
backends decide by the clock when they run one; transformers' `generate` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parley.config import GenerationSection
from parley.data.example import Message
from parley.data.supervision import ControlText
from parley.inference.hf import inference_mode_of
from parley.inference.prompts import end_of_turn_ids, prompt_ids
from parley.models.base_answers import require_base


def generate_in_lockstep(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    settings: GenerationSection,
    *,
    base: bool = False,
    control_tokens: ControlText = "auto",
) -> list[str]:
    """The greedy answer to each conversation, as `inference.generate.generate` gives it with temperature 0.

    Every process calls this with the same conversations. Raises DataError for a prompt that fills the context, and
    ModelError for the base of a model that has none.
    """
    assert settings.temperature == 0, "samples would differ between processes"
    if not conversations:
        return []
    if base:
        require_base(model)
    prompts = [prompt_ids(model, tokenizer, messages, None, control_tokens) for messages in conversations]
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    without_adapter = model.disable_adapter() if base else nullcontext()
    with inference_mode_of(model), without_adapter, torch.no_grad():
        ids_BL = inner.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=False, max_new_tokens=settings.max_new_tokens, synced_gpus=True, pad_token_id=pad,
            eos_token_id=end_of_turn_ids(model, tokenizer),
        )  # fmt: skip
    return tokenizer.batch_decode(ids_BL[:, longest:], skip_special_tokens=True)
