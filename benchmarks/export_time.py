"""How long an export takes, and how much memory: random weights in a published shape, with an adapter at random.

    python benchmarks/export_time.py 1b q8_0 --tokenizer FOLDER --data rows.jsonl
    python benchmarks/export_time.py 8b q4_k_m --tokenizer FOLDER --data rows.jsonl --no-verify

FOLDER holds a tokenizer with a chat template for 128,256 tokens (Llama 3's). The model is written to --scratch first,
which is not timed, and removed at the end. Prints one line: wall and CPU seconds, peak memory of the process, and the
seconds that the disk takes to read the checkpoint and write the export at the rate measured beside it. Random weights
are quantised as slowly as trained ones; what they answer means nothing, and is compared all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import parley
from parley.config import LLAMA_PROJECTIONS, RunConfig
from parley.training.run_folder import RunFolder
from parley.units import GIB

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}  # fmt: skip
SHARD_TENSORS = 32
POOL = 2**24 + 5  # no multiple of a row, so that rows differ
PROBE_BYTES = 2**28


def config_of(shape: str, layers: int | None) -> LlamaConfig:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0 if shape == "1b" else 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaConfig(
        **SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers}), vocab_size=128256,
        max_position_embeddings=131072, rms_norm_eps=1e-5, bos_token_id=128000,
        eos_token_id=128009, pad_token_id=128004, rope_parameters=rope, dtype=torch.bfloat16,
    )  # fmt: skip


def write_base(config: LlamaConfig, folder: Path, tokenizer: Any) -> None:
    """A model at random, written a few tensors at a time: it never has to fit into memory."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    names = [name for name in state if not (config.tie_word_embeddings and name == "lm_head.weight")]
    # Every tensor is cut from the same random values: drawing 8 billion of them would take longer than the export.
    values = torch.empty(POOL).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    places: dict[str, str] = {}
    for start in range(0, len(names), SHARD_TENSORS):
        shard = {}
        for name in names[start : start + SHARD_TENSORS]:
            shape = state[name].shape
            drawn = values.repeat(shape.numel() // POOL + 1)[: shape.numel()].reshape(shape).clone()
            shard[name] = drawn if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
        file = f"model-{start:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_run(base: Path, output: Path, data: Path, tokenizer: Any) -> None:
    config = RunConfig.create(
        {
            "output": str(output),
            "model": {"name": str(base), "device": "cpu"},
            "data": {"source": str(data), "limit": 400},
        }
    )
    run = RunFolder.create(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
        model.name_or_path = str(base)
        adapted = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM")
        )
    weights = {
        name.replace(".default", ""): torch.randn(parameter.shape) * 0.01
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    run.adapter.mkdir()
    adapted.peft_config["default"].save_pretrained(run.adapter)
    save_file(weights, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(run.adapter)


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second written with a sync, and read after the cache was dropped, as far as the system does so."""
    path, block = folder / "probe", os.urandom(2**20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    written = PROBE_BYTES / (time.perf_counter() - started)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while file.read(2**20):
            pass
    read = PROBE_BYTES / (time.perf_counter() - started)
    path.unlink()
    return written, read


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("quant")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="a folder with space for the model three times")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has: the peak does not depend on them")
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="export-time-", dir=options.scratch))
    try:
        base, output = scratch / "base", scratch / "run"
        base.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        child = os.fork()  # so that writing the model does not count for the peak
        if child == 0:
            write_base(config_of(options.shape, options.layers), base, tokenizer)
            write_run(base, output, options.data, tokenizer)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        write_rate, read_rate = disk_rates(scratch)
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        (done,) = parley.export(output, "gguf", options.quant, verify=options.verify)
        wall, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        disk = size_of(base) / read_rate + size_of(done.folder) / write_rate
        print(
            f"{options.shape} {options.quant} {done.record.status}: {wall:.1f} s, {cpu:.1f} s of CPU, "
            f"{now.ru_maxrss * 1024 / GIB:.2f} GiB at the peak; {size_of(base) / GIB:.2f} GiB read and "
            f"{size_of(done.folder) / GIB:.2f} GiB written, {disk:.1f} s at the disk's rate"
        )
        print(done.record.figures.model_dump_json(exclude={"differences"}) if done.record.figures else "")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
