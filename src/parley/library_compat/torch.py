"""Operators of torch that are not part of its documented API, each with why it is called and what it replaces.

`torch.nn.functional` reaches the same kernels through autograd only. The fused step computes gradients itself, into
buffers of its own, so it calls forward and backward operators directly. Contract tests hold each to the documented
function: tests/library_compat/test_torch.py.

Shape suffixes (legend in docs/design.md): T tokens, N output features, K input features, B batch, H heads,
L positions, E head size.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn


def onednn_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + bias through oneDNN, in new memory; fp32 on a CPU. `weight_NK` is dense or from `onednn_pack_weight`.

    Public alternative: torch.nn.functional.linear, which calls MKL in float32. On AMD's processors that takes twice as
    long (430 against 200 GFLOP/s on two Zen 5 cores). torch.compile calls this operator for the same reason.
    """
    return _mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")


def onednn_pack_weight(weight_NK: Tensor) -> Tensor:
    """A copy of `weight_NK` in oneDNN's blocked layout, for `onednn_linear`. There is no public alternative."""
    return _mkldnn._reorder_linear_weight(weight_NK)


def silu_backward_into(dout: Tensor, x: Tensor, dx: Tensor) -> None:
    """Write the gradient of silu(x) into the strided `dx`. Publicly only through autograd, into new memory."""
    _aten.silu_backward(dout, x, grad_input=dx)


def gelu_tanh_backward_into(dout: Tensor, x: Tensor, dx: Tensor) -> None:
    """Write the gradient of gelu(x), approximated by tanh, into the strided `dx`, as `silu_backward_into`."""
    _aten.gelu_backward(dout, x, approximate="tanh", grad_input=dx)


def softmax_backward(dp: Tensor, p: Tensor) -> Tensor:
    """The gradient of the last dimension's softmax from its output `p`. Publicly only through autograd."""
    return _aten._softmax_backward_data(dp, p, -1, p.dtype)


def cpu_flash_attention(
    q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention output (B, H, L, E) and the log-sum-exp that `cpu_flash_attention_backward` reads.

    Public alternative: torch.nn.functional.scaled_dot_product_attention, which does not return the log-sum-exp.
    """
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHLE, k_BHLE, v_BHLE, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def cpu_flash_attention_backward(
    dout_BHLE: Tensor, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, out_BHLE: Tensor, lse: Tensor,
    mask: Tensor | None, *, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of queries, keys and values, from what `cpu_flash_attention` was given and returned."""
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout_BHLE, q_BHLE, k_BHLE, v_BHLE, out_BHLE, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def cudnn_attention(
    q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, scale: float, *, causal: bool = True
) -> tuple[Tensor, list[Any]]:
    """Attention through cuDNN, and the state that `cudnn_attention_backward` reads, first the log-sum-exp (B, H, L, 1).

    Public alternative: scaled_dot_product_attention under torch.nn.attention.sdpa_kernel, which returns no state.
    """
    out_BHLE, *state, _ = _aten._scaled_dot_product_cudnn_attention(
        q_BHLE, k_BHLE, v_BHLE, None, True, 0.0, causal, scale=scale
    )
    return out_BHLE, state


def cudnn_attention_backward(
    dout_BHLE: Tensor, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, out_BHLE: Tensor, state: list[Any],
    scale: float, *, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of queries, keys and values. Keys may be a part of those that output and log-sum-exp are of."""
    lse, start_q, start_k, max_q, max_k, seed, offset = state
    return _aten._scaled_dot_product_cudnn_attention_backward(
        dout_BHLE, q_BHLE, k_BHLE, v_BHLE, out_BHLE, lse, seed, offset, None, start_q, start_k, max_q, max_k, 0.0,
        causal, scale=scale,
    )  # fmt: skip


def varlen_flash_attention(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, boundaries: Tensor, longest: int, scale: float, window: int | None,
    key_boundaries: Tensor | None = None, longest_keys: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal flash-attention 2 of several documents, and its log-sum-exp.

    Args:
        boundaries: int32, the first row of each document and the end of the last.
        window: the number of tokens a query sees, itself included; None for all before it.
        key_boundaries, longest_keys: of the keys, where there are more of them: a document's queries are its last.

    Public alternative: torch.nn.attention.varlen, without a backward pass to call and new in torch 2.10.
    """
    out_THE, lse, *_ = _aten._flash_attention_forward(
        q_THE, k_TGE, v_TGE, boundaries, boundaries if key_boundaries is None else key_boundaries, longest,
        longest_keys or longest, 0.0, True, False, scale=scale, **_window(window),
    )  # fmt: skip
    return out_THE, lse


def varlen_flash_attention_backward(
    dout_THE: Tensor, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, out_THE: Tensor, lse: Tensor, boundaries: Tensor,
    longest: int, scale: float, window: int | None, key_boundaries: Tensor | None = None,
    longest_keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of queries, keys and values."""
    seed = torch.zeros(2, dtype=torch.uint64, device=q_THE.device)  # of dropout, of which there is none
    return _aten._flash_attention_backward(
        dout_THE, q_THE, k_TGE, v_TGE, out_THE, lse, boundaries,
        boundaries if key_boundaries is None else key_boundaries, longest, longest_keys or longest, 0.0, True, seed,
        seed[:0], scale=scale, **_window(window),
    )  # fmt: skip


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def fake_tensors() -> AbstractContextManager[Any]:
    """Inside, operators compute shapes, types and devices of their results and allocate nothing (torch's fake tensors).

    Private: torch._subclasses. Public alternative: the meta device, for which there is no autocast.
    """
    return FakeTensorMode()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, or read, while they are alive; `peak` is the most of them.

    Each storage is rounded up as torch's CUDA allocator does. Private: the module of TorchDispatchMode, which torch's
    notes on extending PyTorch document. Public alternative: none that counts without allocating.
    """

    ALLOCATION = 512

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), -(-storage.nbytes() // self.ALLOCATION) * self.ALLOCATION
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
