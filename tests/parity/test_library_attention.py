"""Which library attends to which documents of a row with a long one, and where the results go. The operators themselves
are replaced by attention in plain PyTorch: tests/library_compat holds them to it on a GPU.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parley.data.packing import Document
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import DeviceBatch, StagingBuffer, pack
from parley.units import round_up

library_attention = pytest.importorskip("parley.train_step.kernels.library_attention", reason="no Triton here")

LENGTHS, PADDING = (3, 50, 12, 41, 1), 5
TOKENS = sum(LENGTHS) + PADDING
SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=64, scale=0.2)


def attend(q_THE: Tensor, k: Tensor, v: Tensor, edges: list[int], window: int | None) -> Tensor:
    outs = []
    for begin, end in itertools.pairwise(edges):
        seen = torch.ones(end - begin, end - begin).tril().bool()
        if window is not None:
            seen &= torch.ones_like(seen).triu(1 - window)
        parts = [x[begin:end].transpose(0, 1)[None] for x in (q_THE, k, v)]
        out = functional.scaled_dot_product_attention(*parts, attn_mask=seen, scale=SHAPE.scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, edges: list[int], window: int | None
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return list(torch.autograd.grad(attend(*leaves, edges, window), leaves, dout))


class Libraries:
    """Stand-ins that note the documents they were called with, forward and backward."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def flash_4(self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float,
                out: Tensor) -> str:  # fmt: skip
        self.calls.append(("flash 4", np.diff(boundaries).tolist()))
        out.copy_(attend(q, k, v, boundaries.tolist(), None))
        return "state of flash 4"

    def flash_4_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: str,
                         boundaries: Tensor, longest: int, scale: float, grads: list[Tensor]) -> None:  # fmt: skip
        assert lse == "state of flash 4"
        for grad, wanted in zip(grads, attend_backward(dout, q, k, v, boundaries.tolist(), None), strict=True):
            grad.copy_(wanted)

    def flash_2(self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float,
                window: int | None) -> tuple[Tensor, str]:  # fmt: skip
        self.calls.append(("flash 2", np.diff(boundaries).tolist()))
        return attend(q, k, v, boundaries.tolist(), window), "state of flash 2"

    def flash_2_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: str,
                         boundaries: Tensor, longest: int, scale: float,
                         window: int | None) -> list[Tensor]:  # fmt: skip
        assert lse == "state of flash 2"
        return attend_backward(dout, q, k, v, boundaries.tolist(), window)

    def cudnn(self, q_1HLE: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, str]:
        rows = [x[0].transpose(0, 1) for x in (q_1HLE, k, v)]
        self.calls.append(("cudnn", [len(rows[0])]))
        return attend(*rows, [0, len(rows[0])], None).transpose(0, 1)[None], "state of cudnn"

    def cudnn_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: str,
                       scale: float) -> list[Tensor]:  # fmt: skip
        assert state == "state of cudnn"
        rows = [x[0].transpose(0, 1) for x in (dout, q, k, v)]
        return [x.transpose(0, 1)[None] for x in attend_backward(*rows, [0, len(rows[0])], None)]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Libraries:
    stand_ins = Libraries()
    monkeypatch.setattr(library_attention, "LONG_DOCUMENT", 40)
    monkeypatch.setattr(library_attention, "padded_length", lambda length: round_up(length, 8))
    monkeypatch.setattr(library_attention.flash_attn, "flash_attention_4", stand_ins.flash_4)
    monkeypatch.setattr(library_attention.flash_attn, "flash_attention_4_backward", stand_ins.flash_4_backward)
    monkeypatch.setattr(library_attention, "varlen_flash_attention", stand_ins.flash_2)
    monkeypatch.setattr(library_attention, "varlen_flash_attention_backward", stand_ins.flash_2_backward)
    monkeypatch.setattr(library_attention, "cudnn_attention", stand_ins.cudnn)
    monkeypatch.setattr(library_attention, "cudnn_attention_backward", stand_ins.cudnn_backward)
    return stand_ins


def batch_of(lengths: tuple[int, ...]) -> DeviceBatch:
    packed = pack([Document.from_lists(np.zeros(n), np.zeros(n)) for n in lengths])
    return StagingBuffer(torch.device("cpu"), TOKENS).upload(packed.padded(TOKENS), 1.0, packed.lengths)


def run(shape: AttentionShape) -> None:
    """Forward and backward into buffers with other columns behind, against one call over all documents."""
    generator = torch.Generator().manual_seed(0)
    x, dout = (
        torch.randn(TOKENS, columns, generator=generator, dtype=torch.bfloat16) for columns in (shape.columns, 256)
    )
    out, dx = (torch.full((TOKENS, columns + 8), torch.nan, dtype=x.dtype) for columns in (256, shape.columns))
    batch, documents, given = batch_of(LENGTHS), slice(0, sum(LENGTHS)), dout.clone()
    saved = library_attention.attention(x, batch, shape, out[:, :256])
    library_attention.attention_backward(dout, x, out[:, :256], saved, batch, shape, dx[:, : shape.columns])
    assert torch.equal(dout, given)  # also where it was zero for the time of a call
    edges = [0, *np.cumsum(LENGTHS).tolist()]
    qkv = [part[documents].float() for part in shape.split_qkv(x)]
    wanted = attend(*qkv, edges, shape.window)
    dwanted = attend_backward(dout[documents].float().unflatten(1, (-1, 64)), *qkv, edges, shape.window)
    pairs: list[tuple[Any, Any]] = [(out[documents, :256], wanted), (dx[documents, : shape.columns], dwanted)]
    for ours, theirs in pairs:
        exact = torch.cat([part.flatten(1) for part in theirs], 1) if isinstance(theirs, list) else theirs.flatten(1)
        assert float((ours.float() - exact).norm() / exact.norm()) < 0.01
    for buffer, columns in ((out, 256), (dx, shape.columns)):
        assert not buffer[sum(LENGTHS) :, :columns].any()  # padding rows
        assert buffer[:, columns:].isnan().all()


def test_flash_4_takes_all_documents_at_once(libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_attention, "_has_flash_4", lambda device: True)
    run(SHAPE)
    assert libraries.calls == [("flash 4", list(LENGTHS))]


def test_cudnn_takes_long_documents_and_flash_2_those_between(libraries: Libraries) -> None:
    run(SHAPE)
    # Of lengths that cuDNN has a plan for: the first with the rows behind it, the second ends with the row, in a copy.
    assert libraries.calls == [("flash 2", [3]), ("cudnn", [56]), ("flash 2", [12]), ("cudnn", [48]), ("flash 2", [1])]


@pytest.mark.parametrize("installed", [False, True])
def test_windows_and_fixed_order_are_flash_2s(
    libraries: Libraries, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(library_attention, "_has_flash_4", lambda device: installed)
    run(AttentionShape(4, 2, 64, 0.2, 9))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run(SHAPE)
    assert libraries.calls == [("flash 2", list(LENGTHS))] * 2


def test_other_head_sizes_than_the_tested_do_not_go_to_flash_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_attention, "_has_flash_4", lambda device: True)
    assert library_attention._kernel(torch.device("cpu"), AttentionShape(4, 2, 96, 0.2)) == "cudnn"
    assert library_attention._kernel(torch.device("cpu"), AttentionShape(4, 2, 128, 0.2)) == "flash 4"


@pytest.mark.parametrize(("capability", "kernel"), [((9, 0), "cudnn"), ((8, 0), "flash 2"), ((10, 0), "flash 2")])
def test_heads_of_256_go_to_cudnn_on_hopper_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(library_attention, "_max_cudnn_head", library_attention._max_cudnn_head.__wrapped__)
    monkeypatch.setattr(library_attention, "_has_flash_4", lambda device: False)
    assert library_attention._kernel(torch.device("cuda"), AttentionShape(4, 1, 256, 0.2)) == kernel
    assert library_attention._kernel(torch.device("cuda"), AttentionShape(4, 1, 128, 0.2)) == "cudnn"


def test_libraries_take_rows_with_a_long_document_of_16_bits_alone(libraries: Libraries) -> None:
    x = torch.zeros(TOKENS, SHAPE.columns, dtype=torch.bfloat16)
    assert library_attention.applies(x, batch_of(LENGTHS), SHAPE)
    assert not library_attention.applies(x, batch_of((39, 39, 5)), SHAPE)
    assert not library_attention.applies(x.float(), batch_of(LENGTHS), SHAPE)
    assert not library_attention.applies(x, batch_of(LENGTHS), AttentionShape(4, 2, 64, 0.2, softcap=3.0))
