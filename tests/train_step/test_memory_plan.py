from typing import Any

import numpy as np

from parley.train_step.memory_plan import GIB, SAVED_POLICIES, make_plan, step_tokens
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
