"""Contracts of the private parts of transformers that Parley uses."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from parley.library_compat.transformers import attention_implementation


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_implementation_is_the_one_that_was_set(name: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model.set_attn_implementation(name)
    assert attention_implementation(model) == name
