"""Put before a trainer of TRL's: work that runs out of memory is done again in smaller passes (out_of_memory.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable

from accelerate import DistributedType

from parley.training.callbacks import EventLog
from parley.training.checkpointing_trainer import CheckpointingTrainer
from parley.training.out_of_memory import Result, Stage, describe_reduction, retry_smaller

logger = logging.getLogger(__name__)


class RetryingTrainer(CheckpointingTrainer):
    @property
    def runs_alone(self) -> bool:
        """Whether this is the only process: others would wait for the collective operations of a repeated pass."""
        return self.accelerator.distributed_type == DistributedType.NO

    def retry(self, attempt: Callable[[], Result], reduce: Callable[[], bool], *, collective: bool = True) -> Result:
        """`attempt()`, again after each `reduce()` while memory runs out; where other processes take part, once."""
        return retry_smaller(attempt, reduce) if self.runs_alone or not collective else attempt()

    def record_reduction(self, during: Stage, size: str) -> None:
        """Log it, and write it to the event log of a run, from which the report has it."""
        step = self.state.global_step + (during != "evaluation")
        message = describe_reduction(during, step, size)
        logger.warning("%s", message)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EventLog):
                callback.write({"event": "out_of_memory", "step": step, "during": during, "message": message})
