"""Optimizer updates that the device itself undoes where a step's loss or gradient is not finite.

The host launches the update before it knows whether the step is sound, so that it never waits. The optimizer's tensors
are copied before the update and selected after it, by a flag on the device: a step that is not finite leaves weights
and moments bit for bit as they were. The copies lie in buffers of the fused step that are idle during the update, so
that they cost no memory. An optimizer whose own kernel reads the flag needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from parley.train_step.optimizer import AdamW8bit

CODE_BOOK = "qmap"  # bitsandbytes' names of the code books of 8-bit moments, which no update changes
ALIGNMENT = 16  # bytes: any dtype can be viewed at a multiple of it


class MaskedUpdate(torch.optim.Optimizer):
    """Put before an optimizer's class: `step` changes nothing where `finite` is False.

    `finite`: 0-dim bool on the parameters' device, set before each step; None updates always. `idle`: gives buffers
    that may be overwritten during a step.
    """

    finite: Tensor | None = None
    idle: Callable[[], Sequence[Tensor]] = staticmethod(tuple)
    _uncounted = 0  # masked steps before the first update, which no counter has

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if self.finite is None:
            return super().step(closure)
        if not any(self.state.values()):  # the first update creates the state: nothing to copy, so wait for the flag
            if bool(self.finite):
                return super().step(closure)
            self._uncounted += 1
            return None
        if isinstance(self, AdamW8bit) and self.masks_itself:
            return super().step(closure)
        copies = Copies(self._tensors(), self.idle())
        super().step(closure)
        copies.restore_unless(self.finite)
        return None

    def forget_steps(self, count: int) -> None:
        """Take back the last `count` masked steps from the counters that are kept on the host."""
        known = min(count, self._uncounted)
        self._uncounted, count = self._uncounted - known, count - known
        for state in self.state.values():
            step = state.get("step")
            if isinstance(step, int) or (isinstance(step, Tensor) and not self._on_device(step)):
                state["step"] = step - count

    def _tensors(self) -> list[Tensor]:
        """Every tensor on the device that an update changes."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        state = [
            value
            for parameter in parameters
            for name, value in self.state[parameter].items()
            if isinstance(value, Tensor) and self._on_device(value) and not name.startswith(CODE_BOOK)
        ]
        return [parameter.detach() for parameter in parameters] + state

    def _on_device(self, tensor: Tensor) -> bool:
        assert self.finite is not None
        return tensor.device == self.finite.device


class Copies:
    """Copies of `tensors`, which must be contiguous, cut to fit into `idle` buffers; new memory for what is left."""

    def __init__(self, tensors: Iterable[Tensor], idle: Iterable[Tensor]) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        free = [buffer.detach().view(-1).view(torch.uint8) for buffer in idle]
        for tensor in tensors:
            rest = tensor.view(-1)
            while rest.numel():
                copied = self._copy(rest, free)
                rest = rest[copied:]

    def restore_unless(self, keep: Tensor) -> None:
        """Put every copy back, unless the 0-dim bool `keep` is True."""
        for tensor, copy in self.pairs:
            torch.where(keep, tensor, copy, out=tensor)

    def _copy(self, tensor: Tensor, free: list[Tensor]) -> int:
        """Copy the beginning of `tensor`; returns how many elements."""
        while free and len(free[0]) < ALIGNMENT:
            free.pop(0)
        if not free:
            self.pairs.append((tensor, tensor.clone()))
            return tensor.numel()
        count = min(tensor.numel(), len(free[0]) // ALIGNMENT * ALIGNMENT // tensor.itemsize)
        size = count * tensor.itemsize
        copy = free[0][:size].view(tensor.dtype)
        copy.copy_(tensor[:count])
        free[0] = free[0][-(-size // ALIGNMENT) * ALIGNMENT :]
        self.pairs.append((tensor[:count], copy))
        return count
