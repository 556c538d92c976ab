"""flash-attn-4, an optional package: flash attention for Hopper in CuTe DSL, compiled at the first call of each kind.

Its public functions are autograd functions that allocate what they return. The fused step runs the backward pass
itself, into buffers of its own, so it calls the two functions below them. They take rows of any stride that is a
multiple of 16 bytes, and number and lengths of documents are no part of what is compiled.

Shape suffixes (legend in docs/design.md): T tokens, H query heads, G key-value heads, E head size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

import torch
from torch import Tensor

HOPPER = (9, 0)
DISTRIBUTION = "flash-attn-4"
TESTED_VERSIONS = ("4.0.0b36",)  # a beta: what it returns has changed between two of them


def installed_version() -> str | None:
    """None where flash-attn-4 is not installed. Imports nothing."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def usable(device: torch.device) -> bool:
    """Whether a tested version is installed and `device` is a Hopper GPU."""
    if device.type != "cuda" or installed_version() not in TESTED_VERSIONS or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) == HOPPER


def flash_attention_4(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, boundaries: Tensor, longest: int, scale: float, out_THE: Tensor
) -> Tensor:  # fmt: skip
    """Write causal attention of several documents into `out_THE`; returns the log-sum-exp, (H, T).

    Args:
        boundaries: int32, the first row of each document and the end of the last.

    Public alternative: flash_attn.cute.flash_attn_varlen_func, which allocates its output.
    """
    with _without_its_warnings():
        from flash_attn.cute.interface import _flash_attn_fwd

        _, lse_HT, *_ = _flash_attn_fwd(
            q_THE, k_TGE, v_TGE, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries, max_seqlen_q=longest,
            max_seqlen_k=longest, softmax_scale=scale, causal=True, return_lse=True, out=out_THE,
        )  # fmt: skip
    return lse_HT


def flash_attention_4_backward(
    dout_THE: Tensor, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, out_THE: Tensor, lse_HT: Tensor,
    boundaries: Tensor, longest: int, scale: float, grads: Sequence[Tensor],
) -> None:  # fmt: skip
    """Write the gradients of queries, keys and values into `grads`; those of queries are added in no fixed order."""
    dq_THE, dk_TGE, dv_TGE = grads
    with _without_its_warnings():
        from flash_attn.cute.interface import _flash_attn_bwd

        _flash_attn_bwd(
            q_THE, k_TGE, v_TGE, out_THE, dout_THE, lse_HT, scale, True, cu_seqlens_q=boundaries,
            cu_seqlens_k=boundaries, max_seqlen_q=longest, max_seqlen_k=longest, dq=dq_THE, dk=dk_TGE, dv=dv_TGE,
        )  # fmt: skip


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """Its compiler warns of its own arguments and its own deprecated names, which no caller can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(cutlass|flash_attn|quack|tvm_ffi)(\.|$)")
        yield
