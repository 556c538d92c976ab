"""Serves a run through vLLM's server: the arguments of `vllm serve` with adapter, template and defaults.

Options as in vLLM's documentation (docs.vllm.ai: "CLI Reference, vllm serve" and "LoRA Adapters").
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from parley.config import GenerationSection, ModelSection, RunConfig
from parley.errors import UsageError
from parley.models.folder import model_folder
from parley.serving.loading import served_names, short_name
from parley.training.run_folder import RunFolder

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


def vllm_arguments(
    source: str,
    *,
    host: str,
    port: int,
    max_num_seqs: int | None,
    max_model_len: int | None,
    trust_remote_code: bool = False,
) -> list[str]:
    """The arguments of `vllm` that serve a run's folder, or any model, as `parley serve` does.

    The API key is not among them, because other users can read a process's arguments (see `run_vllm`).
    """
    run = RunFolder.open(source, trust_remote_code=trust_remote_code) if RunFolder.is_run(source) else None
    config = run.config if run else RunConfig(model=ModelSection(name=source, trust_remote_code=trust_remote_code))
    arguments = ["serve", *_model(source, run, config), "--host", host, "--port", str(port)]
    if max_num_seqs is not None:
        arguments += ["--max-num-seqs", str(max_num_seqs)]
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if config.model.trust_remote_code:
        arguments.append("--trust-remote-code")
    arguments += ["--override-generation-config", json.dumps(_sampling(config.generation))]
    return [*arguments, "--enable-auto-tool-choice", "--tool-call-parser", "llama3_json"]


def _model(source: str, run: RunFolder | None, config: RunConfig) -> list[str]:
    section = config.model
    if run is None:
        return [_model_path(section), "--served-model-name", short_name(source)]
    weights = run.weights.resolve()
    tokenizer = ["--tokenizer", str(weights)]
    template = weights / "chat_template.jinja"
    if template.is_file():
        tokenizer += ["--chat-template", str(template)]
    if run.model.is_dir():
        return [str(weights), "--served-model-name", short_name(source), *tokenizer]
    section = section.model_copy(update={"name": run.base_name()})
    adapter_name, base_name = served_names(source, section.name)
    arguments = [_model_path(section), "--served-model-name", base_name, *tokenizer]
    if section.revision is not None:
        arguments += ["--revision", section.revision]
    if section.dtype != "auto":
        arguments += ["--dtype", section.dtype]
    if section.quantization == "nf4":
        arguments += ["--quantization", "bitsandbytes"]
    return [
        *arguments,
        "--enable-lora",
        "--max-lora-rank",
        str(_rank(weights)),
        "--lora-modules",
        f"{adapter_name}={weights}",
    ]


def _model_path(section: ModelSection) -> str:
    """A folder, or a hub id that vLLM downloads itself."""
    return (
        section.name if short_name(section.name) == section.name and "/" in section.name else str(model_folder(section))
    )


def _rank(adapter: Path) -> int:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    allowed = [choice for choice in LORA_RANKS if choice >= rank]
    if not allowed:
        raise UsageError(f"--engine vllm takes adapters up to rank {LORA_RANKS[-1]}, got {rank}; use --engine parley")
    return allowed[0]


def _sampling(settings: GenerationSection) -> dict[str, float]:
    """Generation defaults, without max_new_tokens: vLLM would make it the limit of every request."""
    sampling = settings.model_dump(include={"temperature", "top_p", "min_p", "repetition_penalty"})
    return sampling | {"top_k": settings.top_k or -1}  # -1: all tokens


def find_vllm() -> str:
    """The `vllm` program, beside this Python or on the PATH. Raises UsageError without one."""
    bin_folder = str(Path(sys.executable).parent)
    found = shutil.which("vllm", path=os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise UsageError("--engine vllm: vLLM is not installed; pip install vllm, or use --engine parley")
    return found


def run_vllm(program: str, arguments: Sequence[str], api_key: str | None) -> NoReturn:
    """Replace this process by `vllm`; the API key goes in the environment."""
    environment = dict(os.environ) if api_key is None else {**os.environ, "VLLM_API_KEY": api_key}
    os.execve(program, [program, *arguments], environment)
