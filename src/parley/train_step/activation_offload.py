"""What a lean pass keeps for the backward pass, in the host's memory: copied out behind the arithmetic of the next
layer, and back in before it is needed. The last layers stay where they are, since they are the first to be read.

At 50 GB/s and more over PCIe a layer's x, q/k/v, attention output and middle of a Llama (12 KB a token for 2,048 wide)
travel in less time than the layer takes to compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parley.train_step.workspace import ON_THE_WAY, Workspace

Kept = dict[str, Tensor]


class Offload:
    """Copies the kept buffers of each layer on a stream of its own. `workspace` has two places for each."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.layers = len(workspace.bound.layers)
        self.device = torch.get_device_module(workspace.bound.device)  # torch.cuda, or torch.cpu, where all is in order
        self.stream = self.device.Stream()
        self.host: dict[tuple[str, int], Tensor] = {}
        self.sent: dict[int, Any] = {}  # events
        self.arrived: dict[int, Any] = {}
        self.kept: dict[int, Kept] = {}

    def make_place(self, index: int) -> None:
        """Before layer `index` writes: wait until its place's last tenant has left."""
        if index - ON_THE_WAY in self.sent:
            event = self.sent.pop(index - ON_THE_WAY)
            self.device.current_stream().wait_event(event)

    def send(self, index: int, kept: Kept) -> None:
        """After layer `index`: begin to copy what it keeps."""
        self.kept[index] = kept
        if index >= self.layers - ON_THE_WAY:
            return
        self.stream.wait_stream(self.device.current_stream())
        with self.device.stream(self.stream):
            for name, tensor in kept.items():
                self._host(name, index, tensor).copy_(tensor, non_blocking=True)
        self.sent[index] = self.stream.record_event()

    def fetch(self, index: int) -> None:
        """Begin to copy layer `index` back, into the place that the layer two above it has just given up."""
        if not 0 <= index < self.layers - ON_THE_WAY:
            return
        self.stream.wait_stream(self.device.current_stream())
        with self.device.stream(self.stream):
            for name, tensor in self.kept[index].items():
                tensor.copy_(self._host(name, index, tensor), non_blocking=True)
        self.arrived[index] = self.stream.record_event()

    def need(self, index: int) -> None:
        """Before layer `index` is read: wait until it is back."""
        if index in self.arrived:
            event = self.arrived.pop(index)
            self.device.current_stream().wait_event(event)
        del self.kept[index]

    def _host(self, name: str, index: int, like: Tensor) -> Tensor:
        size = self.workspace.tokens * self.workspace.columns[name]
        if (name, index) not in self.host or self.host[name, index].numel() < size:
            self.host[name, index] = torch.empty(size, dtype=like.dtype, pin_memory=like.is_cuda)
        return self.host[name, index][: like.numel()].view(like.shape)
