"""The decoder layers, for any attention: what prefill and decode steps share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from parley.inference.linear import DecodeLinear, LayerLinears
from parley.train_step.bind import LayerWeights, ModelWeights
from parley.train_step.ops import AttentionShape, Ops, RmsNorm, RopeTable

Attention = Callable[[int, Tensor], Tensor | None]
"""From a layer's index and its q, k and v (T, C) to the heads' outputs (T, H E); None ends the pass there."""


@dataclass
class DecoderModel:
    """Everything of the model that decoding reads. `rope`: by LayerWeights.rope."""

    weights: ModelWeights
    linears: list[LayerLinears]
    head: DecodeLinear
    rope: dict[str, RopeTable]
    ops: Ops

    @cached_property
    def eps_11(self) -> Tensor:
        """The epsilon of every norm, as a tensor that `addcmul` takes."""
        return torch.full((1, 1), self.weights.norm.eps, dtype=torch.float32, device=self.weights.device)

    def embed(self, ids_T: Tensor) -> Tensor:
        """The residual stream (T, D) before the first layer."""
        h_TD = self.weights.embedding_VD.index_select(0, ids_T)
        return h_TD if self.weights.embedding_scale is None else h_TD.mul_(self.weights.embedding_scale)

    @property
    def shapes(self) -> list[AttentionShape]:
        """Each layer's attention."""
        return [layer.shape for layer in self.weights.layers]

    def forward(self, h_TD: Tensor, adapter_T1: Tensor | None, attention: Attention, until: int | None = None) -> None:
        """Add the output of the layers before `until` (None: all) to the residual stream `h_TD`, in place.

        `adapter_T1`: 1 for rows with the adapter, 0 for those of the base model; None: all of the base model.
        """
        for index in range(len(self.linears) if until is None else until):
            out_TD = attention(index, self.qkv(index, h_TD, adapter_T1))
            if out_TD is None:
                return
            self.add_output(index, h_TD, out_TD, adapter_T1)

    def qkv(self, index: int, h_TD: Tensor, adapter_T1: Tensor | None) -> Tensor:
        """Queries, keys and values of a layer, (T, C)."""
        return self.linears[index].qkv(self._norm(h_TD, self.weights.layers[index].input_norm), adapter_T1)

    def add_output(self, index: int, h_TD: Tensor, out_TD: Tensor, adapter_T1: Tensor | None) -> None:
        """Add to `h_TD`, in place, the output projection of the heads' outputs `out_TD`, then the MLP."""
        linears, layer = self.linears[index], self.weights.layers[index]
        self._add_branch(h_TD, linears.o, out_TD, adapter_T1, layer, layer.attention_out_norm)
        gate_up_T2F = linears.gate_up(self._norm(h_TD, layer.mlp_norm), adapter_T1)
        # The kernel writes into a given buffer, so that CUDA graphs own all memory of a step.
        act_TF = gate_up_T2F.new_empty(gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2)
        self.ops.glu(gate_up_T2F, act_TF, layer.activation)
        self._add_branch(h_TD, linears.down, act_TF, adapter_T1, layer, layer.mlp_out_norm)

    def _add_branch(
        self, h_TD: Tensor, linear: DecodeLinear, x_TK: Tensor, adapter_T1: Tensor | None, layer: LayerWeights,
        norm: RmsNorm | None,
    ) -> None:  # fmt: skip
        """Add the output of a branch's last linear, normalised and scaled as the family says, to `h_TD`."""
        if not layer.transforms_branches:
            linear.add_to(h_TD, x_TK, adapter_T1)
            return
        y_TD = self._norm(linear(x_TK, adapter_T1), norm)
        h_TD.add_(y_TD if layer.residual_scale is None else y_TD.mul_(layer.residual_scale))

    def logits(self, h_TD: Tensor) -> Tensor:
        """fp32, (T, V)."""
        # The head has no adapter: bind refuses models whose head is trained.
        logits_TV = self.head(self._norm(h_TD, self.weights.norm), None).float()
        scale, softcap = self.weights.logits.scale, self.weights.logits.softcap
        if scale != 1.0:
            logits_TV = logits_TV.mul_(scale)
        if softcap is not None:
            logits_TV = logits_TV.div_(softcap).tanh_().mul_(softcap)
        return logits_TV

    def _norm(self, x_TD: Tensor, norm: RmsNorm | None) -> Tensor:
        if norm is None:
            return x_TD
        weight_D = norm.weight_D
        if x_TD.is_cuda or x_TD.dtype != weight_D.dtype:
            out_TD = torch.empty_like(x_TD)
            self.ops.rms_norm(x_TD, None, weight_D, norm.eps, out_TD)
            return out_TD
        if x_TD.dtype != torch.float32:  # PyTorch's function adds up squares of 16-bit numbers in float32
            return functional.rms_norm(x_TD, weight_D.shape, weight_D, norm.eps)
        # The same in five calls, which take 6 microseconds for one row where PyTorch's function takes 10.
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        mean_square_T1 = torch.addcmul(self.eps_11, norm_T1, norm_T1, value=1 / x_TD.shape[1])
        return mean_square_T1.rsqrt_().mul(x_TD).mul_(weight_D)
