"""The modules that an adapter is attached to by default and by all-linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from parley.config import LoraSection
from parley.models.adapters import attach_lora


@pytest.mark.parametrize("targets", [{}, {"target_modules": "all-linear"}])
def test_routers_that_are_linear_layers_are_left_out(targets: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model(
        "phimoe", vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = attach_lora(AutoModelForCausalLM.from_config(config), LoraSection(r=2, **targets), seed=0)
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("router" in name for name in adapted)
    assert any("q_proj" in name for name in adapted)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert ("all-linear leaves out the routers" in caplog.text) == bool(targets)
