"""Rows that are split over ranks give the loss and the gradient of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.distributed.conftest import in_processes, rank
from tests.distributed.test_data_parallel import assert_same_run
from tests.distributed.test_sharded_step import documents, in_ranks

from parley.config import LoraSection, ModelSection, RunConfig
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.errors import UsageError
from parley.models.adapters import attach_lora
from parley.models.load import load_model
from parley.pipeline import train
from parley.train_step import chunk_attention, reference_ops
from parley.train_step.captured_step import CapturedStep
from parley.train_step.chunk_attention import BlockChunk, Chunk, reference_chunk, takes_blocks
from parley.train_step.context_parallel import ContextGroup, chunk_length, split
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import StagingBuffer, pack
from parley.training.processes import process_count, sum_all_in_place

QUIET = Console(quiet=True)


def gradient(folder: Path, rows: list[Document], tokens: int, context: ContextGroup | None) -> tuple[Any, ...]:
    model, _ = load_model(ModelSection(name=str(folder), device="cpu", max_seq_length=64))
    model = attach_lora(model, LoraSection(), seed=1).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    step = CapturedStep(model, tokens=tokens, context=context)
    step.forward_backward(rows, sum(document.loss_weight for document in rows))
    sum_all_in_place([*step.gradients, step.metrics_3])
    trained_3 = step.metrics_3.clone()
    evaluated_3 = step.forward_only(rows)
    sum_all_in_place([evaluated_3])
    return torch.cat([gradient.flatten() for gradient in step.gradients]), trained_3, evaluated_3


@pytest.mark.parametrize(
    ("family", "count", "tokens"),
    [("llama", 2, 1000), ("llama", 4, 40), ("mistral", 2, 1000), ("qwen3", 3, 1)],
    ids=["one row", "several passes", "window", "a document a pass"],
)
def test_the_gradient_of_split_rows_is_that_of_one_process(
    build_family: Any, tmp_path: Path, family: str, count: int, tokens: int
) -> None:
    folder, rows = build_family(family), documents()
    ours = in_ranks(
        count, lambda: gradient(folder, rows, tokens, ContextGroup(rank(), process_count())), tmp_path / "result.pt"
    )
    theirs = gradient(folder, rows, tokens, None)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_and_supervised_row_is_on_one_rank(ranks: int) -> None:
    packed = pack(documents())
    parts = [split(packed, ContextGroup(index, ranks)) for index in range(ranks)]
    tokens = sorted(
        (start, position) for local, _ in parts for start, position in zip(local.start_T, local.position_T, strict=True)
    )
    whole = packed.padded(sum(len(local.ids_T) for local, _ in parts))
    assert tokens == sorted(zip(whole.start_T, whole.position_T, strict=True))
    targets = [target for local, _ in parts for target in local.target_S if target >= 0]
    assert sorted(targets) == sorted(packed.target_S)
    for local, layout in parts:
        assert len({len(part.ids_T) for part, _ in parts}) == 1
        for chunk in layout.chunks:
            query_lengths, key_lengths = np.diff(chunk.query_edges), np.diff(chunk.key_edges)
            # Each document's queries are its last tokens among the keys; padding belongs to the last document.
            first = local.position_T[chunk.queries][np.array(chunk.query_edges[:-1])]
            padding = first + local.start_T[chunk.queries][np.array(chunk.query_edges[:-1])] >= len(packed.ids_T)
            assert (key_lengths - query_lengths == first)[~padding].all()
            assert (query_lengths <= key_lengths).all()


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, ("training.context_parallel=2",)),
        (4, ("training.context_parallel=2", "training.gradient_checkpointing=false")),
        (2, ("training.context_parallel=2", "training.shard=full", "model.quantization=nf4")),
    ],
    ids=["all processes", "two groups", "sharded"],
)
def test_a_run_of_split_rows_learns_what_one_process_learns(
    configured: Callable[..., RunConfig], count: int, settings: tuple[str, ...]
) -> None:
    quantization = [setting for setting in settings if setting.startswith("model.")]
    # Adam divides gradients by their own size, also those of the size of rounding, and attention rounds otherwise here:
    # with its 1e-8, 23 of these 32,768 weights would differ by 1e-5 to 3e-4, which is 3e-5 of their norm.
    epsilon = "training.adam_epsilon=1e-6"
    alone = configured("training.engine=captured", epsilon, *quantization)
    together = configured(epsilon, *settings)
    train(alone, QUIET)
    assert in_processes(count, lambda: train(together, QUIET)) == [0] * count
    assert_same_run(together.output, alone.output)


def test_one_process_splits_no_rows(configured: Callable[..., RunConfig]) -> None:
    with pytest.raises(UsageError, match=r"training\.context_parallel is 2 and there is 1 process: their number"):
        train(configured("training.context_parallel=2"), QUIET)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", ("training.engine=plain",), "training.engine: plain do not go together"),
        ("llama", ("training.method=dpo",), "training.method: dpo trains in one process"),
        ("gemma2", (), "attention with a soft cap is not split over processes"),
    ],
)
def test_what_is_not_split_is_refused(
    configured: Callable[..., RunConfig], build_family: Any, refusal: Callable[[RunConfig], str],
    family: str, settings: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    config = configured("training.context_parallel=2", f"model.name={build_family(family)}", *settings)
    assert message in refusal(config)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_chunk_attends_as_the_whole_row(ranks: int, window: int | None) -> None:
    packed = pack(documents())
    heads = AttentionShape(4, 2, 8, 8**-0.5, window)
    for index in range(ranks):
        local, layout = split(packed, ContextGroup(index, ranks))
        whole = packed.padded(len(local.ids_T) * ranks)
        x_TC = torch.linspace(-1, 1, len(whole.ids_T) * heads.columns).sin_().view(-1, heads.columns)
        wanted_TD = torch.empty(len(x_TC), 32)
        batch = StagingBuffer(torch.device("cpu"), len(x_TC)).upload(whole, 1.0, whole.lengths)
        reference_ops.attention(x_TC, batch, heads, wanted_TD)
        q_THE, k_TGE, v_TGE = heads.split_qkv(x_TC)
        own_t = torch.from_numpy(local.start_T + local.position_T).long()
        kv_T2GE = torch.cat([k_TGE, v_TGE], dim=1)
        for chunk in layout.chunks:
            out_tHE = reference_chunk(q_THE[own_t][chunk.queries], kv_T2GE[chunk.keys], chunk, heads)
            real = own_t[chunk.queries] < len(packed.ids_T)
            ours, wanted = out_tHE.flatten(1), wanted_TD[own_t][chunk.queries]
            torch.testing.assert_close(ours[real], wanted[real], rtol=1e-5, atol=1e-6)


def exact_attention(
    q_BHLE: torch.Tensor, k_BGLE: torch.Tensor, v_BGLE: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As library_compat.torch.cudnn_attention; the second of its state is there to be handed on."""
    p_BHLL, lse = probabilities(q_BHLE, k_BGLE, None, scale, causal=causal)
    return p_BHLL @ v_BGLE.repeat_interleave(q_BHLE.shape[1] // v_BGLE.shape[1], 1), [lse, torch.tensor(causal)]


def exact_attention_backward(
    dout_BHLE: torch.Tensor, q_BHLE: torch.Tensor, k_BGLE: torch.Tensor, v_BGLE: torch.Tensor, out: torch.Tensor,
    state: list[torch.Tensor], scale: float, *, causal: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The formulas of flash-attention's backward pass, from output and log-sum-exp."""
    assert bool(state[1]) == causal
    groups = q_BHLE.shape[1] // k_BGLE.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k_BGLE, v_BGLE))
    p, _ = probabilities(q_BHLE, k_BGLE, state[0], scale, causal=causal)
    ds = p * (dout_BHLE @ v.mT - (dout_BHLE * out).sum(-1, keepdim=True)) * scale
    of_heads = (ds.mT @ q_BHLE, p.mT @ dout_BHLE)
    return ds @ k, *(x.unflatten(1, (-1, groups)).sum(2) for x in of_heads)


def probabilities(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf)
    lse = s.logsumexp(-1, keepdim=True) if lse is None else lse
    return (s - lse).exp(), lse


@pytest.mark.parametrize("before", [0, 6, 18])
def test_two_blocks_are_the_attention_of_a_chunk(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_attention, "cudnn_attention", exact_attention)
    monkeypatch.setattr(chunk_attention, "cudnn_attention_backward", exact_attention_backward)
    generator = torch.Generator().manual_seed(before)
    q, kv, dout = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 4, 8), (before + 6, 4, 8), (6, 4, 8))
    )
    inputs = [q.requires_grad_(), kv.requires_grad_()]
    chunk = Chunk(slice(0, 6), slice(0, before + 6), (0, 6), (0, before + 6))
    assert chunk.before == before
    blocks = BlockChunk.apply(*inputs, before, 0.3)
    whole = reference_chunk(*inputs, chunk, AttentionShape(4, 2, 8, 0.3))
    torch.testing.assert_close(blocks, whole)
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, dout) for out in (blocks, whole)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_long_chunks_of_one_document_go_to_cudnn() -> None:
    heads = AttentionShape(32, 8, 128, 0.1)
    document = Document.from_lists(np.arange(20000), np.where(np.arange(20000) > 19000, 1, IGNORE_INDEX))
    for index in range(2):  # one document with its padding
        local, layout = split(pack([document]), ContextGroup(index, 2))
        assert len(local.ids_T) == 2 * chunk_length(20000, 2) >= 10000
        assert all(takes_blocks(chunk, heads) for chunk in layout.chunks)
    _, layout = split(pack([document]), ContextGroup(0, 2))
    assert not takes_blocks(layout.chunks[0], AttentionShape(32, 8, 128, 0.1, 4096))
    assert not takes_blocks(layout.chunks[0], AttentionShape(32, 8, 192, 0.1))
    _, layout = split(pack([document, document]), ContextGroup(0, 2))
    assert [takes_blocks(chunk, heads) for chunk in layout.chunks] == [True, False]  # begins in the middle of a chunk
    short = Document.from_lists(np.arange(2000), np.arange(2000))
    assert not any(takes_blocks(chunk, heads) for chunk in split(pack([short]), ContextGroup(0, 2))[1].chunks)


def test_long_chunks_have_few_lengths() -> None:
    assert chunk_length(101, 2) == 26
    lengths = {chunk_length(tokens, 2) for tokens in range(4 * 4096, 4 * 8192)}
    assert len(lengths) <= 33
    assert all(tokens <= 4 * chunk_length(tokens, 2) <= 1.04 * tokens for tokens in range(4 * 4096, 4 * 8192, 77))
