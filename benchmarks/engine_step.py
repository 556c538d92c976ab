"""The fused step by itself, on random weights in published shapes: its gradients, its time, its kernels.

    python benchmarks/engine_step.py check --shape 1b
    python benchmarks/engine_step.py time --shape 1b --quantization nf4
    python benchmarks/engine_step.py time --shape 1b --kernels 30
    python benchmarks/engine_step.py time --shape 1b --lora dora
    python benchmarks/engine_step.py time --shape 1b --path captured --lora full

`check` compares gradients with the plain path and with float32. `time` prints one RESULT line of JSON for each step
size, and with `--kernels` the kernels of one step by their share of its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import bitsandbytes
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shapes import SHAPES
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.train_step.bind import bind
from parley.train_step.captured_step import CapturedStep
from parley.train_step.fused_step import FusedStep
from parley.train_step.graph_threshold import EAGER_PASSES
from parley.train_step.memory_plan import MemoryPlan, make_plan
from parley.train_step.optimizer import AdamW8bit
from parley.units import GIB

LORA: dict[str, dict[str, Any] | None] = {
    "plain": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.05}, "full": None, "full-8bit": None,
}  # fmt: skip


def build(
    shape: str,
    quantization: str,
    layers: int | None = None,
    lora: str = "plain",
    device: str = "cuda",
    positions: int = 32768,
) -> nn.Module:
    """A model of this shape with LoRA r = 16 on all projections, quantised on the GPU, never on disk.

    `lora`: a key of LORA; "full" and "full-8bit" (its optimizer) train every weight instead. `positions`: tokens of the
    longest text.
    """
    sizes = dict(vocab_size=128256, max_position_embeddings=positions, pad_token_id=0) | SHAPES[shape]
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    torch.manual_seed(0)
    config = AutoConfig.for_model(**sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head" and quantization == "nf4":
                module.add_module(name, _quantised(child))
    options = LORA[lora]
    if options is None:
        return model.requires_grad_(True).train()
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config).train()


def _quantised(linear: nn.Linear) -> nn.Linear:
    bias = linear.bias is not None
    new = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    weight = linear.weight.data
    params = bitsandbytes.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    new.weight = params.to("cuda")
    if bias:
        new.bias = linear.bias
    return new


def random_documents(tokens: int, count: int, supervised: float, seed: int, *, even: bool = False) -> list[Document]:
    """Random documents of `tokens` in all, of uneven length unless `even`; the last part of each is supervised."""
    rng = np.random.default_rng(seed)
    shares = np.full(count, 1 / count) if even else rng.dirichlet(np.full(count, 3.0))
    lengths = np.maximum((shares * tokens).astype(int), 8)
    lengths[-1] = max(tokens - lengths[:-1].sum(), 8)
    documents = []
    for length in lengths:
        ids = rng.integers(0, 32000, length)
        labels = np.where(np.arange(length) >= length * (1 - supervised), ids, IGNORE_INDEX)
        documents.append(Document.from_lists(ids, labels))
    return documents


def plain_gradient(model: PeftModel, documents: list[Document], dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Loss and all adapter gradients, flat, through transformers, PEFT and autograd, one document at a time."""
    count = sum(document.supervised_tokens for document in documents)
    loss_sum = 0.0
    for document in documents:
        ids = torch.tensor(document.ids_L, device="cuda").long()[None]
        target = torch.tensor(document.label_L[1:], device="cuda").long()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = model(ids).logits[0, :-1]
        loss = functional.cross_entropy(logits.float(), target, ignore_index=IGNORE_INDEX, reduction="sum") / count
        loss.backward()
        loss_sum += loss.item()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])
    model.zero_grad(set_to_none=True)
    return loss_sum, gradient


def fused_gradient(
    model: PeftModel, documents: list[Document], plan: MemoryPlan, passes: int = 1
) -> tuple[float, torch.Tensor]:
    step = FusedStep(bind(model), plan)
    count = sum(document.supervised_tokens for document in documents)
    for _ in range(passes):
        step.forward_backward(documents, count)
    step.bound.flat.expose_gradients()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad(set_to_none=True)
    return float(step.metrics_3[0]) / count, gradient


def check(shape: str, quantization: str) -> None:
    model = build(shape, quantization, layers=6)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    documents = random_documents(1601, 7, 0.4, 0)
    plans = {
        "eager": MemoryPlan(),
        "graph": MemoryPlan(graph_tokens=8192),
        "linear": MemoryPlan(saved="linear", cache_matrices=False, logits_rows=100),
        "layer_inputs, split": MemoryPlan(saved="layer_inputs", cache_matrices=False, tokens=500),
        "layer_inputs, graph": MemoryPlan(saved="layer_inputs", cache_matrices=False, tokens=900, graph_tokens=8192),
        "attention_offloaded": MemoryPlan(
            saved="attention_offloaded", cache_matrices=False, mlp_rows=512, logits_rows=100
        ),
    }
    results = {"plain bf16": plain_gradient(model, documents, torch.bfloat16)}
    for name, plan in plans.items():
        results[name] = fused_gradient(model, documents, plan, passes=3 if plan.graph_tokens else 1)
    results["one document at a time"] = fused_gradient(model, documents, MemoryPlan(tokens=1))
    long = random_documents(6000, 2, 0.4, 0)
    results["long plain"] = plain_gradient(model, long, torch.bfloat16)
    results["long"] = fused_gradient(model, long, MemoryPlan(positions=8192))
    if quantization == "none":
        loss, exact = plain_gradient(model.float(), documents, torch.float32)
        long_loss, long_exact = plain_gradient(model, long, torch.float32)
    else:
        (loss, exact), (long_loss, long_exact) = results["plain bf16"], results["long plain"]
    for name, (its_loss, gradient) in results.items():
        wanted, wanted_loss = (long_exact, long_loss) if name.startswith("long") else (exact, loss)
        error = ((gradient - wanted).norm() / wanted.norm()).item()
        print(
            f"{shape} {quantization} {name:24} loss {its_loss:.5f} ({wanted_loss:.5f})"
            f" relative gradient error {error:.2e}"
        )


class TrainingLoop:
    """A model with its fused step and optimizer; a call is one optimizer step, as the trainer does it."""

    def __init__(self, shape: str, quantization: str, memory: Any, lora: str, documents: list[Document]) -> None:
        torch.cuda.reset_peak_memory_stats()
        bound = bind(build(shape, quantization, lora=lora))
        lengths = np.array([len(example.ids_L) for example in documents])
        plan = make_plan(bound, memory, lengths, len(documents))
        print("\n".join(plan.describe()), flush=True)
        self.step = FusedStep(bound, plan)
        self.step.compile()
        self.flat = self.step.bound.flat
        self.optimizer = AdamW8bit([self.flat.weight_Z], lr=2e-4, weight_decay=0.01)

    def __call__(self, documents: list[Document]) -> None:
        self.step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
        norm = torch.linalg.vector_norm(self.flat.grad_Z)
        self.flat.grad_Z.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        self.optimizer.step()


class CapturedLoop:
    """The same on the captured path, with an optimizer of all trained parameters."""

    def __init__(self, shape: str, quantization: str, lora: str, documents: list[Document]) -> None:
        torch.cuda.reset_peak_memory_stats()
        tokens = sum(len(document.ids_L) for document in documents)
        self.step = CapturedStep(build(shape, quantization, lora=lora), tokens=tokens, autocast=torch.bfloat16)
        if lora == "full":
            self.optimizer = torch.optim.AdamW(self.step.trained, lr=1e-5, weight_decay=0.01, fused=True)
        else:
            self.optimizer = AdamW8bit(self.step.trained, lr=1e-5 if lora == "full-8bit" else 2e-4, weight_decay=0.01)

    def __call__(self, documents: list[Document]) -> None:
        self.step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
        torch.nn.utils.clip_grad_norm_(self.step.trained, 1.0)
        self.optimizer.step()


def milliseconds(
    loop: TrainingLoop | CapturedLoop, documents: list[Document], repeats: int
) -> tuple[float, float, float]:
    """Median over `repeats` steps, each until the device is done; the median until the host is; the first step."""
    start = time.perf_counter()
    loop(documents)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    walls, hosts = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        loop(documents)
        hosts.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
    return 1000 * statistics.median(walls), 1000 * statistics.median(hosts), 1000 * first


def report_captured(
    shape: str, quantization: str, lora: str, sizes: list[list[Document]], repeats: int, listed: int
) -> None:
    largest = max(sizes, key=lambda documents: sum(len(document.ids_L) for document in documents))
    loop = CapturedLoop(shape, quantization, lora, largest)
    for documents in sizes:
        eager = [milliseconds(loop, documents, 1)[0] for _ in range(EAGER_PASSES)][-1]
        wall, host, first = milliseconds(loop, documents, repeats)
        supervised = sum(document.supervised_tokens for document in documents)
        result = dict(
            shape=shape, quantization=quantization, path="captured", lora=lora,
            tokens=sum(len(document.ids_L) for document in documents), supervised=supervised,
            step_ms=round(wall, 2), host_ms=round(host, 2), eager_ms=round(eager, 2), capture_ms=round(first, 1),
            graphs=len(loop.step.graphs), graph_tokens=loop.step.threshold.max_tokens,
            loss=round(float(loop.step.metrics_3[0]) / supervised, 4),
            peak_reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2),
        )  # fmt: skip
        print("RESULT " + json.dumps(result), flush=True)
        if listed:
            list_kernels(loop, documents, listed)


def report(
    shape: str, quantization: str, memory: Any, lora: str, sizes: list[list[Document]], repeats: int, listed: int
) -> None:
    loop = TrainingLoop(
        shape,
        quantization,
        memory,
        lora,
        max(sizes, key=lambda documents: sum(len(document.ids_L) for document in documents)),
    )
    for documents in sizes:
        loop(documents)
        wall, host, first = milliseconds(loop, documents, repeats)
        result = dict(
            shape=shape,
            quantization=quantization,
            memory=memory,
            lora=lora,
            saved=loop.step.plan.saved,
            tokens=sum(len(document.ids_L) for document in documents),
            documents=len(documents),
            supervised=sum(document.supervised_tokens for document in documents),
            step_ms=round(wall, 2),
            host_ms=round(host, 2),
            first_ms=round(first, 1),
            loss=round(float(loop.step.metrics_3[0]) / sum(document.supervised_tokens for document in documents), 4),
            peak_allocated_gib=round(torch.cuda.max_memory_allocated() / GIB, 2),
            predicted_gib=round(loop.step.plan.predicted_bytes / GIB, 2),
            peak_reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2),
        )
        print("RESULT " + json.dumps(result), flush=True)
        if listed:
            list_kernels(loop, documents, listed)


def list_kernels(loop: TrainingLoop | CapturedLoop, documents: list[Document], listed: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
        loop(documents)
        torch.cuda.synchronize()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    print(f"{sum(len(document.ids_L) for document in documents)} tokens: {total / 1000:.2f} ms in kernels")
    for row in rows[:listed]:
        print(f"{row.device_time_total / 1000:8.3f} ms {row.count:5d} x  {row.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--shape", default="1b", choices=sorted(SHAPES))
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "none"])
    parser.add_argument("--memory", default="auto", help="auto, low or GiB")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1890])
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--supervised", type=float, default=1 / 3)
    parser.add_argument("--even", action="store_true", help="documents of one length")
    parser.add_argument("--path", default="fused", choices=["fused", "captured"])
    parser.add_argument("--lora", nargs="+", default=["plain"], choices=LORA, help="full: captured path alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=0, help="list so many kernels of one step by their share of it")
    args = parser.parse_args()
    if args.what == "check":
        check(args.shape, args.quantization)
        return
    memory = args.memory if args.memory in ("auto", "low") else float(args.memory)
    sizes = [random_documents(t, args.documents, args.supervised, t, even=args.even) for t in args.tokens]
    for lora in args.lora:
        if args.path == "captured":
            report_captured(args.shape, args.quantization, lora, sizes, args.repeats, args.kernels)
        else:
            report(args.shape, args.quantization, memory, lora, sizes, args.repeats, args.kernels)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
