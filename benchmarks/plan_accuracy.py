"""`parley plan` against the measured peak: random weights in published shapes, a few steps each, a process each.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --only 1b-nf4-auto,8b-bf16-plain --output plan.jsonl
    python benchmarks/plan_accuracy.py --shape tiny     # the same on a CPU: its logic, not its figures

Measured is what PyTorch's allocator reserved at most, and what the process held beside it (context and kernels).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

GIB = 2**30
LLAMA = dict(vocab_size=128256, max_position_embeddings=131072, num_key_value_heads=8, model_type="llama")
SHAPES: dict[str, dict[str, Any]] = {
    "1b": dict(
        LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True,
    ),
    "3b": dict(
        LLAMA, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True,
    ),
    "8b": dict(
        LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
        tie_word_embeddings=False,
    ),
    "tiny": dict(
        LLAMA, vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    ),
}  # fmt: skip
# Shape, quantization, path; what `training.memory` and `training.engine` are for it.
CONFIGURATIONS = (
    "1b-nf4-auto", "1b-bf16-low", "1b-nf4-plain",
    "3b-bf16-auto", "3b-nf4-low", "3b-bf16-plain",
    "8b-nf4-auto", "8b-bf16-plain",
)  # fmt: skip
ROWS, SHORTEST, LONGEST = 64, 100, 1024
TINY = 32  # by which rows of the tiny shape are shorter
STEPS = 6
SECONDS_EACH = 150


def lengths(name: str) -> np.ndarray:
    rows = np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, ROWS)
    return rows // TINY if is_tiny(name) else rows


def longest(name: str) -> int:
    return LONGEST // TINY if is_tiny(name) else LONGEST


def is_tiny(name: str) -> bool:
    return name.startswith("tiny")


def settings(name: str, folder: Path) -> Any:
    """The run's configuration, on a model folder that has a config.json and no weights."""
    from parley.config import RunConfig
    from parley.models.demo import demo_model_path

    shape, quantization, path = name.split("-")
    model = folder / "model"
    model.mkdir(exist_ok=True)
    demo = json.loads((demo_model_path() / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(demo | SHAPES[shape] | {"dtype": "bfloat16"}))
    return RunConfig.create(
        {
            "output": str(folder / "run"),
            "model": {
                "name": str(model),
                "quantization": "nf4" if quantization == "nf4" else "none",
                "max_seq_length": longest(name),
            },
            "training": {
                "engine": "plain" if path == "plain" else "auto",
                "memory": "low" if path == "low" else "auto",
                "max_steps": STEPS,
                "save_strategy": "no",
            },
        }
    )


def predicted(config: Any, name: str) -> Any:
    import torch

    from parley.training.plan.device import planned_device
    from parley.training.plan.planner import Data
    from parley.training.plan.run_plan import plan_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return plan_for(config, Data(lengths(name), ROWS), planned_device(device, None))


def random_model(config: Any, device: str) -> Any:
    """The model of `config` with random weights, quantised on the device, never on disk."""
    import bitsandbytes
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from parley.models.load import load_config

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(config.model), dtype=dtype)
    head = model.get_output_embeddings()
    nf4 = config.model.quantization == "nf4"
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head and nf4:
            weight = 0.02 * torch.randn(module.weight.shape, dtype=dtype, device=device)
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, False, dtype, True, "nf4", device="meta"
            )
            params = bitsandbytes.nn.Params4bit(weight.cpu(), False, quant_type="nf4", compress_statistics=True)
            layer.weight = params.to(device)
            del weight
            model.set_submodule(path, layer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                value = value.fill_(1) if parameter.dim() == 1 else value.normal_(0, 0.02)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.is_loaded_in_4bit = nf4  # PEFT chooses its layers by this
    return model


def measure(config: Any, name: str, folder: Path) -> dict[str, Any]:
    """Train a few steps and return peaks in GiB."""
    import torch
    from datasets import Dataset

    from parley.config import ModelSection
    from parley.models.adapters import attach_lora
    from parley.models.load import load_tokenizer
    from parley.training.arguments import sft_config
    from parley.training.trainer import SFTTrainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = attach_lora(random_model(config, device.type), config.lora, seed=0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    vocabulary = min(model.get_input_embeddings().weight.shape[0], 1000)
    rng = np.random.default_rng(1)
    rows = [rng.integers(10, vocabulary, length).tolist() for length in lengths(name)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    args, _ = sft_config(config, folder / "checkpoints", device)
    trainer = SFTTrainer(
        model, args, train_dataset=data, processing_class=load_tokenizer(ModelSection()),
        engine=config.training.engine, memory=config.training.memory,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    found = {"path": "plain" if trainer.fused_step is None else "fused", "train_s": time.perf_counter() - started}
    found["plain_because"] = trainer.plain_because
    if trainer.fused_step is not None:
        found["step_plan"] = trainer.fused_step.plan.describe()
    if device.type != "cuda":
        return found | {"measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    context = (total - free - torch.cuda.memory_reserved()) / GIB
    return found | {"allocated": allocated, "reserved": reserved, "context": context, "total": total / GIB}


def one(name: str, result: Path, others_gib: float) -> None:
    """Both figures of one configuration, in this process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = settings(name, folder)
        planned = predicted(config, name)
        figures = measure(config, name, folder)
    if "reserved" in figures:
        figures["context"] -= others_gib
        figures["measured"] = figures["reserved"] + figures["context"]
    parts = {part: size / GIB for part, size in planned.estimates[0].parts.items()}
    figures |= {
        "name": name,
        "predicted": planned.peak_bytes / GIB,
        "predicted_path": planned.estimates[0].path,
        "predicted_s": planned.seconds,
        "parts": parts,
        "error": planned.peak_bytes / GIB / figures["measured"] - 1,
    }
    result.write_text(json.dumps(figures))


def gpu_memory_in_use() -> float:
    """GiB that other processes hold of the first GPU; 0 where that cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return float(answer.stdout.split()[0]) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0.0


def run_one(name: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.json"
        command = [sys.executable, __file__, "--one", name, str(result), str(gpu_memory_in_use())]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"name": name, "failed": f"took over {seconds:.0f} s"}
        if process.returncode or not result.is_file():
            lines = [line for line in process.stderr.splitlines() if line.strip()]
            return {"name": name, "failed": lines[-1] if lines else f"exit code {process.returncode}"}
        return json.loads(result.read_text())


def table(results: list[dict[str, Any]]) -> str:
    head = ("configuration", "path", "predicted GiB", "measured", "error", "allocated", "reserved", "context",
            "tensors predicted", "slack predicted", "s predicted", "s measured")  # fmt: skip
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in results:
        if "failed" in row:
            lines.append(f"{row['name']} | failed: {row['failed']}")
            continue
        slack, context = row["parts"].get("allocator slack", 0.0), row["parts"].get("CUDA context", 0.0)
        figures = (
            row["predicted"], row["measured"], f"{row['error']:+.1%}", row.get("allocated"), row.get("reserved"),
            row.get("context"), row["predicted"] - slack - context, slack, row["predicted_s"], row["train_s"],
        )  # fmt: skip
        cells = [f"{f:.2f}" if isinstance(f, float) else str(f or "") for f in figures]
        path = row["path"] if row["path"] == row["predicted_path"] else f"{row['path']} (not {row['predicted_path']})"
        lines.append(" | ".join([row["name"], path, *cells]))
    errors = [abs(row["error"]) for row in results if "error" in row]
    worst = f"largest error {max(errors):.1%} of {len(errors)} configurations" if errors else "nothing was measured"
    return "\n".join([*lines, "", worst])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="configurations, separated by commas")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="every configuration in this shape")
    parser.add_argument("--output", type=Path, help="one JSON object a configuration")
    parser.add_argument("--seconds", type=float, default=460, help="no configuration is begun after so long")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "RESULT", "GIB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], Path(args.one[1]), float(args.one[2]))
        return
    names = args.only.split(",") if args.only else list(CONFIGURATIONS)
    if args.shape:
        names = list(dict.fromkeys("-".join([args.shape, *name.split("-")[1:]]) for name in names))
    started, results = time.monotonic(), []
    for name in names:
        left = args.seconds - (time.monotonic() - started)
        results.append(
            {"name": name, "failed": "no time left"} if left < 20 else run_one(name, min(SECONDS_EACH, left))
        )
        print(json.dumps(results[-1]), flush=True)
        if args.output:
            args.output.write_text("".join(json.dumps(row) + "\n" for row in results))
    print(table(results))


if __name__ == "__main__":
    main()
