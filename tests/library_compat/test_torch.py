"""Contracts of torch's undocumented operators: each computes what the documented function and its gradient do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parley.library_compat import torch as compat

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def randn(*shape: int, seed: int, **options: object) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**options)  # type: ignore[call-overload]


def sdpa(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None, scale: float) -> list[Tensor]:
    """Output and gradients of the documented function."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = functional.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=mask is None, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this torch")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_onednn_linear(bias: bool, packed: bool) -> None:
    x_TK, weight_NK = randn(5, 24, seed=0), randn(16, 24, seed=1)
    bias_N = randn(16, seed=2) if bias else None
    weight = compat.onednn_pack_weight(weight_NK) if packed else weight_NK
    torch.testing.assert_close(compat.onednn_linear(x_TK, weight, bias_N), functional.linear(x_TK, weight_NK, bias_N))


def test_silu_backward_writes_into_a_strided_buffer() -> None:
    x, dout, buffer = randn(4, 6, seed=0).requires_grad_(), randn(4, 6, seed=1), torch.zeros(4, 9)
    compat.silu_backward_into(dout, x.detach(), buffer[:, :6])
    torch.testing.assert_close(buffer[:, :6], torch.autograd.grad(functional.silu(x), x, dout)[0])
    assert not buffer[:, 6:].any()


def test_softmax_backward() -> None:
    x, dp = randn(4, 6, seed=0).requires_grad_(), randn(4, 6, seed=1)
    p = x.softmax(-1)
    torch.testing.assert_close(compat.softmax_backward(dp, p.detach()), torch.autograd.grad(p, x, dp)[0])


@pytest.mark.parametrize("masked", [True, False])
def test_cpu_flash_attention(masked: bool) -> None:
    q, k, v, dout = (randn(2, 3, 40, 16, seed=seed) for seed in range(4))
    mask = torch.zeros(1, 1, 40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf) if masked else None
    settings = {"is_causal": not masked, "scale": 0.3}
    out, lse = compat.cpu_flash_attention(q, k, v, mask, **settings)
    gradients = compat.cpu_flash_attention_backward(dout, q, k, v, out, lse, mask, **settings)
    for ours, theirs in zip((out, *gradients), sdpa(q, k, v, dout, mask, 0.3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@CUDA
def test_cudnn_attention() -> None:
    q, k, v, dout = (randn(1, 4, 256, 64, seed=seed, device="cuda", dtype=torch.bfloat16) for seed in range(4))
    out, state = compat.cudnn_attention(q, k, v, 0.125)
    gradients = compat.cudnn_attention_backward(dout, q, k, v, out, state, 0.125)
    for ours, theirs in zip((out, *gradients), sdpa(q, k, v, dout, None, 0.125), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@CUDA
def test_cudnn_attention_of_a_part_of_the_keys() -> None:
    """The backward operator gives a block's share of the gradient from output and log-sum-exp of all keys."""
    q, dout = (randn(1, 4, 256, 64, seed=seed, device="cuda", dtype=torch.bfloat16) for seed in range(2))
    k, v = (randn(1, 2, 768, 64, seed=seed, device="cuda", dtype=torch.bfloat16) for seed in (2, 3))
    out, state = compat.cudnn_attention(q, k, v, 0.125, causal=False)
    assert state[0].shape == (1, 4, 256, 1)
    s = (q.float() @ k.float().repeat_interleave(2, 1).mT) * 0.125
    torch.testing.assert_close(state[0], s.logsumexp(-1, keepdim=True), rtol=1e-3, atol=1e-3)
    whole = compat.cudnn_attention_backward(dout, q, k, v, out, state, 0.125, causal=False)
    parts = []
    for keys in (slice(0, 512), slice(512, 768)):
        _, (_, *others) = compat.cudnn_attention(q, k[:, :, keys], v[:, :, keys], 0.125, causal=False)
        args = (dout, q, k[:, :, keys].contiguous(), v[:, :, keys].contiguous(), out, [state[0], *others], 0.125)
        parts.append(compat.cudnn_attention_backward(*args, causal=False))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=3e-2, atol=3e-2)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in parts], 2), whole[i], rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("window", [None, 20])
def test_varlen_flash_attention(window: int | None) -> None:
    lengths = (60, 100)
    q, k, v, dout = (randn(160, 4, 64, seed=seed, device="cuda", dtype=torch.bfloat16) for seed in range(4))
    boundaries = torch.tensor([0, 60, 160], dtype=torch.int32, device="cuda")
    out, lse = compat.varlen_flash_attention(q, k, v, boundaries, 100, 0.125, window)
    gradients = compat.varlen_flash_attention_backward(dout, q, k, v, out, lse, boundaries, 100, 0.125, window)
    for index, length in enumerate(lengths):
        span = slice(sum(lengths[:index]), sum(lengths[: index + 1]))
        parts = [x[span].transpose(0, 1)[None] for x in (q, k, v, dout)]
        hidden = torch.ones(length, length, device="cuda").triu(1).bool()
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        mask = torch.zeros(1, 1, length, length, device="cuda", dtype=torch.bfloat16).masked_fill(hidden, -torch.inf)
        for ours, theirs in zip((out, *gradients), sdpa(*parts, mask, 0.125), strict=True):
            torch.testing.assert_close(ours[span], theirs[0].transpose(0, 1), rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@CUDA
def test_varlen_flash_attention_of_the_last_queries() -> None:
    """Of documents with 60 and 100 keys the last 20 and 100 are queries."""
    k, v = (randn(160, 4, 64, seed=seed, device="cuda", dtype=torch.bfloat16) for seed in range(2))
    q, dout = (randn(120, 4, 64, seed=seed, device="cuda", dtype=torch.bfloat16) for seed in (2, 3))
    edges, key_edges = (torch.tensor(e, dtype=torch.int32, device="cuda") for e in ([0, 20, 120], [0, 60, 160]))
    out, lse = compat.varlen_flash_attention(q, k, v, edges, 100, 0.125, None, key_edges, 100)
    gradients = compat.varlen_flash_attention_backward(dout, q, k, v, out, lse, edges, 100, 0.125, None, key_edges, 100)
    for queries, keys in ((slice(0, 20), slice(0, 60)), (slice(20, 120), slice(60, 160))):
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        hidden = torch.ones(rows, columns, device="cuda").triu(1 + columns - rows).bool()
        mask = torch.zeros(1, 1, rows, columns, device="cuda", dtype=torch.bfloat16).masked_fill(hidden, -torch.inf)
        parts = [x[span].transpose(0, 1)[None] for x, span in ((q, queries), (k, keys), (v, keys), (dout, queries))]
        spans = (queries, queries, keys, keys)
        for ours, theirs, span in zip((out, *gradients), sdpa(*parts, mask, 0.125), spans, strict=True):
            torch.testing.assert_close(ours[span], theirs[0].transpose(0, 1), rtol=3e-2, atol=3e-2)


def test_fake_tensors_have_shapes_and_gradients_and_no_memory() -> None:
    with compat.fake_tensors():
        weight = torch.nn.Parameter(torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.nn.functional.linear(torch.empty(2, 1 << 20), weight)
        out.float().sum().backward()
        assert (out.dtype, out.shape) == (torch.bfloat16, (2, 1 << 20))
        assert weight.grad is not None
        assert weight.grad.nbytes == 2 << 40  # more than any machine has


def test_live_bytes_are_those_of_storages_while_they_live() -> None:
    memory = compat.LiveBytes()
    with memory:
        first = torch.zeros(1000)  # 4000 bytes, in blocks of 512
        assert (memory.live, memory.peak) == (4096, 4096)
        view = first[:10]
        assert memory.live == 4096
        temporary = first + 1
        assert memory.live == 2 * 4096
        del temporary
        assert memory.live == 4096
        del first
        assert memory.live == 4096
        del view
    assert (memory.live, memory.peak) == (0, 2 * 4096)
