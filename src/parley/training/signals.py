"""Signals during training: stop after the step with a checkpoint, at once at the second one, or save and continue.

SIGINT (Ctrl-C), SIGTERM (a cluster's grace period, `kill`) and SIGHUP (a closed terminal) stop; SIGUSR1 saves. Handlers
set flags that a callback reads at the end of a step: nothing is written from within a handler. Several processes agree
there, so that all end after the same step, whichever of them got the signal and when.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.training.processes import is_main_process, largest, peer_failed, process_count

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOTICE = "\nparley: {} received; the step is finished and saved, then training stops\n(again: stop at once)\n"
_SAVING = "\nparley: SIGUSR1 received; a checkpoint is saved after the step, and training continues\n"


class StopRequested(KeyboardInterrupt):
    """A stopping signal, outside of training or for the second time. As KeyboardInterrupt, it is no Exception."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class StopSignals:
    """While entered, this process's handlers of the signals above; before and after, they are as they were.

    `received`: the first stopping signal; `training`: whether a step is under way, so that it is finished first.
    Python runs handlers in the main thread alone: entered in another thread, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.save_requested = False
        self.training = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, signal.SIGUSR1):
                # Ignored already, as nohup and background shells do: it stays so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def agree(self) -> None:
        """Let every process have received what one of them has."""
        stop, save = largest(self.received or 0, int(self.save_requested))
        self.received, self.save_requested = (signal.Signals(stop) if stop else None), bool(save)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_requested = self.training
            _notify(_SAVING if self.training else "\nparley: SIGUSR1 received; no step is under way\n")
            return
        if peer_failed():  # a launcher ends the others, and so does their own watch: this is no request to stop
            return
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if first and self.training:
            _notify(_NOTICE.format(signal.Signals(number).name))
            return
        signal.signal(number, signal.SIG_DFL)  # once more ends the process even where Python cannot run a handler
        raise StopRequested(number)


class StopCallback(TrainerCallback):
    """Carries out at the end of a step what `signals` received during it."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signals.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._carry_out(control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if process_count() > 1:
            return  # each agreement waits for all
        self._carry_out(control)  # Trainer logs, evaluates and saves in this order: a signal meanwhile is not too late

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._carry_out(control)

    def _carry_out(self, control: TrainerControl) -> None:
        if self.signals.training:
            self.signals.agree()
        if self.signals.training and (self.signals.save_requested or self.signals.received):
            control.should_save = True
            control.should_training_stop = control.should_training_stop or self.signals.received is not None
            self.signals.save_requested = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signals.training = False


def _notify(text: str) -> None:
    if is_main_process():
        os.write(2, text.encode())  # print() may be interrupted by itself
