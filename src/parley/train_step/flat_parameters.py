"""The adapters' weights and gradients in two flat fp32 buffers, with PEFT's parameters as views of the first.

One buffer makes the optimizer update, the clipping and the zeroing of gradients one call each. PEFT keeps saving and
loading its own parameters, which share the memory.

Parameters with `requires_grad=False` lie behind the trainable ones, outside of `weight_Z` and `grad_Z`. So the
optimizer, weight decay and the gradient norm never see them. One that is frozen later keeps its place: its gradient is
zeroed and its value put back after the optimizer's update.

Shape suffixes (legend in docs/design.md): Z all trainable adapter weights, R rank, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from parley.train_step.ops import Adapter, Magnitude
from parley.units import round_up

OPTIMIZER_BLOCK = 256  # 8-bit AdamW quantises its state in such blocks: none may span two parameters


class FlatAdapters:
    """`weight_Z` (a Parameter), `grad_Z`, and for each parameter its views in `weights` and `gradients`.

    `reduce_buffer` is `metrics_3` and `grad_Z` in one contiguous buffer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.trainable = [parameter.requires_grad for parameter in self.parameters]
        device = self.parameters[0].device
        order = sorted(range(len(self.parameters)), key=lambda index: not self.trainable[index])  # stable
        offsets, size, trainable_size = [0] * len(order), 0, 0
        for index in order:
            offsets[index] = size
            size += round_up(self.parameters[index].numel(), OPTIMIZER_BLOCK)
            if self.trainable[index]:
                trainable_size = size
        weight = torch.zeros(size, dtype=torch.float32, device=device)
        # Metrics before the gradients, so that both are summed over processes in one operation.
        with_metrics = torch.zeros(OPTIMIZER_BLOCK + size, dtype=torch.float32, device=device)
        self.metrics_3 = with_metrics[:3]
        self.reduce_buffer = with_metrics[: OPTIMIZER_BLOCK + trainable_size]
        # Gradients of frozen parameters are scratch: a kernel computes those of A and B together.
        gradient = with_metrics[OPTIMIZER_BLOCK:]
        self.weight_Z = nn.Parameter(weight[:trainable_size])
        self.grad_Z = gradient[:trainable_size]
        self.weight_Z.grad = self.grad_Z
        self.weights, self.gradients = (
            [
                flat[offset : offset + parameter.numel()].view(parameter.shape)
                for parameter, offset in zip(self.parameters, offsets, strict=True)
            ]
            for flat in (weight, gradient)
        )
        self.attach()

    @torch.no_grad()
    def attach(self) -> None:
        """Copy the parameters' values into the buffer and make them views of it. Doing it again changes nothing."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            if parameter.data_ptr() != weight.data_ptr():
                weight.copy_(parameter.data)
                parameter.data = weight

    def expose_gradients(self) -> None:
        """Let the `grad` of each PEFT parameter that is trained be its part of `grad_Z`, for callbacks that read it."""
        for parameter, gradient, trainable in zip(self.parameters, self.gradients, self.trainable, strict=True):
            if trainable and parameter.requires_grad:
                parameter.grad = gradient

    def frozen_since(self) -> list[int]:
        """Indices of the parameters that were trainable when they were bound and have been frozen since."""
        pairs = enumerate(zip(self.parameters, self.trainable, strict=True))
        return [index for index, (parameter, trainable) in pairs if trainable and not parameter.requires_grad]

    @torch.no_grad()
    def drop_frozen_gradients(self) -> None:
        """Zero the gradients of `frozen_since`, so that the gradient norm is that of what is trained."""
        for index in self.frozen_since():
            self.gradients[index].zero_()
            self.parameters[index].grad = None

    def keep_frozen(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the weights of `frozen_since` back after each update of `optimizer`, which moves them without gradients.

        Weight decay and Adam's momentum would. Their moments decay meanwhile, where PyTorch's would stay.
        """
        kept: dict[int, torch.Tensor] = {}

        def before(*_: object) -> None:
            kept.update({index: self.weights[index].clone() for index in self.frozen_since()})

        @torch.no_grad()
        def after(*_: object) -> None:
            for index, weight in kept.items():
                self.weights[index].copy_(weight)
            kept.clear()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def adapter(self, a: int, b: int, scale: float, m: int | None = None, dropout: float = 0.0) -> Adapter:
        """The adapter whose A, B and DoRA's magnitude are the parameters at these indices."""
        trainable = any(self.trainable[index] for index in (a, b, m) if index is not None)
        magnitude = None if m is None else Magnitude(self.weights[m], self.gradients[m])
        weights = self.weights[a], self.weights[b], self.gradients[a], self.gradients[b]
        return Adapter(*weights, scale, trainable, magnitude, dropout)
