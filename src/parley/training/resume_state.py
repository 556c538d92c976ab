"""What a checkpoint records beside weights and optimizer, so that a resumed run is the undisturbed one.

Settings and data are compared when a run is resumed: what would change a step is refused by its name. Versions and
device are compared too, and a difference is logged: they change rounding, not the run.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainingArguments

from parley.data.packing import ORIGIN
from parley.errors import DataError, RunError, UsageError
from parley.text import shorten_middle
from parley.training.checkpoint import read_json
from parley.training.processes import process_count
from parley.versions import library_versions

RESUME_STATE = "resume_state.json"
HASHED_ROWS = 1000  # at a time

# Arguments that change neither what a step computes nor which rows it sees, by name or by the start of their name.
FREE_PREFIXES = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "hub_",
    "push_to_hub",
    "dataloader_",
    "trackio_",
    "ddp_",
    "include_",
)
FREE = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "batch_eval_metrics",
    "dataset_num_proc",
    "debug",
    "disable_tqdm",
    "do_eval",
    "do_predict",
    "do_train",
    "gradient_checkpointing",  # recomputes the same values
    "gradient_checkpointing_kwargs",
    "greater_is_better",
    "load_best_model_at_end",
    "local_rank",
    "max_steps",
    "metric_for_best_model",
    "num_train_epochs",
    "output_dir",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
    "use_cpu",  # the device is compared by itself
}
# Of an adapter's settings: what PEFT writes for its own bookkeeping.
ADAPTER_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "runtime_config",
}


@dataclass
class ResumeState:
    """The content of resume_state.json.

    Attributes:
        step: optimizer steps done.
        settings: arguments, adapter and model by dotted name, without those that may change.
        data: number of training rows and SHA-256 of their columns; without the hash for a stream.
        versions, device: of the process that wrote the checkpoint.
        counters: figures that are summed since the last log, and tokens seen.
        plan: the memory plan of the fused step, which decides how a step is split; None on the plain path.
    """

    step: int
    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    device: dict[str, Any]
    counters: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        values = asdict(self) | {"settings_sha256": settings_hash(self.settings)}
        (folder / RESUME_STATE).write_text(json.dumps(values, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ResumeState:
        """Raises RunError where the file is not what `write` writes."""
        try:
            values = read_json(folder / RESUME_STATE)
            digest = values.pop("settings_sha256")
            state = cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"{folder / RESUME_STATE}: not what training writes ({error})") from None
        if settings_hash(state.settings) != digest:
            raise RunError(f"{folder / RESUME_STATE}: the settings do not fit their hash")
        return state


def exact_settings(args: TrainingArguments, model: Any, **more: Any) -> dict[str, Any]:
    """By dotted name: every setting that decides what a step computes, as JSON values."""
    settings = {name: value for name, value in args.to_dict().items() if not is_free(name)}
    settings |= more
    if isinstance(model, PeftModel):
        for adapter, config in model.peft_config.items():
            prefix = "lora" if adapter == "default" else f"lora.{adapter}"
            fields = {name: value for name, value in config.to_dict().items() if name not in ADAPTER_FREE}
            settings |= {f"{prefix}.{name}": value for name, value in fields.items()}
    config = model.config.to_dict()
    shape = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    settings |= {f"model.{name}": config.get(name) for name in shape}
    settings["model.dtype"] = str(model.dtype).removeprefix("torch.")
    settings["model.quantization"] = (config.get("quantization_config") or {}).get("quant_method")
    return json.loads(json.dumps(settings, default=_to_json, sort_keys=True))


def settings_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def data_fingerprint(dataset: Any) -> dict[str, Any]:
    """`rows` and `sha256` of a data set in memory; both None where rows are only known as they are read.

    Not part of it are the rows' origins: a file that moved has the same rows.
    """
    if not isinstance(dataset, Dataset):
        return {"rows": None, "sha256": None}
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(HASHED_ROWS):
        for name in sorted(set(table.column_names) - {ORIGIN}):
            digest.update(name.encode())
            _hash_column(table[name].combine_chunks(), digest)
    return {"rows": len(dataset), "sha256": digest.hexdigest()}


def this_device(device: torch.device) -> dict[str, Any]:
    """What decides rounding: this machine, and over how many processes sums are split."""
    processes = {"processes": process_count()}
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)} | processes
    return {"type": device.type, "name": platform.machine(), "threads": torch.get_num_threads()} | processes


def check_settings_unchanged(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UsageError that names the settings in which a resumed run would not be the undisturbed one."""
    changed = [name for name in sorted(saved.keys() & now.keys()) if saved[name] != now[name]]
    if changed:
        shown = "; ".join(f"{name} was {_short(saved[name])} and is {_short(now[name])}" for name in changed[:3])
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UsageError(
            f"{checkpoint.name} cannot be resumed exactly: {shown}{more}; give the old value back, or start a new run "
            f"with its weights as the model ({checkpoint})"
        )


def check_data_unchanged(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises DataError where the training rows are other ones, or rows of a stream's that cannot be compared."""
    if saved != now:
        rows = f"{saved['rows']} rows then, {now['rows']} now" if saved["rows"] != now["rows"] else "other content"
        raise DataError(
            f"{checkpoint.name} cannot be resumed exactly: the training rows have changed ({rows}); give the same "
            f"data and data settings, or start a new run with its weights as the model ({checkpoint})"
        )


def differences_in_rounding(state: ResumeState, device: torch.device) -> list[str]:
    """Libraries and hardware that are not those of the checkpoint: the run continues, but not bit for bit."""
    now = library_versions()
    lines = [f"{name} {was} (now {now.get(name)})" for name, was in state.versions.items() if now.get(name) != was]
    here = this_device(device)
    lines += [f"{key} {was} (now {here.get(key)})" for key, was in state.device.items() if here.get(key) != was]
    return lines


def is_free(name: str) -> bool:
    """Whether an argument may change when a run is resumed."""
    return name in FREE or name.startswith(FREE_PREFIXES)


def _to_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _short(value: Any) -> str:
    return shorten_middle(json.dumps(value), 60)


def _hash_column(column: pa.Array, digest: Any) -> None:
    """Lists by their lengths and values, since Arrow's own buffers hold bytes of rows that were left out."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        digest.update(np.ascontiguousarray(column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)))
        _hash_column(column.flatten(), digest)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        digest.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)))
    else:
        digest.update(json.dumps(column.to_pylist(), default=str).encode())
