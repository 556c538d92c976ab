"""The small random Llama that the GPU's tests share."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from parley.config import LLAMA_PROJECTIONS


def llama(vocabulary: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to("cuda", dtype)


def adapted(model: LlamaForCausalLM, deviation: float) -> PeftModel:
    """LoRA r = 8 on all projections, off its start so that it says something."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(target_modules=LLAMA_PROJECTIONS, r=8, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, deviation)
    return adapted
