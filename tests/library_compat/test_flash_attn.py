"""Contracts of flash-attn-4's private functions: each computes what attention in float32 and its gradient are."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parley.library_compat import flash_attn as compat

USABLE = torch.cuda.is_available() and compat.usable(torch.device("cuda"))
CARD = pytest.mark.skipif(not USABLE, reason="needs a Hopper GPU and flash-attn-4")


def test_it_is_used_on_a_hopper_gpu_alone_and_in_a_tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    installed = {"version": compat.TESTED_VERSIONS[0], "capability": (9, 0)}
    monkeypatch.setattr(metadata, "version", lambda name: installed["version"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: installed["capability"])
    assert compat.usable(cuda)
    assert not compat.usable(torch.device("cpu"))
    installed["capability"] = (10, 0)
    assert not compat.usable(cuda)
    installed.update(version="4.0.0b99", capability=(9, 0))
    assert not compat.usable(cuda)


def test_without_the_package_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert compat.installed_version() is None
    assert not compat.usable(torch.device("cuda"))


def test_warnings_of_its_compiler_are_not_passed_on_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What both functions are called with, too, by their names."""
    given: list[dict[str, Any]] = []

    def function(*args: Any, **options: Any) -> tuple[Any, ...]:
        warnings.warn_explicit("its own argument", UserWarning, "dsl.py", 1, module="cutlass.base_dsl.dsl")
        warnings.warn_explicit("an old name", DeprecationWarning, "utils.py", 1, module="cutlass.utils")
        warnings.warn_explicit("the caller's", UserWarning, "caller.py", 1, module="caller")
        given.append(dict(options, positional=len(args)))
        return "out", "lse", None, None, None

    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd = interface._flash_attn_bwd = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    q, k, v, out, dout, lse, edges, dq, dk, dv = (torch.zeros(1) for _ in range(10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compat.flash_attention_4(q, k, v, edges, 7, 0.1, out) == "lse"
        compat.flash_attention_4_backward(dout, q, k, v, out, lse, edges, 7, 0.1, (dq, dk, dv))
    assert [str(warning.message) for warning in caught] == ["the caller's"] * 2
    forward, backward = given
    assert forward["out"] is out
    assert (forward["causal"], forward["return_lse"], forward["softmax_scale"]) == (True, True, 0.1)
    assert (backward["dq"], backward["dk"], backward["dv"]) == (dq, dk, dv)
    for options in given:
        assert options["cu_seqlens_q"] is options["cu_seqlens_k"] is edges
        assert options["max_seqlen_q"] == options["max_seqlen_k"] == 7


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Output and gradients in float32, one document at a time."""
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    outs, begin = [], 0
    for length in lengths:
        span = slice(begin, begin + length)
        parts = [x[span].transpose(0, 1)[None] for x in leaves]
        out = functional.scaled_dot_product_attention(*parts, is_causal=True, scale=0.1, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        begin += length
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.float())]


@pytest.mark.gpu
@CARD
@pytest.mark.parametrize("size", [64, 128])
def test_attention_of_several_documents(size: int) -> None:
    """Queries, keys, values and their gradients lie side by side in wider rows, as the fused step has them."""
    heads, kv_heads, lengths = 8, 2, (1, 300, 129, 1000)
    tokens, widths = sum(lengths), [heads * size, kv_heads * size, kv_heads * size]
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, dx = torch.randn(tokens, sum(widths), **options), torch.full((tokens, sum(widths) + 64), torch.nan, **options)
    out = torch.full((tokens, heads * size + 64), torch.nan, **options)[:, : heads * size].unflatten(1, (heads, -1))
    dout = torch.randn(tokens, heads, size, **options)
    q, k, v = (part.unflatten(1, (-1, size)) for part in x.split(widths, 1))
    grads = [part.unflatten(1, (-1, size)) for part in dx[:, : sum(widths)].split(widths, 1)]
    boundaries = torch.tensor([0, 1, 301, 430, 1430], dtype=torch.int32, device="cuda")
    lse = compat.flash_attention_4(q, k, v, boundaries, 1000, 0.1, out)
    compat.flash_attention_4_backward(dout, q, k, v, out, lse, boundaries, 1000, 0.1, grads)
    assert lse.shape == (heads, tokens)
    for ours, theirs in zip((out, *grads), exact(q, k, v, dout, lengths), strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.01
    assert dx[:, sum(widths) :].isnan().all()  # nothing is written beside the gradients
