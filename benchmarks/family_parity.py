"""Every declared model family on each path against transformers, in float32 on this machine: docs/families.md.

    python benchmarks/family_parity.py            # the table
    python benchmarks/family_parity.py --write    # into docs/families.md

Tiny models of random weights, with LoRA on all projections. Training: the relative difference of the gradient, as one
vector, from transformers, PEFT and autograd, over documents of odd lengths in one packed row. Decoder: how many of 4 x
64 greedy tokens are transformers' own, four prompts in one batch. GGUF and exports: the tests of tests/exporting that
passed, which this runs.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from parley.config import GenerationSection
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.exporting.registry import EXPORTERS
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.interface import DecodeRequest
from parley.models.families import FAMILIES
from parley.train_step.bind import bind
from parley.train_step.captured_step import CapturedStep
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import MemoryPlan

PAGE = Path(__file__).parents[1] / "docs/families.md"
TESTS = Path(__file__).parents[1] / "tests/exporting"
VOCABULARY, LENGTHS, TOKENS = 300, (3, 17, 1, 150, 29), 64
# The switches by which a family differs from Llama, where its configuration has them off or beyond the test's lengths.
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 20, "sliding_window_pattern": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    "granite": {"embedding_multiplier": 3, "residual_multiplier": 0.4, "logits_scaling": 2},
    "smollm3": {"no_rope_layers": [1, 0]},
}
NAMES = {
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3", "mistral": "Mistral", "qwen2": "Qwen 2, 2.5", "qwen3": "Qwen 3",
    "gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)", "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "granite": "Granite 3", "smollm3": "SmolLM3", "olmo2": "OLMo 2",
}  # fmt: skip


def build(model_type: str) -> PeftModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **SETTINGS.get(model_type, {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, VOCABULARY, length) for length in LENGTHS]
    return [Document.from_lists(row, np.where(rng.random(len(row)) < 0.5, row, IGNORE_INDEX)) for row in rows]


def gradient(model: PeftModel) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return flat.clone()


def autograd(model: PeftModel, examples: list[Document], count: int) -> torch.Tensor:
    for example in examples:
        logits_LV = model(torch.tensor(example.ids_L).long()[None]).logits[0, :-1]
        target_L = torch.tensor(example.label_L[1:]).long()
        loss = functional.cross_entropy(logits_LV, target_L, ignore_index=IGNORE_INDEX, reduction="sum")
        (loss / count).backward()
    return gradient(model)


def training_errors(model_type: str) -> tuple[float, float]:
    """Relative gradient errors of the fused step and of the captured path."""
    examples = documents()
    count = sum(example.supervised_tokens for example in examples)
    model = build(model_type)
    wanted = autograd(model, examples, count)
    captured = CapturedStep(model, tokens=1000)
    captured.forward_backward(examples, count)
    got_captured = gradient(model)
    fused = FusedStep(bind(model), MemoryPlan())
    fused.forward_backward(examples, count)
    fused.bound.flat.expose_gradients()
    got_fused = gradient(model)
    return tuple(float((got - wanted).norm() / wanted.norm()) for got in (got_fused, got_captured))


def equal_tokens(model_type: str) -> int:
    model = build(model_type)
    model.generation_config.eos_token_id = None
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCABULARY, length).tolist() for length in (1, 9, 40, 25)]
    settings = GenerationSection(temperature=0, max_new_tokens=TOKENS)
    decoder = StaticCacheDecoder.of(model, slots=len(prompts), length=128)
    decoder.admit({slot: DecodeRequest(prompt, settings, frozenset(), 0) for slot, prompt in enumerate(prompts)})
    answers: list[list[int]] = [[] for _ in prompts]
    while emitted := decoder.decode():
        for slot, tokens in emitted.items():
            answers[slot] += [token.id for token in tokens]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    equal = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        equal += sum(a == b for a, b in zip(answer, wanted[0, len(prompt) :].tolist(), strict=True))
    return equal


class PassedExports:
    """A plugin of pytest: by family, the configurations that llama.cpp answers alike and the forms verified."""

    def __init__(self) -> None:
        self.gguf: Counter[str] = Counter()
        self.forms: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts = dict(report.user_properties)
        if report.when != "call" or report.outcome != "passed":
            return
        if "equal_tokens" in facts:
            assert facts["equal_tokens"] == TOKENS
            self.gguf[str(facts["family"])] += 1
        if "verified_forms" in facts:
            self.forms[str(facts["family"])] = int(facts["verified_forms"])


def run_export_tests() -> PassedExports:
    passed = PassedExports()
    files = [str(TESTS / name) for name in ("test_gguf_families.py", "test_family_exports.py")]
    pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[passed])
    return passed


def table() -> str:
    exports = run_export_tests()
    lines = [
        f"| family | fused step | captured path | decoder | GGUF: configurations with {TOKENS} equal tokens | "
        f"forms verified, of {len(EXPORTERS)} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model_type in FAMILIES:
        fused, captured = training_errors(model_type)
        decoded = f"{equal_tokens(model_type)} of {4 * TOKENS}"
        gguf, forms = exports.gguf[model_type], exports.forms.get(model_type, 0)
        lines.append(f"| {NAMES[model_type]} | {fused:.1e} | {captured:.1e} | {decoded} | {gguf} | {forms} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/families.md")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    made = table()
    print(made)
    if args.write:
        head, tail = PAGE.read_text().split("<!-- table -->\n")[::2]
        PAGE.write_text(f"{head}<!-- table -->\n{made}\n<!-- table -->\n{tail}")


if __name__ == "__main__":
    main()
