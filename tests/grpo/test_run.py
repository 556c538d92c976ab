"""`parley train --method grpo`: a run end to end, exact when resumed, and refused in one line where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parley.config import RunConfig
from parley.errors import DataError, RewardError, UsageError
from parley.pipeline import dry_run, train
from parley.training.run_folder import RunFolder

REWARDS = """
import random

def short(completions, answer, **kwargs):
    return [-len(completion[0]["content"]) + len(wanted) / 100 for completion, wanted in zip(completions, answer)]

def broken(completions, **kwargs):
    raise KeyError("no such thing")
"""
QUIET = Console(quiet=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {index} plus 2?", "answer": str(index + 2)} for index in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def settings(folder: Path, output: str = "run", **training: Any) -> RunConfig:
    values = {
        "method": "grpo", "rewards": [f"{folder}/rewards.py:short"], "max_steps": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "num_generations": 4, "max_completion_length": 8, "learning_rate": 1e-3,
        "save_steps": 2, **training,
    }  # fmt: skip
    return RunConfig.create(
        {
            "model": "parley-demo",
            "data": {"source": str(folder / "rows.jsonl"), "heldout_rows": 2},
            "output": str(folder / output),
            "training": values,
            "report": {"from_heldout": 1, "max_new_tokens": 4},
        }
    )


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(folder).events.read_text().splitlines()]


def test_a_run_logs_rewards_and_samples_and_reports_both(folder: Path) -> None:
    result = train(settings(folder, eval_steps=2), QUIET)
    found = events(folder / "run")
    steps = [event for event in found if event["event"] == "step"]
    assert len(steps) == 4
    for name in ("reward", "rewards/short/mean", "completions/mean_length", "entropy", "tokens_per_s", "step_time"):
        assert all(name in step for step in steps), name
    samples = [event for event in found if event["event"] == "completions"]
    assert len(samples) == 4
    assert samples[0]["samples"][0].keys() == {"prompt", "completion", "reward", "advantage"}
    assert samples[0]["samples"][0]["prompt"].startswith("What is ")
    evaluated = [event for event in found if event["event"] == "eval"]
    assert all("eval_reward" in event for event in evaluated)
    report = result.report
    assert report.before is not None
    assert report.before.reward is not None
    assert report.after is not None
    assert report.after.heldout_loss is None
    assert report.samples
    assert report.steps[0].reward == steps[0]["reward"]
    page = (folder / "run" / "report.html").read_text()
    assert "Sampled answers" in page
    assert "mean of a step&#39;s answers" in page


@pytest.mark.parametrize("option", [{}, {"steps_per_generation": 3, "num_iterations": 2}])
def test_a_resumed_run_is_the_undisturbed_one(folder: Path, option: dict[str, Any]) -> None:
    """Also in the middle of a generation's steps."""
    # The embedded model is sure of its answers: at temperature 1 a group's are equal, and nothing is learned.
    options = {"lr_scheduler_type": "constant", "temperature": 3.0, **option}
    whole = train(settings(folder, "whole", max_steps=6, **options), QUIET)
    train(settings(folder, "part", max_steps=4, **options), QUIET)
    resumed = train(settings(folder, "part", max_steps=6, **options), QUIET, resume=folder / "part")
    names = ("step", "loss", "grad_norm", "reward", "completion_tokens")
    ours, expected = ([[getattr(row, name) for name in names] for row in run.report.steps] for run in (resumed, whole))
    assert ours == expected
    assert all(row.grad_norm for row in whole.report.steps)


def test_a_folders_rewards_are_not_run(folder: Path) -> None:
    """A folder from elsewhere is data: resuming it runs only what the command names."""
    train(settings(folder), QUIET)
    mark = folder / "executed"
    (folder / "rewards.py").write_text(f"open({str(mark)!r}, 'w').close()\n{REWARDS}")
    assert RunFolder(folder / "run").config.training.rewards == []
    config = RunFolder(folder / "run").config
    config.training.max_steps = 5
    with pytest.raises(UsageError, match=r"--reward file\.py:function"):
        train(config, QUIET, resume=folder / "run")
    assert not mark.exists()
    config.training.rewards = [f"{folder}/rewards.py:short"]
    train(config, QUIET, resume=folder / "run")
    assert mark.exists()


def test_the_command_to_continue_names_the_rewards(folder: Path) -> None:
    run = RunFolder.create(settings(folder))
    assert run.resume_command == f"parley train --resume {folder}/run --reward {folder}/rewards.py:short"
    run.unlock()
    config = settings(folder, "other", rewards=["parley.rewards:equals"])
    run = RunFolder.create(config)
    assert run.resume_command == f"parley train --resume {folder}/other"
    assert run.config.training.rewards == ["parley.rewards:equals"]
    run.unlock()


def test_a_reward_that_fails_ends_the_run_in_one_line(folder: Path) -> None:
    with pytest.raises(RewardError) as error:
        train(settings(folder, rewards=[f"{folder}/rewards.py:broken"]), QUIET)
    assert "reward broken: KeyError: 'no such thing' (rewards.py, line 8)" in str(error.value)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"rewards": []}, "training.rewards: grpo learns from rewards, and there are none"),
    ({"rewards": ["rewards"]}, "training.rewards: got 'rewards'; wanted module:function or path/to/file.py:function"),
    ({"rewards": ["none.py:f"]}, "training.rewards: none.py: no such file"),
    ({"rewards": ["no_such_module:f"]}, "no module 'no_such_module' can be imported"),
    (
        {"rewards": ["parley.rewards:f"]},
        "parley.rewards has no function 'f'; it has ends_with, equals, last_number",
    ),
    ({"use_vllm": True}, "training.use_vllm is not followed: answers are sampled by Parley's own decoder"),
    ({"vllm_mode": "server"}, "training.vllm_mode is not followed"),
    ({"use_transformers_continuous_batching": True}, "training.use_transformers_continuous_batching is not followed"),
    ({"sync_ref_model": True}, "training.sync_ref_model is not followed"),
    ({"ref_model_mixup_alpha": 0.5}, "training.ref_model_mixup_alpha is not followed"),
    ({"cache_implementation": "static"}, "training.cache_implementation is not followed"),
    ({"cast_lm_head_to_fp32": True}, "training.cast_lm_head_to_fp32 is not followed"),
    ({"generation_kwargs": {"num_beams": 2}}, "training.generation_kwargs: 'num_beams' is not followed"),
    ({"temperature": 0}, "training.temperature: got 0"),
    ({"top_p": 2.0}, "training.top_p: got 2.0"),
    ({"num_generations": 3}, "must be divisible by num_generations"),
    ({"num_generations": 1}, "training.num_generations: got 1; wanted a number from 2"),
    ({"max_completion_length": 9999}, "training.max_completion_length: got 9999; wanted less than"),
    ({"chat_template_kwargs": {}}, "training.chat_template_kwargs is decided by the run; set data.template"),
    ({"early_stopping": {}, "eval_steps": 1}, "training.early_stopping follows held-out loss"),
    ({"keep": "best", "eval_steps": 1}, "training.keep follows held-out loss"),
    ({"betta": 1}, "did you mean 'beta'?"),
    ({"simpo_gamma": 1}, "simpo_gamma"),
    ({"loss_type": "nll"}, "training.loss_type: got 'nll'; wanted one of dapo"),
]


@pytest.mark.parametrize(("training", "message"), REFUSALS)
def test_what_a_run_cannot_follow_is_refused(folder: Path, training: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        dry_run(settings(folder, **training), QUIET)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rewards_are_grpos(folder: Path) -> None:
    with pytest.raises(UsageError, match="rewards are read by method: grpo, and this is method: dpo"):
        settings(folder, method="dpo")


def test_too_few_prompts_for_a_generation_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="22 prompts to train on, fewer than the 32 of one generation"):
        dry_run(settings(folder, per_device_train_batch_size=64, gradient_accumulation_steps=2), QUIET)
