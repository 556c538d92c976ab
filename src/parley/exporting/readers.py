"""transformers as a reader of exports: a merged model's folder, or an adapter's through PEFT."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from parley.errors import ModelError, one_line
from parley.exporting.reference import transformers_logits
from parley.exporting.samples import Prompt, ScoredRow

BATCH = 16


class TransformersReader:
    """A folder that transformers alone loads, in float32."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = self._load(folder, dtype)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{self.program} refuses it ({one_line(error)})") from None

    @property
    def program(self) -> str:
        return f"transformers {transformers.__version__}"

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return list(
            self.tokenizer.apply_chat_template(
                prompt.messages, tools=prompt.tools, add_generation_prompt=True, return_dict=False, tokenize=True
            )
        )

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Tensor]:
        return transformers_logits(self.model, rows)

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return [
            answer
            for start in range(0, len(prompts), BATCH)
            for answer in self._batch(prompts[start : start + BATCH], max_new_tokens)
        ]

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        self.tokenizer.padding_side = "left"
        ids = {"input_ids": [self.prompt_ids(prompt) for prompt in prompts]}
        batch = self.tokenizer.pad(ids, padding=True, return_tensors="pt")
        out = self.model.generate(
            **batch.to(self.model.device), do_sample=False, max_new_tokens=max_new_tokens, temperature=None, top_p=None
        )
        new = out[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def ends_answers(self, token: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.model = None
        gc.collect()
