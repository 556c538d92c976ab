"""What bounds the step of a job: its FLOPs, its bytes, and the time of both at the card's own rates.

    python benchmarks/roofline.py                  # FLOPs and bytes, and their time at rates that are given
    python benchmarks/roofline.py --measure        # on a GPU: the same products through cuBLAS, and a copy's bandwidth

Counted are the base products of forward and input gradient (and those that a plan recomputes), the causal half of
attention, and what everything else reads and writes: each input once, each output once. `bound` is the time of all
three one after the other, which no version beats by much: the products and attention use the same units, and the rest
is bound by memory. Time of products is that of torch.mm with the step's own layout: rows with LoRA columns behind.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shapes import SHAPES

LORA_COLUMNS, RANK, ITEMSIZE, VOCABULARY = 64, 16, 2, 128256
RECOMPUTED = {"all": (), "linear": (), "attention": ("gate_up",), "layer_inputs": ("qkv", "o", "gate_up")}


@dataclass(frozen=True)
class Job:
    name: str
    shape: str
    lengths: tuple[int, ...]
    supervised: float


# Documents lose their last token, which predicts nothing.
JOBS = (
    Job("seed", "1b", (236,) * 8, 1 / 3),
    Job("long", "1b", (32767,), 1.0),
    Job("8b", "8b", (4095,) * 2, 1.0),
    Job("8b-short", "8b", (236,) * 8, 1 / 3),
)


class Model:
    def __init__(self, shape: str) -> None:
        sizes = SHAPES[shape]
        self.hidden, self.feed_forward = sizes["hidden_size"], sizes["intermediate_size"]
        self.layers, self.heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
        self.kv_heads = sizes["num_key_value_heads"]
        self.head_dim = sizes.get("head_dim", self.hidden // self.heads)
        self.columns = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.linears = {  # input and output features
            "qkv": (self.hidden, self.columns),
            "o": (self.heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.feed_forward),
            "down": (self.feed_forward, self.hidden),
        }

    def product_flops(self, tokens: int, names: tuple[str, ...] | None = None) -> int:
        """Of one pass through the linear layers, forward or input gradient."""
        chosen = [self.linears[name] for name in (names if names is not None else self.linears)]
        return 2 * tokens * self.layers * sum(k * n for k, n in chosen)

    def attention_flops(self, lengths: tuple[int, ...]) -> int:
        """Two products of the causal half forward, five backward."""
        return 7 * self.layers * sum(n * n * self.heads * self.head_dim for n in lengths)

    def step_bytes(self, tokens: int) -> dict[str, int]:
        """Of one layer's parts, forward and backward, all layers, by what they are for."""
        d, f, c, a = self.hidden, self.feed_forward, self.columns, self.heads * self.head_dim
        rotated = (self.heads + self.kv_heads) * self.head_dim
        columns = {
            "norms": 8 * d + 8 * d,  # each: two in, two out; backward three in, one out
            "adapters": 2 * (2 * d + a + f + c + 2 * d + 2 * f),  # x and dy: once for u and v, once for the gradients
            "swiglu": 3 * f + 5 * f,
            "rotary": 4 * rotated,
            "attention": c + a + 2 * c + 2 * a,
        }
        return {name: tokens * self.layers * ITEMSIZE * n for name, n in columns.items()}

    def dequantize_bytes(self) -> int:
        """Of every weight once: half a byte and its share of a scale in, two bytes out."""
        return int(2.53 * self.layers * sum(k * n for k, n in self.linears.values()))


def count(job: Job, saved: str, dequantized: int) -> dict[str, Any]:
    """TFLOP of products and attention, GB of the rest; `dequantized`: how often a step dequantises each weight."""
    model, tokens = Model(job.shape), sum(job.lengths)
    head = 2 * 2 * round(tokens * job.supervised) * model.hidden * VOCABULARY
    return {
        "job": job.name, "tokens": tokens, "saved": saved,
        "products_tflop": round((2 * model.product_flops(tokens) + head) / 1e12, 1),
        "recomputed_tflop": round(model.product_flops(tokens, RECOMPUTED[saved]) / 1e12, 1),
        "attention_tflop": round(model.attention_flops(job.lengths) / 1e12, 1),
        "other_gb": {name: round(n / 1e9, 1) for name, n in model.step_bytes(tokens).items()},
        "dequantize_gb": round(dequantized * model.dequantize_bytes() / 1e9, 1),
    }  # fmt: skip


def bound(counted: dict[str, Any], product_rate: float, attention_rate: float, bandwidth: float) -> dict[str, float]:
    """ms of each part at TFLOP/s and TB/s."""
    parts = {
        "products_ms": counted["products_tflop"] / product_rate * 1e3,
        "recomputed_ms": counted["recomputed_tflop"] / product_rate * 1e3,
        "attention_ms": counted["attention_tflop"] / attention_rate * 1e3,
        "other_ms": (sum(counted["other_gb"].values()) + counted["dequantize_gb"]) / bandwidth,
    }
    return {name: round(ms, 1) for name, ms in (parts | {"bound_ms": sum(parts.values())}).items()}


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measured_bandwidth() -> float:
    """TB/s of a copy, bytes read and written."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: out.copy_(source)) / 1e9


def measured_product_rate(job: Job, lora_columns: int) -> float:
    """TFLOP/s of a layer's products and the head's, forward and input gradient, one after the other."""
    model, tokens = Model(job.shape), sum(job.lengths)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    runs, flops = [], 0.0
    supervised = min(round(tokens * job.supervised), 1024)
    # A layer's products as often as there are layers, the head's chunks as often as rows ask for them.
    cases = [(tokens, k, n, model.layers) for k, n in model.linears.values()]
    cases.append((supervised, model.hidden, VOCABULARY, max(round(tokens * job.supervised) // supervised, 1)))
    for rows, k, n, times in cases:
        p = lora_columns if n != VOCABULARY else 0
        matrix = torch.randn(n + p, k + p, **options)
        x, dy = torch.randn(rows, k + p, **options), torch.randn(rows, n + p, **options)
        y, dx = torch.empty(rows, n + p, **options)[:, :n], torch.empty(rows, k + p, **options)[:, :k]

        def pair(x: Any = x, dy: Any = dy, m: Any = matrix, y: Any = y, dx: Any = dx, n: int = n, k: int = k) -> None:
            torch.mm(x, m[:n].t(), out=y)
            torch.mm(dy, m[:, :k], out=dx)

        runs.append((pair, times))
        flops += 4.0 * rows * k * n * times
    total = sum(milliseconds(pair) * times for pair, times in runs)
    return flops / total / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=[job.name for job in JOBS])
    parser.add_argument("--product-rate", type=float, default=745, help="TFLOP/s; --measure measures it by job")
    parser.add_argument("--attention-rate", type=float, default=430, help="TFLOP/s (benchmarks/long_attention.py)")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s; --measure measures it")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    bandwidth = measured_bandwidth() if args.measure else args.bandwidth
    print(f"bandwidth {bandwidth:.2f} TB/s")
    for job in (job for job in JOBS if job.name in args.jobs):
        rate = args.product_rate
        if args.measure:
            plain, rate = measured_product_rate(job, 0), measured_product_rate(job, LORA_COLUMNS)
            print(f"{job.name}: products at {rate:.0f} TFLOP/s with LoRA columns, {plain:.0f} without", flush=True)
        for saved, dequantized in (("all", 0), ("attention", 2)):
            counted = count(job, saved, dequantized)
            print("RESULT " + json.dumps(counted | bound(counted, rate, args.attention_rate, bandwidth)), flush=True)


if __name__ == "__main__":
    main()
