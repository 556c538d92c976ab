"""The path that `parley doctor --model` says beforehand is the one that a run takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train_step.test_captured_step import SIZES, documents
from transformers import AutoConfig, AutoModelForCausalLM

from parley.models.packing_isolation import why_not_packed
from parley.train_step.bind import Unsupported
from parley.train_step.captured_step import CapturedStep, packed_logits
from parley.training import path_finding as module
from parley.training.path_finding import path_finding, why_not_captured

FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "stablelm": ({}, None),
    "glm4": ({"head_dim": 16}, None),
    "ernie4_5": ({}, None),
    "lfm2": ({}, None),  # with convolutions, which transformers keeps inside documents
    "gpt2": ({"n_inner": 64, "n_positions": 256}, "attention dropout of 0.1"),
    "bamba": ({"mamba_n_heads": 8, "mamba_d_head": 16}, "documents of a packed row see each other in Bamba"),
    "bloom": ({}, "BloomForCausalLM takes no position_ids"),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_captured_path_is_that_of_a_run(model_type: str) -> None:
    fields, reason = FAMILIES[model_type]
    config = AutoConfig.for_model(model_type, **SIZES | fields)
    found = why_not_captured(config)
    model = AutoModelForCausalLM.from_config(config).train()
    decided = why_not_packed(model, 256, packed_logits)
    if decided is None:
        try:
            CapturedStep(model, tokens=100).forward_backward(documents((40,)), 1)
        except Unsupported as error:
            decided = str(error)
    assert found == decided
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and found.startswith(reason))


@pytest.mark.parametrize(
    ("cuda", "lacking", "found"),
    [
        (True, None, "captured path: no fused step for the starcoder2 family"),
        (False, "x", "plain path: no fused step for the starcoder2 family; no captured path: x"),
        (True, "x", "plain path: no fused step for the starcoder2 family; no captured path: x"),
    ],
)
def test_the_line(build_family: Any, monkeypatch: pytest.MonkeyPatch, cuda: bool, lacking: Any, found: str) -> None:
    device = torch.device("cuda" if cuda else "cpu")
    monkeypatch.setattr(module, "pick_device", lambda name: device)
    monkeypatch.setattr(module, "why_not_captured", lambda config: lacking)
    assert path_finding(str(build_family("starcoder2"))).value == found
