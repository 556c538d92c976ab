"""Prompts of several lengths, a reward that differs between answers, and TRL's trainer beside Parley's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from parley.config import LLAMA_PROJECTIONS, RunConfig
from parley.models.load import load_model


def demo_adapter(seed: int = 0, **lora: Any) -> tuple[PeftModel, Any]:
    """The embedded model with an adapter that has not been trained."""
    model, tokenizer = load_model(RunConfig.create({"model": {"name": "parley-demo", "dtype": "float32"}}).model)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA_PROJECTIONS, **lora)), tokenizer


def shake(model: torch.nn.Module, seed: int = 1, size: float = 0.02) -> None:
    """Move every trained weight, as some steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def prompts() -> Dataset:
    texts = ["What is 2 plus 3?", "Hi", "Which day comes after Monday, if you please?", "What is the opposite of big?"]
    return Dataset.from_list([{"prompt": user(text), "answer": str(index)} for index, text in enumerate(texts)])


def length_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Longer answers, and an odd number that keeps groups from being equal."""
    return [len(ids) + sum(ids) % 7 / 7 for ids in completion_ids]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
