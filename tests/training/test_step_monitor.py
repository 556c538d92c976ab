"""Steps judged on the device: what is masked, what the host reads of them, and which losses are spikes."""

from __future__ import annotations

from collections import Counter
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.utils import get_peft_model_state_dict
from tests.training.rows import supervised_rows
from tests.training.test_fused_trainer import trainer
from transformers import TrainerCallback

from parley.errors import ModelError
from parley.training.step_monitor import (
    LEAST_WINDOW,
    MAX_PENDING,
    NonfiniteStepError,
    StepMonitor,
    drop_nonfinite,
)


def judged(monitor: StepMonitor, *figures: tuple[float, float], loss_alone: bool = False) -> list[bool]:
    applied = []
    for step, (loss, norm) in enumerate(figures, 1):
        monitor.add_loss(torch.tensor(loss))
        applied.append(bool(monitor.judge(step, torch.tensor(norm), loss_alone=loss_alone)))
    return applied


@pytest.mark.parametrize(
    ("policy", "applied"), [("stop", [True, False, False, False]), ("skip", [True, False, True, False])]
)
def test_what_is_masked(policy: Any, applied: list[bool]) -> None:
    """After a step to stop at, nothing is applied: the host learns of it later."""
    assert judged(StepMonitor(policy), (1, 1), (nan, 1), (1, 1), (1, inf)) == applied


def test_a_loss_scaler_sees_to_its_gradients_by_itself() -> None:
    assert judged(StepMonitor("skip"), (1, inf), (nan, 1), loss_alone=True) == [True, False]


def test_micro_batches_add_up_to_the_loss_of_their_step() -> None:
    monitor = StepMonitor()
    returned = [monitor.add_loss(torch.tensor(loss)) for loss in (1.0, nan, 0.5)]
    assert [float(loss) for loss in returned] == [1.0, 0.0, 0.5]  # what Trainer adds up stays a number
    monitor.judge(1, 1.0)
    (record,) = monitor.collect()
    assert not record.finite
    assert monitor.collect() == []


def test_stop_raises_at_the_first_step_and_skip_past_its_limit() -> None:
    monitor = StepMonitor("skip", limit=1)
    judged(monitor, (1, 1), (nan, 1), (1, 1), (1, nan))
    first, second, third, fourth = monitor.collect()
    for record in (first, second, third):
        monitor.react(record)
    with pytest.raises(NonfiniteStepError, match=r"step 4 \(after 1 skipped step, .*: the gradient is not finite"):
        monitor.react(fourth)
    with pytest.raises(NonfiniteStepError, match="step 2: the loss is not finite"):
        StepMonitor("stop").react(second)


@pytest.mark.parametrize(
    ("figures", "logs", "wanted"),
    [
        ([(2.0, 1.0), (4.0, 1.0)], {"loss": 3.0, "grad_norm": 1.0}, {"loss": 3.0, "grad_norm": 1.0}),
        ([(2.0, 1.0), (nan, 1.0)], {"loss": 1.0, "grad_norm": nan}, {"loss": 2.0}),
        ([(nan, 1.0)], {"loss": 0.0, "grad_norm": inf}, {}),
    ],
)
def test_logged_losses_are_means_of_finite_ones(
    figures: list[tuple[float, float]], logs: dict[str, float], wanted: dict[str, float]
) -> None:
    monitor = StepMonitor("skip")
    judged(monitor, *figures)
    monitor.collect()
    monitor.correct_logs(logs)
    assert logs == wanted
    judged(monitor, (5.0, 1.0))  # the next log starts anew
    monitor.collect()
    monitor.correct_logs(later := {"loss": 5.0})
    assert later == {"loss": 5.0}


def test_figures_without_a_finite_value_are_left_out() -> None:
    figures = {"entropy": [1.0, nan, 3.0], "accuracy": [nan]}
    drop_nonfinite(figures)
    assert figures == {"entropy": [1.0, 3.0]}


@pytest.mark.parametrize(
    ("before", "loss", "spike"),
    [
        ([2.0, 2.2, 1.8, 2.1, 1.9] * 4, 6.0, True),
        ([2.0, 2.2, 1.8, 2.1, 1.9] * 4, 2.6, False),  # within six deviations
        ([2.0] * 20, 2.5, False),  # no deviation at all: a quarter more is no spike
        ([2.0] * 20, 3.0, True),
        ([2.0, 2.2, 1.8, 2.1, 9.0] * 4, 6.0, True),  # earlier spikes are no measure
        ([2.0] * (LEAST_WINDOW - 1), 90.0, False),  # too few to compare with
        ([5.0 - 0.05 * step for step in range(40)], 3.0, False),  # a falling loss
    ],
)
def test_spikes(before: list[float], loss: float, spike: bool) -> None:
    monitor = StepMonitor()
    judged(monitor, *((value, 1.0) for value in [*before, loss]))
    records = monitor.collect()
    assert (records[-1].typical is not None) == spike
    if spike:
        assert records[-1].typical == pytest.approx(2.0, abs=0.1)


class Poison(TrainerCallback):
    """Makes the loss of one step NaN, by the embedding of every token."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[int, torch.Tensor] = {}
        self.embedding = torch.empty(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights[state.global_step] = torch.cat(
            [value.flatten().clone() for value in get_peft_model_state_dict(model).values()]
        )
        if state.global_step + 1 == self.step:
            self.embedding = model.get_input_embeddings().weight.data.clone()
            model.get_input_embeddings().weight.data.fill_(nan)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            model.get_input_embeddings().weight.data.copy_(self.embedding)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_the_trainer_stops_with_the_weights_of_the_step_before(
    tiny_tokenizer: Any, tmp_path: Path, engine: Any, optim: str
) -> None:
    poison = Poison(3)
    settings = {"optim": optim, "logging_steps": 2}
    made = trainer(tiny_tokenizer, tmp_path, 6, settings=settings, engine=engine, callbacks=[poison])
    with pytest.raises(NonfiniteStepError, match=r"step 3: the loss is not finite.*train row"):
        made.train()
    assert (made.fused_step is None) == (engine == "plain")
    assert made.state.global_step == (3 if made.state.save_steps == 3 else 4)
    after = torch.cat([value.flatten() for value in get_peft_model_state_dict(made.model).values()])
    assert torch.equal(after, poison.weights[2])
    assert not (tmp_path / "checkpoint-3").exists()  # save_steps=3


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("poisoned", [1, 3])
def test_a_skipped_step_changes_neither_weights_nor_moments_on_both_paths(
    tiny_tokenizer: Any, tmp_path: Path, optim: str, poisoned: int
) -> None:
    ended = []
    for engine in ("auto", "plain"):
        poison = Poison(poisoned)
        settings = {"optim": optim}
        made = trainer(
            tiny_tokenizer, tmp_path / engine, 6, settings=settings, engine=engine, callbacks=[poison], nonfinite="skip"
        )
        made.train()
        assert made.monitor.skipped == 1
        assert torch.equal(poison.weights[poisoned], poison.weights[poisoned - 1])
        assert not torch.equal(poison.weights[poisoned + 1], poison.weights[poisoned])
        losses = [logs.get("loss") for logs in made.state.log_history if "learning_rate" in logs]
        assert [step for step, loss in enumerate(losses, 1) if loss is None] == [poisoned]
        ended.append(torch.cat([value.flatten() for value in get_peft_model_state_dict(made.model).values()]))
    # 8-bit moments of small parameters are kept in 32 bits on the plain path.
    torch.testing.assert_close(*ended, rtol=5e-2, atol=5e-3 if optim == "adamw_8bit" else 1e-4)


def test_the_host_reads_nothing_from_the_device_between_two_logs(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[int] = Counter()

    class Counting(TrainerCallback):
        step = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step = state.global_step + 1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step = 0

    counting = Counting()

    def counted(name: str) -> None:
        read = getattr(torch.Tensor, name)

        def count(self: torch.Tensor, *args: Any) -> Any:
            reads[counting.step] += counting.step > 1 and self.is_floating_point() | (self.dtype == torch.bool)
            return read(self, *args)

        monkeypatch.setattr(torch.Tensor, name, count)

    for name in ("__bool__", "__float__", "item", "tolist", "cpu"):
        counted(name)
    # transformers' filter waits for every loss; Parley's SFTConfig switches it off.
    settings = {"logging_steps": 5, "save_steps": 50, "logging_nan_inf_filter": False}
    made = trainer(tiny_tokenizer, tmp_path, 5, settings=settings, callbacks=[counting])
    made.train()
    assert made.fused_step is not None
    assert sum(reads[step] for step in (2, 3, 4)) == 0
    assert len([logs for logs in made.state.log_history if "loss" in logs]) == 1


def test_steps_are_read_before_their_rows_fill_memory(tiny_tokenizer: Any, tmp_path: Path) -> None:
    made = trainer(tiny_tokenizer, tmp_path, 3, settings={"logging_strategy": "no", "save_strategy": "no"})
    for step in range(MAX_PENDING - 1):
        made.monitor.add_loss(torch.tensor(1.0))
        made.monitor.judge(step, 1.0)
    lengths: list[int] = []

    class Pending(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lengths.append(len(made.monitor.collect()))

    made.add_callback(Pending())
    made.train()
    assert lengths == [0, 1, 0]  # read at the hundredth, and at the last


@pytest.mark.parametrize("name", ["lora_A", "embed_tokens"])
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_weights_that_are_no_numbers_are_named_before_the_first_step(
    tiny_tokenizer: Any, tmp_path: Path, engine: Any, name: str
) -> None:
    made = trainer(tiny_tokenizer, tmp_path, engine=engine)
    broken = next(key for key, _ in made.model.named_parameters() if name in key)
    with torch.no_grad():
        made.model.get_parameter(broken).view(-1)[3] = nan
    with pytest.raises(ModelError, match=rf"{broken} holds NaN or infinity"):
        made.train()
    assert made.state.global_step == 0


def test_a_collator_of_the_users_own_is_watched_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert "origin" not in rows[0]
        length = min(len(row["input_ids"]) for row in rows)
        batch = {key: torch.tensor([row[key][:length] for row in rows]) for key in ("input_ids", "labels")}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    made = trainer(tiny_tokenizer, tmp_path, 4, data_collator=collate, callbacks=[Poison(2)])
    with pytest.raises(NonfiniteStepError, match="step 2: the loss is not finite"):
        made.train()


def test_a_resumed_run_counts_on(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Skipped steps, the losses that spikes are measured against, and the mean of the next log."""
    settings = {"logging_steps": 4, "save_steps": 3}
    whole = trainer(tiny_tokenizer, tmp_path, 6, settings=settings, callbacks=[Poison(2)], nonfinite="skip")
    whole.train()
    resumed = trainer(tiny_tokenizer, tmp_path, 6, settings=settings, nonfinite="skip")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.monitor.counters() == whole.monitor.counters()
    assert resumed.monitor.skipped == 1
    logged = [[logs["loss"] for logs in made.state.log_history if "learning_rate" in logs] for made in (whole, resumed)]
    assert logged[0] == logged[1]


def test_an_evaluation_moves_no_buffer_that_graphs_read(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Held-out rows longer than every training row: their buffers are there before the first step."""
    longest = Dataset.from_dict({"input_ids": [list(range(200))], "labels": [list(range(200))]})
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    made = trainer(
        tiny_tokenizer, tmp_path, 3, settings=settings, eval_dataset={"long": longest, "short": supervised_rows(2)}
    )
    addresses: list[list[int]] = []

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = made.fused_step
            assert step is not None
            addresses.append([buffer.data_ptr() for buffer in step.workspace.buffers.values()])
            addresses[-1] += [step.staging.static.data_ptr(), step.positions]

    made.add_callback(Watching())
    made.train()
    evaluated = [logs for logs in made.state.log_history if "eval_long_loss" in logs]
    assert len(evaluated) == 3
    assert len(addresses[0]) > 5
    assert addresses[0] == addresses[1] == addresses[2]
