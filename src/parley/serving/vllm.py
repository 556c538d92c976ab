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

from parley.config import DEMO_MODEL, GenerationSection, ModelSection
from parley.errors import UsageError
from parley.models.adapter_files import read_adapter_fields
from parley.models.resolve import adapter_base, local_folder, model_folder
from parley.models.vllm_adapters import (
    LORA_RANKS,
    adapter_arguments,
    max_lora_rank,
    tokenizer_arguments,
    unread_parts,
)
from parley.serving.loading import model_section, served_names, short_name
from parley.training.run_folder import RunFolder


def vllm_arguments(
    source: str, *, host: str, port: int, max_num_seqs: int | None, max_model_len: int | None, trust_remote_code: bool
) -> list[str]:
    """The arguments of `vllm` that serve a run's folder, or any model or adapter, as `parley serve` does.

    The API key is not among them, because other users can read a process's arguments (see `run_vllm`). Raises
    UsageError for an adapter that vLLM cannot read.
    """
    run = RunFolder.open(source, trust_remote_code=trust_remote_code) if RunFolder.is_run(source) else None
    arguments = ["serve", *(_run_model(source, run) if run else _plain_model(source))]
    arguments += ["--host", host, "--port", str(port)]
    if max_num_seqs is not None:
        arguments += ["--max-num-seqs", str(max_num_seqs)]
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if trust_remote_code:
        arguments.append("--trust-remote-code")
    settings = run.config.generation if run else GenerationSection()
    arguments += ["--override-generation-config", json.dumps(_sampling(settings))]
    return [*arguments, "--enable-auto-tool-choice", "--tool-call-parser", "llama3_json"]


def _plain_model(source: str) -> list[str]:
    """A model, or an adapter's folder with the base that it names."""
    section = model_section(source)
    folder = local_folder(source) if source != DEMO_MODEL else None
    base = adapter_base(folder, section) if folder is not None else None
    if folder is None or base is None:
        return [_model_path(source, section), "--served-model-name", short_name(source)]
    return _adapter(source, folder, base)


def _run_model(source: str, run: RunFolder) -> list[str]:
    weights, section = run.weights.resolve(), run.config.model
    if run.model.is_dir():
        return [str(weights), "--served-model-name", short_name(source), *tokenizer_arguments(weights)]
    if section.adapter == "merge":
        raise UsageError(
            f"{source}: --engine vllm cannot merge the run's base, an adapter, on loading; use --engine parley"
        )
    return _adapter(source, weights, section.model_copy(update={"name": run.base_name()}))


def _adapter(source: str, weights: Path, base: ModelSection) -> list[str]:
    path, names = _model_path(source, base), list(served_names(source, base.name))
    return adapter_arguments(path, base, names, weights, tokenizer_arguments(weights), _lora_rank(source, weights))


def _model_path(source: str, section: ModelSection) -> str:
    """A folder, or a hub id that vLLM downloads itself."""
    if section.name == DEMO_MODEL or local_folder(section.name) is not None:
        folder = model_folder(section)
        if adapter_base(folder, section) is not None:
            raise UsageError(f"{source}: --engine vllm cannot read an adapter on an adapter; use --engine parley")
        return str(folder)
    return section.name


def _lora_rank(source: str, adapter: Path) -> int:
    """The least --max-lora-rank for an adapter. Raises UsageError for one that vLLM reads wrongly or not at all."""
    fields = read_adapter_fields(adapter)
    unread = unread_parts(adapter, fields)
    if unread is not None:
        raise UsageError(f"{source}: --engine vllm cannot read the adapter's {unread}; use --engine parley")
    allowed = max_lora_rank(fields.r)
    if allowed is None:
        raise UsageError(
            f"{source}: --engine vllm takes adapters up to rank {LORA_RANKS[-1]}, got {fields.r}; use --engine parley"
        )
    return allowed


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
