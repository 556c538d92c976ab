"""The adapters' weights and gradients in two flat fp32 buffers, with PEFT's parameters as views of the first.

One buffer makes the optimizer, the clipping and the clearing of gradients one call each. PEFT goes on saving and
loading its own parameters, which share the memory.

Shape suffixes: G all adapter weights in a row, R rank, K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parley.train_step.matmul import whole
from parley.train_step.ops import Adapter

BLOCK = 256  # 8-bit AdamW shares one scale among so many weights: no block may span two parameters


class FlatAdapters:
    """`weight_G` (a Parameter) and `grad_G`, and the views of them that each adapter reads and writes."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.offsets: list[int] = []
        size = 0
        for parameter in self.parameters:
            self.offsets.append(size)
            size += whole(parameter.numel(), BLOCK)
        self.weight_G = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        self.grad_G = torch.zeros_like(self.weight_G.data)
        self.weight_G.grad = self.grad_G
        self.gradients = [self.view(self.grad_G, index) for index in range(len(self.parameters))]
        self.attach()

    def view(self, flat: Tensor, index: int) -> Tensor:
        parameter, offset = self.parameters[index], self.offsets[index]
        return flat[offset : offset + parameter.numel()].view(parameter.shape)

    @torch.no_grad()
    def attach(self) -> None:
        """Take over the parameters' values and make them views; those that already are stay as they are."""
        for index, parameter in enumerate(self.parameters):
            view = self.view(self.weight_G.data, index)
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.data)
                parameter.data = view

    def show_gradients(self) -> None:
        """Let each PEFT parameter's `grad` be its part of `grad_G`, for callbacks that look there."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def adapter(self, a: int, b: int, scale: float) -> Adapter:
        """The adapter whose A and B are parameters number `a` and `b`."""
        return Adapter(
            self.view(self.weight_G.data, a),
            self.view(self.weight_G.data, b),
            self.view(self.grad_G, a),
            self.view(self.grad_G, b),
            scale,
        )
