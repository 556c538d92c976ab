"""Mixtures of experts on the captured path: loss and gradient against the plain path, and ms a step of both.

    python benchmarks/moe_step.py --shape qwen3-30b-a3b
    python benchmarks/moe_step.py --shape gpt-oss-20b

Random weights in the published shapes, cut to `--layers`, bfloat16, LoRA r = 16 on the attention's projections. Other
plain paths show what bfloat16 rounds: experts one by one, documents one at a time. `--exact` compares in float32,
without a graph and with experts one by one. `--shape tiny` runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from engine_step import random_documents
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.train_step.captured_step import CapturedStep
from parley.train_step.graph_threshold import EAGER_PASSES
from parley.units import GIB

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
    ),
    "gpt-oss-20b": dict(
        model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_local_experts=32,
        num_experts_per_tok=4, num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128,
    ),
    "tiny": dict(
        model_type="qwen3_moe", vocab_size=32000, hidden_size=64, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, norm_topk_prob=True,
    ),
}  # fmt: skip


def build(shape: str, layers: int, device: str) -> PeftModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[shape], num_hidden_layers=layers, max_position_embeddings=32768)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model.requires_grad_(False), lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    return model


def padded_pass(model: PeftModel, documents: Sequence[Document], count: int) -> float:
    """Summed loss of one padded batch through transformers, PEFT and autograd; that over `count` adds to `grad`."""
    device = model.device
    longest = max(len(document.ids_L) for document in documents)
    ids_BL = torch.zeros(len(documents), longest, dtype=torch.long)
    labels_BL = torch.full_like(ids_BL, IGNORE_INDEX)
    mask_BL = torch.zeros_like(ids_BL)
    for row, document in enumerate(documents):
        length = len(document.ids_L)
        ids_BL[row, :length], mask_BL[row, :length] = torch.tensor(document.ids_L), 1
        labels_BL[row, :length] = torch.tensor(document.label_L)
    with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        logits_BLV = model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False).logits
    target = labels_BL[:, 1:].to(device).flatten()
    loss = functional.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1).float(), target, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    (loss / count).backward()
    return loss.item()


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
    return 1000 * statistics.median(walls)


def compare(shape: str, layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(shape, layers, device)
    documents = random_documents(tokens, 8, 1 / 3, tokens)
    count = sum(document.supervised_tokens for document in documents)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def plain(batch: int = len(documents)) -> tuple[float, Tensor]:
        model.zero_grad(set_to_none=True)
        batches = [documents[start : start + batch] for start in range(0, len(documents), batch)]
        loss = sum(padded_pass(model, batch, count) for batch in batches) / count
        return loss, torch.cat([p.grad.flatten().float() for p in trained])

    (loss, wanted), plain_ms = plain(), milliseconds(plain, max(repeats // 4, 1))
    alone_loss, alone = plain(1)
    model.get_base_model().set_experts_implementation("eager")
    (other_loss, other), one_by_one_ms = plain(), milliseconds(plain, 1)
    model.get_base_model().set_experts_implementation("grouped_mm")
    model.zero_grad(set_to_none=True)
    step = CapturedStep(model, tokens=tokens, autocast=torch.bfloat16)
    losses = []
    for i in range(EAGER_PASSES + 2):  # without a graph, timed, captured and replayed, replayed
        if i == EAGER_PASSES:
            pays_up_to, step.threshold.max_tokens = step.threshold.max_tokens, math.inf
        step.forward_backward(documents, count)
        losses.append(float(step.metrics_3[0]) / count)
    got = torch.cat([gradient.flatten().float() for gradient in step.gradients])
    captured_ms = milliseconds(lambda: step.forward_backward(documents, count), repeats)
    step.uses_graphs = False
    eager_ms = milliseconds(lambda: step.forward_backward(documents, count), max(repeats // 4, 1))
    return {
        "shape": shape, "layers": layers, "tokens": tokens, "graphs": len(step.graphs),
        "graph_pays_up_to": pays_up_to, "captured_ms": round(captured_ms, 1),
        "without_graph_ms": round(eager_ms, 1), "plain_ms": round(plain_ms, 1),
        "plain_one_by_one_ms": round(one_by_one_ms, 1), "losses": [round(loss, 5) for loss in losses],
        "plain_loss": round(loss, 5), "plain_one_document_loss": round(alone_loss, 5),
        "plain_one_document_gradient_error": round(float((alone - wanted).norm() / wanted.norm()), 4),
        "plain_one_by_one_loss": round(other_loss, 5),
        "gradient_error": round(float((got - wanted).norm() / wanted.norm()), 4),
        "plain_one_by_one_gradient_error": round(float((other - wanted).norm() / wanted.norm()), 4),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if device == "cuda" else None,
    }  # fmt: skip


def compare_exactly(shape: str, layers: int, tokens: int) -> dict[str, Any]:
    model = build(shape, layers, "cuda" if torch.cuda.is_available() else "cpu").float()
    model.get_base_model().set_experts_implementation("eager")
    documents = random_documents(tokens, 8, 1 / 3, tokens)
    count = sum(document.supervised_tokens for document in documents)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = padded_pass(model, documents, count) / count
    wanted = torch.cat([parameter.grad.flatten() for parameter in trained])
    step = CapturedStep(model, tokens=tokens, graphs=False)
    step.experts_one_by_one = False  # grouped products take 16-bit types on a GPU
    step.forward_backward(documents, count)
    got = torch.cat([gradient.flatten() for gradient in step.gradients])
    return {
        "shape": shape, "layers": layers, "dtype": "float32", "loss": float(step.metrics_3[0]) / count,
        "plain_loss": loss, "gradient_error": float((got - wanted).norm() / wanted.norm()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1890)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--exact", action="store_true", help="in float32, gradients alone")
    args = parser.parse_args()
    if args.exact:
        result = compare_exactly(args.shape, args.layers, args.tokens)
    else:
        result = compare(args.shape, args.layers, args.tokens, args.repeats)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
