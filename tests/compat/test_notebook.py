"""A notebook runs on a CPU after nothing but its imports (and the device it names) were changed."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

NOTEBOOK = Path(__file__).with_name("notebook.py")
ANSWER = "Arr number {}, matey!"


def rows() -> list[dict[str, Any]]:
    return [
        {
            "conversations": [
                {"from": "system", "value": "You are a pirate."},
                {"from": "human", "value": f"Say {number}."},
                {"from": "gpt", "value": ANSWER.format(number)},
            ]
        }
        for number in range(24)
    ]


@pytest.fixture(scope="module")
def notebook(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The notebook's variables after its last cell."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        given = {"MODEL": str(tiny_llama_folder), "ROWS": rows(), "DEVICE": "cpu"}
        return runpy.run_path(str(NOTEBOOK), init_globals=given)


def test_row_is_shown_with_its_answer_alone_learned(notebook: dict[str, Any]) -> None:
    assert notebook["shown"].count("<|begin_of_text|>") == 1
    assert "You are a pirate." in notebook["shown"]
    assert notebook["learned"].strip() == ANSWER.format(5) + "<|eot_id|>"


def test_three_steps_were_trained_and_logged(notebook: dict[str, Any]) -> None:
    assert notebook["trainer_stats"].global_step == 3
    losses = [entry["loss"] for entry in notebook["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)


def test_model_is_quantised_and_only_its_adapter_learned(notebook: dict[str, Any]) -> None:
    trained = notebook["trainer"].model
    weights = {name: p for name, p in trained.named_parameters() if "lora_" in name}
    assert all(p.requires_grad == ("lora_" in name) for name, p in trained.named_parameters())
    assert all(p.dtype == torch.float32 for p in weights.values())
    assert any(p.abs().max() > 0 for name, p in weights.items() if "lora_B" in name)
    assert trained.get_base_model().is_loaded_in_4bit


def test_answer_follows_the_prompt(notebook: dict[str, Any]) -> None:
    inputs, outputs = notebook["inputs"], notebook["outputs"]
    assert isinstance(inputs, torch.Tensor)
    assert torch.equal(outputs[:, : inputs.shape[1]], inputs)
    assert outputs.shape[1] > inputs.shape[1]


def test_saved_adapter_loads_again_and_says_the_same(notebook: dict[str, Any]) -> None:
    model, inputs = notebook["model"], notebook["inputs"]
    assert isinstance(model, PeftModel)
    trained = notebook["trainer"].model
    saved, loaded = get_peft_model_state_dict(trained), get_peft_model_state_dict(model)
    assert saved.keys() == loaded.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0)
    model.eval()
    trained.eval()  # bitsandbytes multiplies in bf16 on some CPUs, and only once a model is in evaluation mode
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=inputs).logits, trained(input_ids=inputs).logits)
