"""The order of prompts: TRL's, which a resumed run finds again in any epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class EpochSampler(Sampler):
    """RepeatSampler that knows its epoch.

    TRL's own shuffles with a generator that only iterating moves on, so that a resumed run would begin with the order
    of the first epoch.
    """

    def __init__(self, sampler: RepeatSampler) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        generator = self.sampler.generator
        generator.manual_seed(self.sampler.seed)
        for _ in range(epoch):
            torch.randperm(self.sampler.num_samples, generator=generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
