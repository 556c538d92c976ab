"""The small random Llama that the GPU's tests share."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
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


def quantised(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same with NF4 projections and double quantisation, as the course's checkpoint has them."""
    for path in [name for name, _ in model.named_modules() if name.endswith("_proj")]:
        linear = model.get_submodule(path)
        packed = Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4")
        packed.weight = Params4bit(linear.weight.data.cpu(), False, quant_type="nf4", compress_statistics=True)
        model.set_submodule(path, packed.to("cuda"))
    return model


def adapted(model: LlamaForCausalLM, deviation: float, **options: Any) -> PeftModel:
    """LoRA r = 8 on all projections, off its start so that it says something."""
    torch.manual_seed(1)
    lora = LoraConfig(target_modules=LLAMA_PROJECTIONS, r=8, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, deviation)
    return adapted
