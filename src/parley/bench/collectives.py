"""What several processes lose in a step: sending gradients to each other, and waiting for the last of them.

torch's profiler records the collective operations of the last steps in each process. An operation begins when its
process has come to it, and ends in all of them together: that of the process that comes last takes what the transfer
takes, and the others' longer times are waiting. So it is measured for any trainer, with nothing added to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

MOST_STEPS = 3
COLLECTIVES = ("nccl", "gloo:")  # in names of kernels of a GPU, and of operations on a CPU


class ProfiledSteps(TrainerCallback):
    """Records the last steps of `steps`; they are not timed, since recording slows them.

    `first`: steps before those that are recorded.
    """

    def __init__(self, steps: int) -> None:
        self.count = min(MOST_STEPS, max(1, steps // 4))
        self.first, self.last = steps - self.count, steps
        gpu = torch.cuda.is_available()
        self.profile = profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profile.stop()

    def figures(self, step_ms: float | None) -> dict[str, Any]:
        """Milliseconds of a step: of the transfer, and of waiting by rank; and shares of `step_ms`. In every process.

        Where a trainer sends while it computes, the share is not all lost.
        """
        seconds: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seconds, self._collective_seconds())
        least = min(seconds)
        waiting = [1000 * (each - least) for each in seconds]
        mean = sum(waiting) / len(waiting)
        return {
            "all_reduce_ms": round(1000 * least, 3),
            "waiting_ms": [round(each, 3) for each in waiting],
            "all_reduce_share": None if step_ms is None else round(1000 * least / step_ms, 4),
            "waiting_share": None if step_ms is None else round(mean / step_ms, 4),
        }

    def _collective_seconds(self) -> float:
        """Of a step, in this process."""
        events = [event for event in self.profile.key_averages() if any(name in event.key for name in COLLECTIVES)]
        gpu = torch.cuda.is_available()
        total = sum(event.self_device_time_total if gpu else event.cpu_time_total for event in events)
        return total / 1e6 / self.count
