"""What a run does with its held-out loss while it trains: stop early, and keep the best weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback

from parley.config import TrainingSection
from parley.text import print_text
from parley.training.best_weights import BestWeights
from parley.training.early_stopping import EarlyStopping, evaluations
from parley.training.fused_trainer import FusedTrainer


@dataclass
class Validation:
    """The callbacks of a run's settings, and what is left to do after its last step."""

    settings: TrainingSection
    folder: Path
    console: Console
    early_stopping: EarlyStopping | None = field(init=False, default=None)
    best: BestWeights | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.settings.early_stopping is not None:
            self.early_stopping = EarlyStopping(self.settings.early_stopping, self.console)
        if self.settings.keeps_best:
            self.best = BestWeights(self.folder)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        return [callback for callback in (self.early_stopping, self.best) if callback is not None]

    def finish(self, trainer: FusedTrainer) -> tuple[int, list[str]]:
        """Put the weights to keep into the model. Returns their step, and notes for the report."""
        step = trainer.state.global_step
        notes = []
        if self.early_stopping is not None:
            trainer.remove_callback(self.early_stopping)  # evaluations from here on are no longer of training
            if self.early_stopping.reason:
                notes.append(self.early_stopping.reason)
        if self.best is None:
            return step, notes
        evaluated = evaluations(trainer.state)
        if not evaluated or evaluated[-1].step != step:  # the last step may be the best one
            trainer.evaluate()
        trainer.remove_callback(self.best)
        note = self._keep_best(trainer, self.best)
        print_text(self.console, note[0])
        return note[1], [*notes, note[0]]

    def _keep_best(self, trainer: FusedTrainer, best_weights: BestWeights) -> tuple[str, int]:
        evaluated = evaluations(trainer.state)
        best = best_weights.restore(trainer.model, trainer.state)
        if best is None:
            return "no held-out loss was finite: the weights of the last step are kept", trainer.state.global_step
        last = evaluated[-1]
        lost = min((each.loss for each in evaluated), default=best.loss) < best.loss
        ordinal = "" if last.step != best.step else ", the last one"
        of_last = f" ({last.loss:.4g} at step {last.step})" if last.step != best.step else ""
        text = (
            f"kept the weights of step {best.step}{ordinal}: held-out loss {best.loss:.4g} is the lowest of "
            f"{len(evaluated)} evaluations{of_last}"
        )
        return text + (", but for weights that are no longer there" if lost else ""), best.step
