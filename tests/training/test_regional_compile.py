"""Compiled layers compute what they did before, at lengths they were not compiled for, through PEFT's adapters too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from parley.training.regional_compile import compile_layers


def loss_and_gradients(model: Any, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    ids_1T = torch.arange(sum(lengths))[None] % 50
    positions_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    loss = model(input_ids=ids_1T, position_ids=positions_1T, labels=ids_1T, use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_same_loss_and_gradients(build_family: Callable[[str], Path], family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_family(family))
    model = get_peft_model(model, LoraConfig(target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    rows = [(7, 12), (5, 9, 17)]  # compiled for the first length, then for any
    wanted = [loss_and_gradients(model, lengths) for lengths in rows]
    assert compile_layers(model, backend="aot_eager") == model.config.num_hidden_layers
    for lengths, plain in zip(rows, wanted, strict=True):
        torch.testing.assert_close(loss_and_gradients(model, lengths), plain, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
