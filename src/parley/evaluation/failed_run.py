"""The end of a run whose numbers went wrong: the weights of its last good step are saved, and what happened is said."""

from __future__ import annotations

from dataclasses import dataclass

from parley.errors import TrainingError
from parley.evaluation.report_events import add_events, steps_of_events
from parley.training.callbacks import EventLog
from parley.training.fused_trainer import FusedTrainer
from parley.training.json_lines import WEIGHTS
from parley.training.last_good_weights import LastGoodWeights
from parley.training.prepare_training import TrainingSetup
from parley.training.report import Report, write_report
from parley.training.run_folder import RunFolder
from parley.training.run_training import broken_weights
from parley.training.step_monitor import NonfiniteStepError
from parley.training.validation import Validation


@dataclass
class FailedRun:
    """What is known of the run when it fails."""

    setup: TrainingSetup
    trainer: FusedTrainer
    folder: RunFolder
    log: EventLog
    report: Report
    validation: Validation
    last_good: LastGoodWeights

    def stopped_at(self, error: NonfiniteStepError) -> TrainingError:
        """The error to raise for a step that was not finite, once weights and report are saved."""
        training = self.setup.config.training
        skip = (
            ", or set training.nonfinite: skip to continue without such steps" if training.nonfinite == "stop" else ""
        )
        if skip and any(self.folder.checkpoints.glob("checkpoint-*")):
            skip += f": {self.folder.resume_command} --set training.nonfinite=skip"
        advice = (
            f"look at its rows in {self.folder.nonfinite}, lower training.learning_rate ({training.learning_rate:g})"
        )
        return self._end(str(error), error.record.step - 1, f"{advice}{skip}")

    def diverged(self, fault: str) -> TrainingError:
        """The error to raise for weights that are broken after the last step."""
        rate = self.setup.config.training.learning_rate
        message = f"training diverged: after step {self.log.steps_done} {fault}"
        return self._end(message, self.log.steps_done, f"lower training.learning_rate ({rate:g})")

    def _end(self, message: str, step: int, advice: str) -> TrainingError:
        message = f"{message}; {self._save(step)}; {advice}"
        report, events = self.report, self.log.events
        report.steps = steps_of_events(events)
        add_events(report, events)
        report.notes.append(message)
        write_report(self.folder.path, report)
        return TrainingError(message)

    def _save(self, step: int) -> str:
        """Save the weights of the last good step; `step` is that of the weights in the model."""
        model = self.trainer.model
        best = self.validation.best.restore(model, self.trainer.state) if self.validation.best else None
        if best is not None:
            good: int | None = best.step
        else:
            good = step if broken_weights(self.setup) is None else self._restore()
        if good is None:
            return "no weights are saved, as those in memory are broken; the checkpoints are kept"
        self.report.kept_step = good
        weights = self.folder.save_weights(model, self.setup.tokenizer, full=self.setup.config.lora is None)
        self.log.write({"event": WEIGHTS, "step": self.log.steps_done})
        untrained = " (untrained)" if good == 0 else ""
        return f"the weights of step {good}{untrained}, the last good ones, are in {weights}"

    def _restore(self) -> int | None:
        return self.last_good.restore(self.trainer.model, lambda: broken_weights(self.setup) is not None)
