"""Up to how many tokens a pass gains from a CUDA graph: measured once a model, in its first passes.

A graph saves the host the launches of a pass. Where the kernels take longer than their launches, nothing is won, and
each new size would cost a capture. The first pass initialises libraries; the second one is timed. It finds an idle
host: in a run, which loads data and logs beside, launches take longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

EAGER_PASSES = 2
BUSY_HOST = 2.0  # launches take up to so many times what they took in the timed pass


class GraphThreshold:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.passes = 0
        self.max_tokens = math.inf

    @property
    def is_known(self) -> bool:
        return self.passes >= EAGER_PASSES

    def pays(self, tokens: int) -> bool:
        """Whether a pass of `tokens` is worth a graph; False until that is known."""
        return self.is_known and tokens <= self.max_tokens

    def run(self, tokens: int, launch: Callable[[], None]) -> None:
        """A pass without a graph. Waits for the device in the pass that is timed."""
        timed = self.passes == EAGER_PASSES - 1
        if timed:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        launch()
        self.passes += 1
        if timed:
            launched = time.perf_counter() - start
            torch.cuda.synchronize(self.device)
            self.measure(tokens, launched, time.perf_counter() - start)

    def measure(self, tokens: int, launched: float, finished: float) -> None:
        """Seconds until the host had launched a pass of `tokens`, and until the device had finished it.

        The launches of a pass take the same time for any number of tokens, its kernels about proportionally longer.
        """
        if BUSY_HOST * launched < finished:
            self.max_tokens = tokens * BUSY_HOST * launched / finished
