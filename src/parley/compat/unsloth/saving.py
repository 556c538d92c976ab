"""`save_pretrained_merged`, `save_pretrained_gguf` and their `push_to_hub_` forms, as methods of a notebook's model.

They write the model as a run and export that, so that each file is verified as `parley export` verifies it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel

from parley.compat.unsloth.options import check_options
from parley.config import RunConfig
from parley.errors import UsageError
from parley.exporting.export import Export, export
from parley.exporting.push import prepare_upload, push
from parley.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

# They steer speed, memory and the form of files in Unsloth alone.
NO_MEANING = [
    "commit_description", "commit_message", "create_pr", "datasets", "first_conversion", "is_main_process",
    "max_shard_size", "maximum_memory_usage", "revision", "safe_serialization", "save_function", "save_peft_format",
    "tags", "temporary_location", "use_temp_dir", "variant",
]  # fmt: skip
NO_MEANING_LOCALLY = [*NO_MEANING, "private", "token"]
NOT_OFFERED = {"push_to_hub": "call push_to_hub_merged or push_to_hub_gguf", "state_dict": "leave it out"}
METHODS_16BIT = ("merged_16bit", "16bit")
GGUF_TYPES = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
"""Unsloth's words for types; all others are llama.cpp's names."""
DATA = "data of a notebook"  # a file that does not exist: the exports are compared on other conversations


def save_pretrained_merged(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
    *,
    verify: bool = True,
    **options: Any,
) -> Path:
    """Write the model with its adapter merged into the 16-bit base ("merged_16bit"), or the adapter ("lora").

    Raises UsageError for other methods and unknown options, and for a folder that exists.
    """
    check_options(save_pretrained_merged, options, no_meaning=NO_MEANING_LOCALLY, not_offered=NOT_OFFERED)
    return _save(self, tokenizer, Path(save_directory), *_merged_target(self, save_method), verify)[0].folder


def save_pretrained_gguf(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    *,
    verify: bool = True,
    **options: Any,
) -> list[Path]:
    """Write the merged model as GGUF, into the folder or, for several types, into one folder in it for each.

    Raises UsageError for unknown types and options, and for a folder that exists.
    """
    check_options(save_pretrained_gguf, options, no_meaning=NO_MEANING_LOCALLY, not_offered=NOT_OFFERED)
    done = _save(self, tokenizer, Path(save_directory), "gguf", _gguf_types(quantization_method), verify)
    return [each.folder for each in done]


def push_to_hub_merged(
    self: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
    *,
    token: str | None = None,
    private: bool | None = None,
    verify: bool = True,
    **options: Any,
) -> str:
    """`save_pretrained_merged`, sent to the hub: into a private repository unless `private=False`."""
    check_options(push_to_hub_merged, options, no_meaning=NO_MEANING, not_offered=NOT_OFFERED)
    return _push(self, tokenizer, repo_id, *_merged_target(self, save_method), token, private, verify)


def push_to_hub_gguf(
    self: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    *,
    token: str | None = None,
    private: bool | None = None,
    verify: bool = True,
    **options: Any,
) -> str:
    """`save_pretrained_gguf`, sent to the hub: into a private repository unless `private=False`."""
    check_options(push_to_hub_gguf, options, no_meaning=NO_MEANING, not_offered=NOT_OFFERED)
    return _push(self, tokenizer, repo_id, "gguf", _gguf_types(quantization_method), token, private, verify)


METHODS: tuple[Callable[..., Any], ...] = (
    save_pretrained_merged,
    save_pretrained_gguf,
    push_to_hub_merged,
    push_to_hub_gguf,
)


def with_saving(model: Any) -> Any:
    """`model`, itself, with the methods that notebooks call."""
    for method in METHODS:
        setattr(model, method.__name__, MethodType(method, model))
    return model


def _merged_target(model: Any, method: str | None) -> tuple[str, list[str]]:
    method = method or METHODS_16BIT[0]
    if method == "lora":
        return "adapter", []
    if method in METHODS_16BIT:
        return "merged", ["bf16" if model.config.dtype == torch.bfloat16 else "f16"]
    raise UsageError(
        f"save_method={method!r} is not offered here; use 'merged_16bit' (load it with load_in_4bit=True), or 'lora'"
    )


def _gguf_types(method: str | Sequence[str] | None) -> list[str]:
    methods = [method or "fast_quantized"] if isinstance(method, str | None) else list(method)
    return [GGUF_TYPES.get(name.lower(), name.lower()) for name in methods]


def _save(
    model: Any, tokenizer: Any, place: Path, target: str, quants: list[str], verify: bool, name: str | None = None
) -> list[Export]:
    if tokenizer is None:
        raise UsageError("the tokenizer is saved with the weights; give it after the folder or the repository")
    if place.exists():  # before the weights are written
        raise UsageError(f"{place}: exists; remove it, or choose another folder")
    with _as_run(model, tokenizer, name or place.resolve().name) as run:
        done = export(run, target, quants, output=place, verify=verify)
    for each in done:
        if not each.passed:
            assert each.record.figures is not None
            logger.warning("%s is UNVERIFIED: %s", each.folder, each.record.figures.failure)
    return done


def _push(
    model: Any, tokenizer: Any, repo: str, target: str, quants: list[str], token: str | None, private: bool | None,
    verify: bool,
) -> str:  # fmt: skip
    address = ""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "export"
        for each in _save(model, tokenizer, place, target, quants, verify, repo.rsplit("/", 1)[-1] or "model"):
            # Who says verify=False wants it sent as it is; what failed is refused.
            upload = prepare_upload(each.folder, repo, public=private is False, unverified=not verify)
            address = push(upload, token=token or None)
            logger.warning(
                "%s: sent %s to a %s repository", repo, each.record.name, "public" if upload.public else "private"
            )
    return address


@contextmanager
def _as_run(model: Any, tokenizer: Any, name: str) -> Iterator[Path]:
    """A run's folder with the weights of `model`, removed afterwards."""
    adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if adapted else model
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        quantization = (
            "nf4" if _flag(base, "is_loaded_in_4bit") else "int8" if _flag(base, "is_loaded_in_8bit") else "auto"
        )
        values = {
            "output": str(path),
            "model": {"name": base.name_or_path, "quantization": quantization, "device": "cpu"},
            "data": str(Path(scratch) / DATA),
            "lora": _lora_settings(model) if adapted else None,
        }
        folder = RunFolder.create(RunConfig.create(values))
        folder.save_weights(model, tokenizer, full=not adapted)
        yield path


def _flag(model: Any, name: str) -> bool:
    """What transformers sets on a model that it quantised, and on no other."""
    return bool(vars(model).get(name))


def _lora_settings(model: PeftModel) -> dict[str, Any]:
    fields = model.peft_config[model.active_adapter].to_dict()
    targets = fields["target_modules"]
    chosen = {name: fields[name] for name in ("r", "lora_alpha", "use_rslora", "use_dora", "bias")}
    return {**chosen, "target_modules": targets if isinstance(targets, str) else sorted(targets)}
