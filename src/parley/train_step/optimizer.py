"""AdamW with 8-bit state, as bitsandbytes has it, without waiting for the device and at the speed of its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW with 8-bit block-wise state (arXiv 2110.02861), whose own `step` waits for the GPU each time.

    The state is bitsandbytes' own, and so is the update but for rounding; a kernel of Parley's computes it on a GPU.

    `finite`: 0-dim bool on the parameters' device; where it is False, an update by the kernel changes nothing.
    """

    finite: Tensor | None = None

    @property
    def masks_itself(self) -> bool:
        """Whether the kernel updates every parameter that has a gradient. Known from the first update on."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return all(bool(self.state[p]) and _by_kernel(p, self.state[p]) for p in parameters)

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
        if not _by_kernel(p, state):
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
            torch.ones((), dtype=torch.bool, device=p.device) if self.finite is None else self.finite,
            step=state["step"],
            lr=config["lr"],
            betas=config["betas"],
            eps=config["eps"],
            weight_decay=config["weight_decay"],
        )


def _by_kernel(p: nn.Parameter, state: dict[str, Any]) -> bool:
    assert p.grad is not None
    # Small tensors have their state in 32 bits.
    eight_bit = state["state1"].dtype == torch.uint8 and p.is_contiguous() and p.grad.is_contiguous()
    return p.device.type == "cuda" and eight_bit
