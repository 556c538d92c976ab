"""transformers' internals that Parley needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer


def attention_implementation(model: PreTrainedModel) -> str:
    """The attention that `model` runs: eager, sdpa, flash_attention_2, ...

    Private: the attribute. Public alternative: none; `set_attn_implementation` sets what nothing public reads.
    """
    return str(model.config._attn_implementation)


def checkpoint_parent(trainer: Trainer, trial: Any) -> Path:
    """The folder of a trainer's checkpoints: its output_dir, or below it in a search for hyperparameters.

    Private: the method. Public alternative: `args.output_dir`, which is not the folder of a trial.
    """
    return Path(trainer._get_output_dir(trial))


def push_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Push a checkpoint to the hub as `push_to_hub` asks. Private: the method. There is no public alternative."""
    trainer._push_from_checkpoint(str(checkpoint))


def loss_since_log(trainer: Trainer) -> tuple[float, int]:
    """The sum of the steps' losses since the last log, and the step of that log. Waits for the device.

    Private: both attributes. Public alternative: none; TrainerState does not hold them, so that the first figure that
    a resumed Trainer logs is the mean of fewer steps.
    """
    return trainer._tr_loss.item(), trainer._globalstep_last_logged


def set_loss_since_log(trainer: Trainer, loss: float, step: int) -> None:
    """Continue the sum of `loss_since_log`. The mean loss that `train` returns leaves earlier processes' steps out."""
    trainer._tr_loss.fill_(loss)
    trainer._globalstep_last_logged = step
    trainer._total_loss_scalar -= loss
