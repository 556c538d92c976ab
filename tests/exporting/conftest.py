"""Runs of tiny random models whose adapters change every answer, made once a session; treat them as read-only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TARGETS = {
    "phi3": ["qkv_proj", "down_proj"],
}


@pytest.fixture(scope="session", autouse=True)
def short_answers() -> Iterator[None]:
    """Answers of 12 tokens are compared, not of 64: every test of a comparison generates them twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parley.exporting.samples.ANSWER_TOKENS", (12, 12))
        yield


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

    def build(family: str | Path, *, data: str | None = None, method: str = "sft", **lora: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from parley.config import RunConfig
        from parley.training.run_folder import RunFolder

        base = build_family(family) if isinstance(family, str) else family
        output = tmp_path_factory.mktemp("runs") / "tuned"
        config = RunConfig.create(
            {
                "output": str(output),
                "model": {"name": str(base), "device": "cpu"},
                "data": {"source": data or str(rows), "heldout_rows": 4},
                "training": {"method": method},
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


@pytest.fixture(scope="session")
def tied_llama(build_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is its embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = build_family("llama"), tmp_path_factory.mktemp("tied") / "llama"
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def gguf_model(tmp_path: Path) -> Callable[..., Path]:
    """`gguf_model(tokenizer, {"name": "mine"})`: a GGUF file of the smallest of models with that tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from parley.exporting.gguf.architectures import architecture_of
    from parley.exporting.gguf.convert import write_gguf
    from parley.exporting.gguf.quantization import SCHEMES
    from parley.exporting.gguf.vocabulary import read_vocabulary
    from parley.exporting.merge import merged_weights
    from parley.exporting.weights import CheckpointWeights

    def write(tokenizer: Any, general: dict[str, str | int] | None = None) -> Path:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=512,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        path, weights = tmp_path / "model.gguf", merged_weights(config, CheckpointWeights(tmp_path), [])
        vocabulary = read_vocabulary(tokenizer, len(tokenizer), [], "model")
        architecture = architecture_of(config, "model")
        write_gguf(
            path,
            architecture,
            config,
            weights,
            vocabulary,
            SCHEMES["f32"],
            {"type": "model"} | (general or {}),
            threads=1,
        )
        return path

    return write


@pytest.fixture
def gguf_ids(gguf_model: Callable[[Any], Path]) -> Callable[..., list[list[int]]]:
    """`gguf_ids(tokenizer, texts, parse_special=True)`: llama.cpp's ids."""
    from parley.library_compat.xllamacpp import LlamaModel

    def ids(tokenizer: Any, texts: list[str], parse_special: bool) -> list[list[int]]:
        model = LlamaModel(gguf_model(tokenizer), length=64, threads=1)
        try:
            return [model.tokenize(text, add_special=False, parse_special=parse_special) for text in texts]
        finally:
            model.close()

    return ids
