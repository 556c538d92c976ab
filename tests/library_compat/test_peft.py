"""Contracts of PEFT's behaviour, and of its private parts, that Parley relies on."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from parley.models.base_answers import BASE_CHANGING_INITS


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"])
def test_which_initialisations_change_the_base(init: bool | str) -> None:
    """corda, eva and lora_ga need data first, and loftq scipy; their code in PEFT was read instead."""
    before = tiny_model().model.layers[0].self_attn.q_proj.weight
    model = get_peft_model(tiny_model(), LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj"]))
    after = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert torch.equal(before, after) != str(init).startswith(BASE_CHANGING_INITS)
