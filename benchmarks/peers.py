"""Shared by the benchmarks beside TRL: its model as its users load it, and processes that measure in turn."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from parley.config import RunConfig
from parley.models.resolve import model_folder


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def in_turn(lock: str | None) -> Iterator[None]:
    """Holds the file `lock`, so that of several processes which are loaded one measures at a time."""
    if lock is None:
        yield
        return
    with Path(lock).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stock_model(name: str, quantization: str) -> tuple[Any, Any, LoraConfig]:
    """Model, tokenizer and adapter's settings as a user of TRL loads them: Parley's default adapter."""
    folder = model_folder(RunConfig.create({"model": name}).model)
    on_gpu = torch.cuda.is_available()
    kind = torch.bfloat16 if on_gpu else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=kind,
        device_map={"": 0 if on_gpu else "cpu"},
        quantization_config=nf4 if quantization == "nf4" else None,
    )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, lora_dropout=0.0, target_modules=linears)
    return model, AutoTokenizer.from_pretrained(folder), lora
