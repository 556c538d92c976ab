"""Runs of tiny random models whose adapters change every answer, made once a session; treat them as read-only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TARGETS = {
    "phi3": ["qkv_proj", "down_proj"],
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions and answers; four of them are held out."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"What be {n} and {n}?", "completion": f"It be {2 * n}, arr."} for n in range(40)]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def build_run(
    build_family: Callable[[str], Path], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`build_run("llama", use_dora=True)`: a finished run on a tiny model; its adapter has random values."""

    def build(family: str | Path, settings: dict[str, Any] | None = None, **lora: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from parley.config import RunConfig
        from parley.training.run_folder import RunFolder

        base = build_family(family) if isinstance(family, str) else family
        output = tmp_path_factory.mktemp("runs") / "tuned"
        config = RunConfig.create(
            {
                "output": str(output),
                "model": {"name": str(base), "device": "cpu", **(settings or {})},
                "data": {"source": str(rows), "heldout_rows": 4},
            }
        )
        folder = RunFolder.create(config)
        fields = {"r": 4, "target_modules": TARGETS.get(base.name, ["q_proj", "k_proj", "down_proj"]), **lora}
        tokenizer = AutoTokenizer.from_pretrained(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3 if "lora_" in name else 0.1)
        folder.save_weights(adapted, tokenizer, full=False)
        return output

    return build


@pytest.fixture(scope="session")
def run(build_run: Callable[..., Path]) -> Path:
    """A run on a tiny Llama."""
    return build_run("llama")
