"""One answer at a time on a CPU in float32, in NumPy.

A token of a small model is two hundred calls on a few hundred numbers each, and NumPy's take a third of PyTorch's time.
Its BLAS reads a matrix with all cores, where the MKL that torch.mm calls takes one on AMD's processors.

Shape suffixes: D hidden, F feed-forward, C query, key and value columns, H heads, K key-value heads, G heads that share
one, E head size, L positions, P positions that the rotation knows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parley.inference.kv_cache import Cache
from parley.inference.linear import Product
from parley.inference.model import Model, PlainStep, Voices
from parley.inference.slot_state import POSITION, TOKEN, TUNED, State
from parley.train_step.ops import AttentionShape

Array = NDArray[Any]


def array(tensor: Tensor) -> Array:
    """The tensor's own memory."""
    values: Array = tensor.detach().numpy()
    return values


class CpuStep:
    """A token of each row: in NumPy where there is one row and copies of the weights, else in PyTorch."""

    def __init__(self, voices: Voices, cache: Cache) -> None:
        self.plain = PlainStep(voices, cache)
        self.alone: dict[bool, AloneStep] = {}
        if voices.both.head.packed is not None:
            self.alone = {False: AloneStep(voices.base, cache), True: AloneStep(voices.tuned, cache)}

    def __call__(self, state: State) -> Tensor:
        """fp32 logits (B, V). `state` lies on the host."""
        if self.alone and len(state.fields_BF) == 1:
            return self.alone[bool(state.real(TUNED)[0])](state)
        return self.plain(state)


class Matrix:
    """x W^T + b for one x."""

    def __init__(self, product: Product) -> None:
        assert product.matrix_NK is not None
        assert not product.linear.adapter_slices
        self.matrix_KN = array(product.matrix_NK).T
        self.bias_N = None if product.linear.bias_N is None else array(product.linear.bias_N)

    def __call__(self, x_K: Array) -> Array:
        y_N: Array = np.dot(x_K, self.matrix_KN)
        if self.bias_N is not None:
            y_N += self.bias_N
        return y_N


@dataclass(frozen=True)
class Layer:
    """`q_norm_E` and `k_norm_E`: Qwen3's norms of each head. `cache_2KLE`: the first row's keys and values."""

    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    input_norm_D: Array
    post_attention_norm_D: Array
    q_norm_E: Array | None
    k_norm_E: Array | None
    shape: AttentionShape
    cache_2KLE: Array


class AloneStep:
    """The logits that follow one token of the first row, in one voice: `model`'s products have no adapters."""

    def __init__(self, model: Model, cache: Cache) -> None:
        weights = model.weights
        self.eps = weights.eps
        self.embedding_VD, self.norm_D, self.head = (
            array(weights.embedding_VD),
            array(weights.norm_D),
            Matrix(model.head),
        )
        self.layers = [
            Layer(
                qkv=Matrix(products.qkv),
                o=Matrix(products.o),
                gate_up=Matrix(products.gate_up),
                down=Matrix(products.down),
                input_norm_D=array(layer.input_norm_D),
                post_attention_norm_D=array(layer.post_attention_norm_D),
                q_norm_E=None if layer.qk_norm is None else array(layer.qk_norm.q_E),
                k_norm_E=None if layer.qk_norm is None else array(layer.qk_norm.k_E),
                shape=layer.shape,
                cache_2KLE=array(cached[0]),
            )
            for layer, products, cached in zip(weights.layers, model.products, cache.layers, strict=True)
        ]
        # By halves of a head: turned, it is x cos + swapped(x) sin.
        cos_LE, sin_LE = array(model.rope.cos_LE), array(model.rope.sin_LE)
        self.cos_P2E, self.sin_P2E = np.stack([cos_LE, cos_LE], axis=1), np.stack([-sin_LE, sin_LE], axis=1)

    def __call__(self, state: State) -> Tensor:
        """fp32 logits (1, V). `state` is one row."""
        fields = state.fields_BF.numpy()[0]
        h_D = self.embedding_VD[fields[TOKEN]].copy()
        with np.errstate(over="ignore"):  # exp(-x) of a gate that is shut
            for layer in self.layers:
                qkv_C = layer.qkv(self._norm(h_D, layer.input_norm_D))
                h_D += layer.o(self._attend(layer, qkv_C, fields[POSITION]))
                h_D += layer.down(_swiglu(layer.gate_up(self._norm(h_D, layer.post_attention_norm_D))))
        return torch.from_numpy(self.head(self._norm(h_D, self.norm_D))[None])

    def _norm(self, x_D: Array, weight_D: Array) -> Array:
        out_D: Array = x_D * np.float32(1 / sqrt(np.dot(x_D, x_D) / len(x_D) + self.eps))
        out_D *= weight_D
        return out_D

    def _attend(self, layer: Layer, qkv_C: Array, position: int) -> Array:
        shape, cache_2KLE = layer.shape, layer.cache_2KLE
        heads, size = shape.heads, shape.head_dim
        x_HE = qkv_C.reshape(-1, size)
        if layer.q_norm_E is not None:
            self._norm_heads(x_HE[:heads], layer.q_norm_E)
            self._norm_heads(x_HE[heads : heads + shape.kv_heads], layer.k_norm_E)
        turned_H2E = x_HE[: heads + shape.kv_heads].reshape(-1, 2, size // 2)
        swapped_H2E = turned_H2E[:, ::-1] * self.sin_P2E[position]
        turned_H2E *= self.cos_P2E[position]
        turned_H2E += swapped_H2E
        cache_2KLE[:, :, position] = x_HE[heads:].reshape(2, shape.kv_heads, size)
        first = 0 if shape.window is None else max(0, position + 1 - shape.window)
        keys_KLE, values_KLE = cache_2KLE[:, :, first : position + 1]
        # Heads that share keys stand as several queries of one head, so that nothing is repeated.
        p_KGL = np.matmul(x_HE[:heads].reshape(shape.kv_heads, -1, size), keys_KLE.swapaxes(1, 2))
        p_KGL *= np.float32(shape.scale)
        p_KGL -= p_KGL.max(-1, keepdims=True)
        np.exp(p_KGL, out=p_KGL)
        p_KGL /= p_KGL.sum(-1, keepdims=True)
        attended_C: Array = np.matmul(p_KGL, values_KLE).reshape(-1)
        return attended_C

    def _norm_heads(self, x_HE: Array, weight_E: Array | None) -> None:
        x_HE /= np.sqrt(np.square(x_HE).mean(-1, keepdims=True) + np.float32(self.eps))
        x_HE *= weight_E


def _swiglu(gate_up_2F: Array) -> Array:
    gate_F, up_F = gate_up_2F.reshape(2, -1)
    act_F: Array = np.exp(-gate_F)
    act_F += 1
    np.divide(gate_F, act_F, out=act_F)
    act_F *= up_F
    return act_F
