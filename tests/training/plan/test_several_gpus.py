"""Plans for several GPUs: what each holds, what a step takes, and when weights are sharded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.training.plan.conftest import BIG, ROWS, gpu, settings

import parley
from parley.errors import UsageError
from parley.training.plan.memory import Batches
from parley.training.plan.planner import Data, Planner
from parley.training.plan.run_plan import context_ranks, plan_for
from parley.training.plan.several_gpus import link_cost, share_of
from parley.training.shard_decision import needed_ranks, needs_sharding
from parley.units import GIB

NARROW = BIG | {"vocab_size": 8192, "num_hidden_layers": 32}  # layers and heads are gathered whole


def test_the_rows_of_a_step_are_shared_out() -> None:
    batches = Batches(np.array([512, 301]), 2, 4, 512)
    assert share_of(batches, 1, 1) is batches
    assert share_of(batches, 4, 1).rows_per_step == 2
    assert share_of(batches, 16, 1).rows_per_step == 1
    split = share_of(batches, 4, 2)
    assert split.rows_per_step == 4
    assert split.length_N.tolist() == [256, 151]


def test_sharded_weights_are_a_part_of_each_gpu(model_folder: Any) -> None:
    config = settings(model_folder(**NARROW), "training.shard=full")
    two, four = (plan_for(config, ROWS, gpu(80, count)) for count in (2, 4))
    [sharded] = two.estimates
    whole = plan_for(settings(model_folder(**NARROW)), ROWS, gpu(80)).estimates[0].parts["base weights"]
    assert sharded.memory == "sharded"
    assert sharded.parts["base weights"] == pytest.approx(whole / 2, rel=0.01)
    assert four.estimates[0].parts["base weights"] == pytest.approx(whole / 4, rel=0.01)
    assert sharded.parts["gathered weights"] == four.estimates[0].parts["gathered weights"]
    assert two.steps == 8  # batch settings are those of the whole step
    assert two.link is not None
    # Forward and backward pass gather all weights, half of which the other one has; the adapter's gradient is summed.
    assert two.link.bytes_a_step == pytest.approx(2 * whole / 2 + 4 * two.trained_parameters, rel=0.01)
    layer = sharded.parts["gathered weights"] / 3
    assert layer == pytest.approx(whole / 32, rel=0.1)
    wide = plan_for(settings(model_folder(**BIG), "training.shard=full"), ROWS, gpu(80, 2)).estimates[0].parts
    assert wide["gathered weights"] == pytest.approx(2 * 128256 * 4096 * 2, rel=0.01)  # of the head
    assert 0 < two.link.seconds_a_step < two.step_seconds


def test_full_fine_tuning_cuts_weights_gradients_and_moments(model_folder: Any) -> None:
    config = settings(model_folder(**NARROW), "lora=null", "training.optim=adamw_torch", "training.shard=full")
    two, eight = (plan_for(config, ROWS, gpu(80, count)).estimates[0].parts for count in (2, 8))
    for name in ("trained weights", "optimizer state"):
        assert two[name] == pytest.approx(4 * eight[name], rel=0.01)
    weights = 2 * two["trained weights"]
    assert two["optimizer state"] == weights
    difference = two["gradients, activations and loss"] - eight["gradients, activations and loss"]
    assert difference > weights * (1 / 2 - 1 / 8) * 0.99


@pytest.fixture
def between(model_folder: Any) -> float:
    """GiB of a GPU that holds sharded weights of two, and not whole ones."""
    whole, *_, sharded = Planner(settings(model_folder(**NARROW)), ROWS, gpu(80, 2)).estimates()
    assert (whole.memory, sharded.memory) == ("auto", "sharded")
    low = Planner(settings(model_folder(**NARROW), "training.memory=low"), ROWS, gpu(4, 2)).taken()
    assert sharded.peak_bytes < low.peak_bytes
    return (sharded.peak_bytes + low.peak_bytes) / 2 / GIB


def test_auto_shards_what_does_not_fit_whole(model_folder: Any, between: float) -> None:
    config = settings(model_folder(**NARROW))
    planned = plan_for(config, ROWS, gpu(between, 2))
    assert planned.estimates[0].memory == "sharded"
    assert planned.fits
    assert plan_for(config, ROWS, gpu(80, 2)).estimates[0].memory == "auto"
    whole = plan_for(settings(model_folder(**NARROW), "training.shard=none"), ROWS, gpu(between, 2))
    assert not whole.fits
    assert "--set training.shard=full" in [alternative.settings for alternative in whole.alternatives]


def test_the_decision_of_a_run_is_that_of_its_plan(
    model_folder: Any,
    between: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Any] = []
    monkeypatch.setattr("parley.training.plan.run_plan.read_data", lambda config: read.append(config) or ROWS)
    config = settings(model_folder(**NARROW))
    assert not needs_sharding(config, gpu(80, 2))
    assert not read  # the weights alone show it
    assert needs_sharding(config, gpu(between, 2))
    assert len(read) == 1


def test_split_rows_take_less_of_each_gpu(model_folder: Any) -> None:
    long = Data(np.array([65536]), 1)
    config = settings(
        model_folder(**NARROW | {"max_position_embeddings": 65536, "num_hidden_layers": 4}), "training.engine=captured"
    )
    config.model.max_seq_length = 65536
    config.training.per_device_train_batch_size = config.training.gradient_accumulation_steps = 1
    alone = plan_for(config, long, gpu(80, 2))
    config.training.context_parallel = 2
    split = plan_for(config, long, gpu(80, 2))
    part = "gradients, activations and loss"
    assert split.estimates[0].parts[part] < 0.6 * alone.estimates[0].parts[part]
    config.training.shard = "none"
    whole, split = (plan_for(config, long, gpu(200, count)) for count in (4, 2))
    assert split.link is not None
    # Beside the adapter's gradient, keys and values of 32,768 tokens in 4 layers, and their gradients.
    keys_and_values = 4 * 2 * 8 * 128 * 2 * 32768
    assert split.link.bytes_a_step == pytest.approx(4 * split.trained_parameters + 3 * keys_and_values, rel=0.01)
    assert whole.estimates[0].parts[part] == split.estimates[0].parts[part]  # two pairs have a row each


def test_auto_splits_rows_that_do_not_fit_over_the_fewest_gpus_that_they_fit_on(
    model_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = Data(np.array([65536, 300]), 2)
    config = settings(
        model_folder(**NARROW | {"max_position_embeddings": 65536, "num_hidden_layers": 2}), "training.engine=captured",
        "model.max_seq_length=65536", "training.per_device_train_batch_size=1", "training.shard=none",
        "training.gradient_accumulation_steps=1",
    )  # fmt: skip
    count_memory, known = Planner.taken, {}

    def taken(planner: Planner) -> Any:
        key = (planner.ranks, int(planner.data.length_N.max()))
        known[key] = known.get(key) or count_memory(planner)
        return known[key]

    monkeypatch.setattr(Planner, "taken", taken)

    def chosen(gib: float, count: int = 4, data: Data = long) -> int | None:
        return context_ranks(config, data, gpu(gib, count))

    assert chosen(1) is None
    one, two, four = (known[ranks, 65536].peak_bytes / GIB for ranks in (1, 2, 4))
    assert four < two < one
    between, less = (two + one) / 2, (four + two) / 2
    assert [chosen(gib) for gib in (500, between, less)] == [1, 2, 4]
    assert chosen(between, 1) == 1
    assert chosen(between, 6) == 2
    assert chosen(less, data=Data(np.array([300]), 1)) == 1
    assert context_ranks(with_ranks(config, 2), long, gpu(500, 4)) == 2
    plain = config.model_copy(update={"training": config.training.model_copy(update={"engine": "plain"})})
    assert context_ranks(plain, long, gpu(1, 2)) == 1
    # A run decides alike, and reads its data only where rows of the most tokens do not fit.
    read: list[Any] = []
    monkeypatch.setattr("parley.training.plan.run_plan.read_data", lambda config: read.append(config) or long)
    assert needed_ranks(config, gpu(500, 4)) == 1
    assert not read
    assert needed_ranks(config, gpu(less, 4)) == 4
    assert needed_ranks(config, gpu(1, 4)) == 1  # memory runs out in one line
    assert len(read) == 2
    planned = parley.plan(config, gpu_memory=f"{between:.2f}GiB", gpus=2)
    assert planned.fits
    assert "up to 32,768 tokens of a packed row on each" in planned.estimates[0].notes[0]
    assert "--set training.context_parallel=2" in [
        other.settings for other in plan_for(with_ranks(config, 1), long, gpu(between, 2)).alternatives if other.fits
    ]


def with_ranks(config: Any, ranks: int) -> Any:
    return config.model_copy(update={"training": config.training.model_copy(update={"context_parallel": ranks})})


def test_the_link_is_named() -> None:
    cost = link_cost("NVIDIA H100 80GB HBM3", 4, gradient_bytes=4 * GIB, gathered_bytes=0, context_bytes=0)
    assert (cost.link, cost.bytes_a_step) == ("NVLink", 6 * GIB)
    assert link_cost("a GPU of 24 GiB", 2, gradient_bytes=4, gathered_bytes=0, context_bytes=0).link == "PCIe"


@pytest.mark.parametrize(
    ("count", "ranks", "message"),
    [(0, 1, "--gpus 0: wanted a number of GPUs"), (3, 2, "context_parallel is 2 and there are 3 GPUs")],
)
def test_numbers_of_gpus_that_are_refused(model_folder: Any, count: int, ranks: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parley.plan(settings(model_folder(), f"training.context_parallel={ranks}"), gpu_memory="8GiB", gpus=count)
