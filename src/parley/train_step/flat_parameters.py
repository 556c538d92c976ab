"""The adapters' weights and gradients in two flat fp32 buffers, with PEFT's parameters as views of the first.

One buffer makes the optimizer update, the clipping and the zeroing of gradients one call each. PEFT goes on saving and
loading its own parameters, which share the memory.

Shape suffixes (legend in docs/design.md): Z all adapter weights, R rank, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parley.train_step.ops import Adapter
from parley.units import round_up

OPTIMIZER_BLOCK = 256  # 8-bit AdamW quantises its state in such blocks: none may span two parameters


class FlatAdapters:
    """`weight_Z` (a Parameter) and `grad_Z`, and the views of them that each adapter reads and writes."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.offsets: list[int] = []
        size = 0
        for parameter in self.parameters:
            self.offsets.append(size)
            size += round_up(parameter.numel(), OPTIMIZER_BLOCK)
        self.weight_Z = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        self.grad_Z = torch.zeros_like(self.weight_Z.data)
        self.weight_Z.grad = self.grad_Z
        self.gradients = [self.view(self.grad_Z, index) for index in range(len(self.parameters))]
        self.attach()

    def view(self, flat: Tensor, index: int) -> Tensor:
        """The part of `flat` that belongs to parameter `index`, in its shape."""
        parameter, offset = self.parameters[index], self.offsets[index]
        return flat[offset : offset + parameter.numel()].view(parameter.shape)

    @torch.no_grad()
    def attach(self) -> None:
        """Copy the parameters' values into the buffer and make them views of it. Doing it again changes nothing."""
        for index, parameter in enumerate(self.parameters):
            view = self.view(self.weight_Z.data, index)
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.data)
                parameter.data = view

    def expose_gradients(self) -> None:
        """Let each PEFT parameter's `grad` be its part of `grad_Z`, for callbacks that read it."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def adapter(self, a: int, b: int, scale: float) -> Adapter:
        """The adapter whose A and B are the parameters at index `a` and `b`."""
        return Adapter(
            self.view(self.weight_Z.data, a),
            self.view(self.weight_Z.data, b),
            self.view(self.grad_Z, a),
            self.view(self.grad_Z, b),
            scale,
        )
