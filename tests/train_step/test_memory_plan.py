from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from parley.train_step import memory_plan
from parley.train_step.matmul import uses_onednn
from parley.train_step.memory_plan import (
    GIB,
    LIBRARY_BYTES,
    SAVED_POLICIES,
    DeviceMemory,
    MemoryPlan,
    buffer_bytes,
    make_plan,
    step_tokens,
)
from parley.train_step.workspace import Workspace, workspace_bytes

LENGTHS = np.array([100])


def test_with_room_a_step_is_one_pass_and_everything_is_kept(bound: Any) -> None:
    plan = make_plan(bound, "auto", LENGTHS, documents=8)
    assert (plan.tokens, plan.saved, plan.cache_matrices) == (800, "all", True)
    assert 0 < plan.predicted_bytes <= plan.allowed_bytes


def test_low_is_the_leanest(bound: Any) -> None:
    plan = make_plan(bound, "low", LENGTHS, documents=8)
    assert (plan.tokens, plan.saved, plan.cache_matrices) == (100, "layer_inputs", False)
    assert plan.predicted_bytes < make_plan(bound, "auto", LENGTHS, documents=8).predicted_bytes


def test_less_memory_is_met_by_less(bound: Any) -> None:
    whole = make_plan(bound, "auto", LENGTHS, documents=8).predicted_bytes
    for share in (0.9, 0.7, 0.5):
        plan = make_plan(bound, share * whole / GIB, LENGTHS, documents=8)
        assert plan.predicted_bytes <= share * whole
        assert plan.tokens >= 100


def test_what_fits_nowhere_gets_the_leanest(bound: Any) -> None:
    plan = make_plan(bound, 1e-6, LENGTHS, documents=8)
    assert plan.predicted_bytes == make_plan(bound, "low", LENGTHS, documents=8).predicted_bytes


def test_says_what_was_chosen_and_why(bound: Any) -> None:
    text = "\n".join(make_plan(bound, "low", LENGTHS, documents=8).describe())
    assert "up to 100 tokens a pass" in text
    assert "recomputed from its input" in text
    assert "GiB predicted of" in text
    assert SAVED_POLICIES[-1] == "layer_inputs"


def test_a_pass_has_room_for_nearly_every_step(bound: Any) -> None:
    lengths = np.array([10] * 95 + [100] * 5)
    drawn = np.random.default_rng(1).choice(lengths, (5000, 8)).sum(1)
    assert np.quantile(drawn, 0.99) < step_tokens(lengths, 8) < 800
    assert make_plan(bound, "auto", lengths, documents=8).tokens == step_tokens(lengths, 8)


def test_the_prediction_holds_what_the_workspace_takes(bound: Any) -> None:
    plan = make_plan(bound, "auto", LENGTHS, documents=8)
    workspace = Workspace(bound, plan)
    workspace.reserve(plan.tokens)
    assert (
        sum(buffer.nbytes for buffer in workspace.buffers.values())
        == workspace_bytes(bound, plan)
        < plan.predicted_bytes
    )


def test_the_prediction_counts_every_large_thing_once(bound: Any) -> None:
    """Adapter weights and gradients are the device's allocated memory; everything else is counted by the plan."""
    plan = make_plan(bound, "auto", LENGTHS, documents=8, state_bytes=8)
    matrices = sum(
        linear.matrix_numel(contiguous=uses_onednn(bound.dtype, bound.device)) * 4 for linear in bound.linears
    )
    logits = plan.logits_rows * 1000 * 4
    lse = 4 * 4 * plan.tokens * 4  # heads, tokens, layers
    state = 8 * bound.flat.weight_Z.numel()
    assert plan.predicted_bytes == matrices + logits + lse + state + workspace_bytes(bound, plan)


@pytest.mark.parametrize("state_bytes", [2, 8])
def test_optimizer_state_is_counted_per_trainable_weight(bound: Any, state_bytes: int) -> None:
    without, with_state = (
        make_plan(bound, "auto", LENGTHS, 8, state_bytes=n).predicted_bytes for n in (0, state_bytes)
    )
    assert with_state - without == state_bytes * bound.flat.weight_Z.numel() > 0


def test_a_part_of_the_free_memory_stays_free(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory().available
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    plan = make_plan(bound, "auto", LENGTHS, documents=8)
    assert plan.allowed_bytes == pytest.approx(0.9 * free)
    assert make_plan(bound, 2, LENGTHS, documents=8).allowed_bytes == 2 * GIB  # a number is taken at its word


def test_the_free_memory_of_a_gpu_includes_what_torch_holds_and_a_part_of_it_stays_free(
    bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6000, 10000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 700)
    on_gpu = SimpleNamespace(
        **{name: getattr(bound, name) for name in ("layers", "dtype", "linears", "flat", "hidden_size")}
    )
    on_gpu.head_VD, on_gpu.device = bound.head_VD, torch.device("cuda")
    plan = make_plan(on_gpu, "auto", LENGTHS, documents=8)  # type: ignore[arg-type]
    assert plan.allowed_bytes == 7200
    matrices = [linear.matrix_numel(contiguous=False) * 4 for linear in bound.linears]
    assert not plan.cache_matrices
    fixed = 700 + LIBRARY_BYTES + 2 * bound.flat.weight_Z.numel() + sum(matrices[:4]) + max(matrices) // 16
    assert plan.predicted_bytes - fixed == (
        workspace_bytes(bound, plan) + plan.logits_rows * 1000 * 4 + 4 * 4 * plan.tokens
    )


def test_a_plan_that_the_host_cannot_hold_is_never_chosen(bound: Any) -> None:
    """Not even where no plan fits the device."""
    names = (*("layers", "dtype", "linears", "flat", "hidden_size"), "head_VD")
    on_gpu: Any = SimpleNamespace(**{name: getattr(bound, name) for name in names})
    device = DeviceMemory(torch.device("cuda"), usable_bytes=0, held_bytes=0, host_bytes=0)
    plan = make_plan(on_gpu, "auto", np.array([100_000]), 1, 2, device)
    assert not plan.offload
    assert plan.predicted_bytes > 2**25  # what the step really takes, not the limit


@pytest.mark.parametrize(("usable", "temporaries"), [(False, 4096 * (2 * 128 * 4 + 64 * (5 * 4 + 4))), (True, None)])
def test_the_temporaries_of_long_attention_are_those_of_the_library_that_attends(
    bound: Any, monkeypatch: pytest.MonkeyPatch, usable: bool, temporaries: int | None
) -> None:
    """cuDNN's are of one padded document, flash-attn-4's of all tokens: gradients in fp32 and two numbers a head."""
    monkeypatch.setattr(memory_plan, "FLASH_4_HEADS", (16,))
    monkeypatch.setattr(memory_plan.flash_attn, "usable", lambda device: usable)
    plan = MemoryPlan(positions=4000, tokens=9000)
    on_cpu, on_gpu = (buffer_bytes(plan, bound, torch.device(name), 2)["activations"] for name in ("cpu", "cuda"))
    assert on_gpu - on_cpu == (temporaries or 4 * 9000 * (128 + 2 * 4))


def test_logits_give_way_before_the_rows_of_the_mlp(bound: Any) -> None:
    """And each plan of the same policy takes less than the one before."""
    plans = list(memory_plan._candidates(bound, np.array([9000]), 1, cuda=True))
    lean = [plan for plan in plans if plan.saved == "layer_inputs" and not plan.cache_matrices]
    assert [(plan.mlp_rows, plan.logits_rows) for plan in lean] == [(4096, 1024), (4096, 512), (2048, 512), (2048, 256)]
    sizes = [sum(buffer_bytes(plan, bound, torch.device("cuda"), 2).values()) for plan in lean]
    assert sizes == sorted(set(sizes), reverse=True)
