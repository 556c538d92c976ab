"""The trained model's own prompts, logits and answers, measured once and compared with every export of a run."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from parley.config import GenerationSection
from parley.data.render import render_prompt
from parley.errors import DeviceError
from parley.exporting.samples import Prompt, Samples, ScoredRow, verification_samples
from parley.exporting.trained_model import TrainedModel
from parley.inference.generate import end_of_turn_ids, generate
from parley.units import GIB

KEPT_BYTES = 2**28
"""Of logits that are kept for the comparison."""


@dataclass(frozen=True)
class Reference:
    """`logits` has a tensor (S, V) float32 a row of `samples`; `answers` belong to its first prompts."""

    samples: Samples
    prompt_ids: list[list[int]]
    logits: list[Tensor]
    answers: list[str]
    end_ids: list[int]
    dtype: torch.dtype


def measure_reference(trained: TrainedModel) -> Reference:
    """Load the trained model, measure it and free it again.

    Raises DeviceError where it does not fit into memory.
    """
    parameters = sum(_size(shape) for shape in trained.weights.shapes().values())
    samples = _within_memory(verification_samples(trained, parameters), trained.config.vocab_size)
    prompts = samples.prompts
    dtype = _dtype(trained, parameters)
    model = trained.load(dtype)
    try:
        greedy = GenerationSection(temperature=0, min_p=0, max_new_tokens=samples.answer_tokens)
        answers = _answers(model, trained.tokenizer, prompts[: samples.answer_count], greedy)
        return Reference(
            samples,
            [render_prompt(trained.tokenizer, prompt.messages, prompt.tools) for prompt in prompts],
            list(transformers_logits(model, samples.rows)),
            answers,
            end_of_turn_ids(model, trained.tokenizer),
            dtype,
        )
    finally:
        del model
        gc.collect()


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Prompt], greedy: GenerationSection) -> list[str]:
    """Prompts with the same tools are answered together."""
    answers = [""] * len(prompts)
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(prompt.tools, default=str), []).append(index)
    for group in groups.values():
        conversations = [prompts[index].messages for index in group]
        found = generate(model, tokenizer, conversations, greedy, prompts[group[0]].tools)
        for index, answer in zip(group, found, strict=True):
            answers[index] = answer
    return answers


@torch.inference_mode()
def transformers_logits(model: torch.nn.Module, rows: Sequence[ScoredRow]) -> Iterator[Tensor]:
    """For each row the logits at its positions, (S, V) float32 on the CPU, from a model of transformers."""
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        # The head is computed for the asked positions alone: at a vocabulary of 128,256 the others cost more than
        # the rest of a small model.
        keep = torch.tensor(row.positions, device=model.device)
        logits = model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits
        yield logits[0].float().cpu()


def _within_memory(samples: Samples, vocabulary: int) -> Samples:
    kept, most = [], max(1, KEPT_BYTES // (4 * vocabulary))
    for row in samples.rows:
        if most > 0:
            kept.append(ScoredRow(row.input_ids, row.positions[:most]))
        most -= len(row.positions)
    return Samples(samples.source, samples.prompts, kept, samples.answer_count, samples.answer_tokens, samples.left_out)


def _dtype(trained: TrainedModel, parameters: int) -> torch.dtype:
    """float32 where memory allows, else the checkpoint's own type."""
    free = psutil.virtual_memory().available
    for dtype in (torch.float32, torch.bfloat16):
        if parameters * dtype.itemsize * 1.1 < free:
            return dtype
    raise DeviceError(
        f"{trained.name}: to verify the export the trained model has to be loaded, which takes "
        f"{2.2 * parameters / GIB:.1f} GiB where {free / GIB:.1f} are free; free memory, or add --no-verify"
    )


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
