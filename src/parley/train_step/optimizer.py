"""8-bit AdamW over the flat adapter weights, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import torch


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW with 8-bit block-wise state (arXiv 2110.02861), whose own `step` waits for the GPU each time.

    The update and the state are bitsandbytes' own.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None, "the fast step has the gradients already"
        self.initialized: bool
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.update_step(group, parameter, group_index, index)
