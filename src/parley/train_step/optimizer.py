"""AdamW with 8-bit state, as bitsandbytes has it, without waiting for the device and at the speed of its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from torch import nn


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW with 8-bit block-wise state (arXiv 2110.02861), whose own `step` waits for the GPU each time.

    The state is bitsandbytes' own, and so is the update but for rounding; a kernel of Parley's computes it on a GPU.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None, "the gradients are there already"
        self.initialized: bool
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.update_step(group, parameter, group_index, index)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        # Small tensors have their state in 32 bits.
        eight_bit = state["state1"].dtype == torch.uint8 and p.is_contiguous() and gradient.is_contiguous()
        if p.device.type != "cuda" or not eight_bit:
            super().update_step(group, p, gindex, pindex)
            return
        from parley.train_step.kernels.adamw8bit import adamw8bit  # Triton is installed only where a GPU is

        config = self.get_config(gindex, pindex, group)
        state["step"] += 1
        adamw8bit(
            p.detach(),
            gradient,
            (state["state1"], state["state2"]),
            (state["absmax1"], state["absmax2"]),
            (state["qmap1"], state["qmap2"]),
            step=state["step"],
            lr=config["lr"],
            betas=config["betas"],
            eps=config["eps"],
            weight_decay=config["weight_decay"],
        )
