"""TRL's internals that Parley needs.

`SFTTrainer._metrics` holds, per mode ("train", "eval"), the figures that TRL's `log` averages and adds to the logs, and
`_total_train_tokens` is the `num_tokens` among them. A step that does not go through TRL's `compute_loss` has to report
there. Public alternative: none; `log` could be overridden, but callbacks and the progress bar read what it adds.
"""

from __future__ import annotations

from typing import Any

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
