"""Contracts of the private parts of bitsandbytes that Parley uses."""

from __future__ import annotations

import logging

import bitsandbytes
import bitsandbytes.nn.modules as bnb_modules
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from parley.library_compat.bitsandbytes import (
    WRAPPED_STATE,
    has_inference_layout,
    keep_trainable_layout,
    log_int8_casts_once,
)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A 4-bit layer that takes this CPU for one with AVX512-BF16, in evaluation mode."""
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: True)
    torch.manual_seed(0)
    layer = bnb_modules.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    return layer.to("cpu").eval()


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@torch.no_grad()
def test_a_layer_reorders_its_weight_in_evaluation_unless_told_not_to(layer: torch.nn.Module) -> None:
    before = layer.weight.data.clone()
    assert keep_trainable_layout(layer) == 0
    layer(torch.ones(1, 64))
    assert torch.equal(layer.weight.data, before)
    assert not has_inference_layout(layer)
    layer.support_avx512bf16_for_cpu = True  # what the library sets by itself on such a CPU
    layer(torch.ones(1, 64))
    assert has_inference_layout(layer)


@torch.no_grad()
def test_a_reordered_weight_is_put_back(layer: torch.nn.Module) -> None:
    packed, wanted = layer.weight.data.clone(), dequantized(layer)
    layer(torch.ones(1, 64))
    assert keep_trainable_layout(layer) == 1
    assert not has_inference_layout(layer)
    assert torch.equal(layer.weight.data, packed)
    assert torch.allclose(dequantized(layer), wanted, rtol=0.02)
    assert keep_trainable_layout(layer) == 0


def test_int8_casts_are_logged_by_the_named_logger_once(caplog: pytest.LogCaptureFixture) -> None:
    from bitsandbytes.autograd import _functions

    assert _functions.logger.name == "bitsandbytes.autograd._functions"
    log_int8_casts_once()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _functions.logger.warning("inputs will be cast, said by a test")
    assert len(caplog.records) == 1


def test_a_saved_8_bit_state_has_its_moments_below_one_key() -> None:
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (5000, 100)]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    large, small = (state[WRAPPED_STATE] for state in optimizer.state_dict()["state"].values())
    assert {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"} <= large.keys()
    assert (large["state1"].dtype, large["absmax1"].shape) == (torch.uint8, (20,))  # blocks of 256
    assert (small["state1"].dtype, small["state1"].shape) == (torch.float32, (100,))
    assert not any(name.startswith("qmap") for name in small)
