"""A small Llama with adapters on two projections, bound for training."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from parley.train_step.bind import bind


@pytest.fixture(scope="module")
def bound() -> Any:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return bind(get_peft_model(LlamaForCausalLM(config).to(torch.float32), lora))
