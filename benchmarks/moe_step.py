"""Mixtures of experts on the captured path: loss and gradient against the plain path, and ms a step of both.

    python benchmarks/moe_step.py --shape qwen3-30b-a3b
    python benchmarks/moe_step.py --shape gpt-oss-20b

Random weights in the published shapes, cut to `--layers`, bfloat16, LoRA r = 16 on the attention's projections. Other
plain paths show what bfloat16 rounds: experts one by one, documents one at a time. `--exact` compares passes in
bfloat16 with one in float32, without graphs: each with its own routing, with the share of tokens that reach other
experts by layer, and with the routing of the float32 pass. The shapes `tiny` run on a CPU.
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
from expert_routing import Routing, routed_elsewhere
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.train_step.captured_step import CapturedStep
from parley.train_step.graph_threshold import EAGER_PASSES
from parley.train_step.packed_batch import pack
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
    "tiny-gpt-oss": dict(  # rounding errors grow over its layers as in the published shape, by a larger initial range
        model_type="gpt_oss", vocab_size=32000, hidden_size=256, intermediate_size=256, num_local_experts=32,
        num_experts_per_tok=4, num_attention_heads=16, num_key_value_heads=2, head_dim=32, sliding_window=64,
        initializer_range=0.067,
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
    """Passes in bfloat16 against one in float32, each with its own routing and with that of the float32 pass."""
    model = build(shape, layers, "cuda" if torch.cuda.is_available() else "cpu")
    base, routing = model.get_base_model(), Routing(model)
    weights = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    documents = random_documents(tokens, 8, 1 / 3, tokens)
    count = sum(document.supervised_tokens for document in documents)
    # The captured path leaves out the tokens behind a document's last supervised one.
    kept, longest = pack(documents).trimmed().lengths, max(len(document.ids_L) for document in documents)
    padded_T = torch.cat([i * longest + torch.arange(length) for i, length in enumerate(kept)]).to(model.device)
    packed_T = torch.arange(sum(kept), device=model.device)

    def run(captured: bool, given: Sequence[Tensor] | None = None) -> tuple[float, Tensor, list[Tensor]]:
        model.zero_grad(set_to_none=True)
        with routing.recorded(packed_T if captured else padded_T, given) as chosen:
            if captured:
                step = CapturedStep(
                    model,
                    tokens=tokens,
                    graphs=False,
                    autocast=torch.bfloat16 if model.dtype == torch.bfloat16 else None,
                )
                step.experts_one_by_one = step.experts_one_by_one and model.dtype == torch.bfloat16
                step.forward_backward(documents, count)
                loss = float(step.metrics_3[0])
            else:
                loss = padded_pass(model, documents, count)
        return loss / count, torch.cat([p.grad.flatten().float() for p in trained]), chosen

    def cast(dtype: torch.dtype) -> None:  # to the same values and back: they are bfloat16's
        for weight in weights:
            weight.data = weight.data.to(dtype)
        # Grouped products take 16-bit types on a GPU.
        base.set_experts_implementation("eager" if dtype == torch.float32 else "grouped_mm")

    def in_bfloat16(given: Sequence[Tensor] | None = None) -> dict[str, tuple[float, Tensor, list[Tensor]]]:
        passes = {"captured": run(True, given), "plain": run(False, given)}
        base.set_experts_implementation("eager")
        return passes | {"plain_one_by_one": run(False, given)}

    own = in_bfloat16()
    cast(torch.float32)
    exact, exact_captured = run(False), run(True)
    cast(torch.bfloat16)
    same = in_bfloat16(exact[2])

    def facts(pass_: tuple[float, Tensor, list[Tensor]], wanted: tuple[float, Tensor, list[Tensor]]) -> dict[str, Any]:
        error = float((pass_[1] - wanted[1]).norm() / wanted[1].norm())
        elsewhere = routed_elsewhere(pass_[2], wanted[2])
        return {"loss": round(pass_[0], 6), "gradient_error": float(f"{error:.2g}"), "routed_elsewhere": elsewhere}

    return {
        "shape": shape, "layers": layers, "tokens": tokens, "float32_loss": round(exact[0], 6),
        "captured_in_float32": facts(exact_captured, exact),
        "bfloat16_own_routing": {name: facts(pass_, exact) for name, pass_ in own.items()},
        "captured_against_plain_in_bfloat16": facts(own["captured"], own["plain"]),
        "bfloat16_same_routing": {name: facts(pass_, exact) for name, pass_ in same.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1890)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--exact", action="store_true", help="gradients and routing against float32")
    args = parser.parse_args()
    if args.exact:
        result = compare_exactly(args.shape, args.layers, args.tokens)
    else:
        result = compare(args.shape, args.layers, args.tokens, args.repeats)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
