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
from parley.data.packing import Document
from parley.errors import ParleyError, UsageError
from parley.models.adapters import attach_lora
from parley.models.load import load_model
from parley.pipeline import train
from parley.train_step import reference_ops
from parley.train_step.captured_step import CapturedStep
from parley.train_step.context_parallel import ContextGroup, reference_chunk, split
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
            # Each document's queries are its last tokens among the keys.
            last = local.position_T[chunk.queries][np.array(chunk.query_edges[1:]) - 1]
            assert (key_lengths == last + 1).all()
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
    # Attention rounds otherwise here, and Adam would divide gradients of the size of rounding by their own size.
    epsilon = "training.adam_epsilon=1e-4"
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
    configured: Callable[..., RunConfig], build_family: Any, capfd: pytest.CaptureFixture[str],
    family: str, settings: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    config = configured("training.context_parallel=2", f"model.name={build_family(family)}", *settings)

    def work() -> None:
        try:
            train(config, QUIET)
        except ParleyError as error:
            print(error)
            raise

    assert in_processes(2, work) != [0, 0]
    assert message in capfd.readouterr().out


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
            torch.testing.assert_close(out_tHE.flatten(1), wanted_TD[own_t][chunk.queries], rtol=1e-5, atol=1e-6)
