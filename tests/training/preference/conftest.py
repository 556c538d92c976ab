"""Pairs of odd lengths, with shared and own prompts, system turns and tools; a tiny adapter that says something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from parley.config import LLAMA_PROJECTIONS, RunConfig
from parley.models.load import load_model

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [turn("user", "What is two and two?")],
        "chosen": [turn("assistant", "Four.")],
        "rejected": [turn("assistant", "It may be five, or six, or seven.")],
    },
    {
        "prompt": [turn("user", "What is two and two?")],
        "chosen": [turn("assistant", "That is four, as everybody knows.")],
        "rejected": [turn("assistant", "No.")],
    },
    {
        "prompt": [turn("system", "Be short."), turn("user", "Name a fish.")],
        "chosen": [turn("assistant", "Cod")],
        "rejected": [turn("assistant", "A horse is a fish")],
    },
    {
        "prompt": [turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", "Who are you?")],
        "chosen": [turn("assistant", "A program")],
        "rejected": [turn("assistant", "A pirate of the seven seas, arr")],
    },
]


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_list(PAIRS)


@pytest.fixture
def labelled() -> Dataset:
    rows = []
    for index, row in enumerate(PAIRS):
        side = "chosen" if index % 2 == 0 else "rejected"
        rows.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
    return Dataset.from_list(rows)


def demo_adapter(seed: int = 0, dropout: float = 0.0) -> tuple[PeftModel, Any]:
    """The embedded model with an adapter whose B is not zero, so that it differs from its base."""
    model, tokenizer = load_model(RunConfig.create({"model": "parley-demo"}).model)
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=LLAMA_PROJECTIONS)
    )
    return adapted, tokenizer


def shake(model: PeftModel, seed: int = 1) -> None:
    """Move every trained weight, as some steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace("_orig_mod.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None and ".ref." not in name
    }


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 512,
    }
