"""Attention over a grid of documents, against scaled dot products of one document at a time."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from parley.data.packing import Document
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import DeviceBatch, StagingBuffer, pack
from parley.train_step.reference_attention import MAX_FULL_SCORES, attention, attention_backward

SHAPE = AttentionShape(heads=6, kv_heads=2, head_dim=8, scale=0.3)


def rows_of(lengths: tuple[int, ...], more: int) -> DeviceBatch:
    packed = pack([Document.from_lists(np.zeros(length), np.zeros(length)) for length in lengths])
    tokens = sum(lengths) + more
    return StagingBuffer(torch.device("cpu"), tokens).upload(packed.padded(tokens), 1.0, packed.lengths)


@pytest.mark.parametrize("lengths", [(5, 1, 9), (3, MAX_FULL_SCORES + 2)])
def test_each_document_by_itself_and_rows_behind_them_are_nothing(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, real = rows_of(lengths, more=4), sum(lengths)
    x_TC = torch.randn(batch.tokens, SHAPE.columns, requires_grad=True)
    dout_TD = torch.randn(batch.tokens, 48)
    wanted = []
    for x_LC in x_TC[:real].split(lengths):
        q, k, v = (part.transpose(0, 1) for part in SHAPE.split_qkv(x_LC))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SHAPE.scale, enable_gqa=True)
        wanted.append(out.transpose(0, 1).flatten(1))
    wanted_TD = torch.cat(wanted)
    wanted_TD.backward(dout_TD[:real])
    out, dx = torch.full((batch.tokens, 50), torch.nan), torch.full((batch.tokens, SHAPE.columns + 3), torch.nan)
    with torch.no_grad():
        saved = attention(x_TC, batch, SHAPE, out[:, :48])
        attention_backward(dout_TD, x_TC, out[:, :48], saved, batch, SHAPE, dx[:, :-3])
    torch.testing.assert_close(out[:real, :48], wanted_TD.detach())
    torch.testing.assert_close(dx[:real, :-3], x_TC.grad[:real])
    assert not out[real:, :48].any()
    assert not dx[real:, :-3].any()
    assert torch.isnan(out[:, 48:]).all()
