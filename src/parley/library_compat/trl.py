"""TRL's internals that Parley needs.

`SFTTrainer._metrics` holds, per mode ("train", "eval"), the figures that TRL's `log` averages and adds to the logs, and
`_total_train_tokens` is the `num_tokens` among them. A step that does not go through TRL's `compute_loss` has to report
there. Public alternative: none; `log` could be overridden, but callbacks and the progress bar read what it adds.

`GRPOTrainer._step` counts micro-batches, and `_buffered_inputs` holds the completions that further steps learn from;
`entropy_coef` and `_last_world_entropy` belong to its entropy controller. TRL's own checkpoints hold the last two, so
that its resumed runs sample anew. Public alternative: none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer


def metrics(trainer: Trainer, mode: str) -> dict[str, list[Any]]:
    """The values gathered since the last log, by name; `mode` is "train" or "eval"."""
    return trainer._metrics[mode]


def count_tokens(trainer: Trainer, tokens: int) -> None:
    """Add `tokens` to those trained on so far, and to the figures of the next log."""
    trainer._total_train_tokens += tokens
    metrics(trainer, "train")["num_tokens"] = [trainer._total_train_tokens]


def copy_figures(trainer: Trainer, mode: str) -> tuple[dict[str, list[Any]], int]:
    """All of the above as they are now, for `restore_figures` after a pass that is done again."""
    return {name: list(values) for name, values in trainer._metrics[mode].items()}, trainer._total_train_tokens


def restore_figures(trainer: Trainer, mode: str, copied: tuple[dict[str, list[Any]], int]) -> None:
    values, trainer._total_train_tokens = copied
    trainer._metrics[mode].clear()
    trainer._metrics[mode].update({name: list(parts) for name, parts in values.items()})


def tokens_seen(trainer: Trainer) -> int:
    """Tokens trained on so far."""
    return trainer._total_train_tokens


def set_tokens_seen(trainer: Trainer, tokens: int) -> None:
    """Continue the count of a checkpoint."""
    trainer._total_train_tokens = tokens


def keep_column(trainer: Trainer, name: str) -> None:
    """Do not remove the column `name` from data sets, though the model does not take it.

    To be called from `_set_signature_columns_if_needed`, which TRL, too, overrides for a column of its own. Public
    alternative: `remove_unused_columns=False`, which keeps every column of the user's.
    """
    columns = trainer._signature_columns
    if name not in columns:
        trainer._signature_columns = [*columns, name]


def set_signature_columns(trainer: Trainer, names: list[str]) -> None:
    """Keep the columns `names` of data sets, and no others. To be called as `keep_column` is."""
    trainer._signature_columns = names


def generation_state(trainer: Any) -> dict[str, Any]:
    """What the next step of a GRPOTrainer depends on beside its weights, as JSON values."""
    every = trainer.args.steps_per_generation * trainer.num_iterations
    buffered = None if trainer._step % every == 0 else trainer._buffered_inputs
    return {
        "step": trainer._step,
        "buffered": buffered and [{name: _to_json(value) for name, value in batch.items()} for batch in buffered],
        "entropy": [trainer.entropy_coef, trainer._last_world_entropy],
    }


def set_generation_state(trainer: Any, state: dict[str, Any]) -> None:
    """Continue where `generation_state` was taken."""
    device, batches = trainer.accelerator.device, state["buffered"]
    trainer._step = state["step"]
    trainer._buffered_inputs = batches and [
        {name: _from_json(value, device) for name, value in batch.items()} for batch in batches
    ]
    trainer.entropy_coef, trainer._last_world_entropy = state["entropy"]


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    return value


def _from_json(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device=device)
    return value


def latest_completions(trainer: Any) -> list[dict[str, Any]]:
    """Prompt, completion, weighted reward and advantage of each answer of a GRPOTrainer's last generation.

    `_logs` holds them for TRL's table (log_completions). Public alternative: none.
    """
    logs, weights = trainer._logs, trainer.reward_weights.tolist()
    by_function = [logs["rewards"][name] for name in trainer.reward_func_names]
    rewards = [
        sum(weight * value for weight, value in zip(weights, values, strict=True) if value == value)  # NaN is no reward
        for values in zip(*by_function, strict=True)
    ]
    columns = zip(logs["prompt"], logs["completion"], rewards, logs["advantages"], strict=True)
    names = ("prompt", "completion", "reward", "advantage")
    return [dict(zip(names, values, strict=True)) for values in columns]
