"""`parley train --method`: each method runs end to end, and refuses in one line what it does not follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parley.config import RunConfig
from parley.errors import DataError, UsageError
from parley.pipeline import dry_run, train
from parley.training.plan.run_plan import plan
from parley.training.run_folder import RunFolder


def pairs_file(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {"instruction": f"Is {index} odd?", "chosen": "Arr, it be odd!", "rejected": "I do not know, sorry."}
        for index in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, method: str, **training: Any) -> RunConfig:
    return RunConfig.create(
        {
            "model": "parley-demo",
            "data": {"source": str(pairs_file(folder)), "heldout_rows": 2},
            "output": str(folder / "run"),
            "training": {
                "method": method, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                "eval_steps": 2, "learning_rate": 1e-3, "save_steps": 100, **training,
            },
            "report": {"from_heldout": 1, "max_new_tokens": 4},
        }
    )  # fmt: skip


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_a_method_trains_and_logs_its_rewards(method: str, tmp_path: Path) -> None:
    result = train(settings(tmp_path, method), Console(quiet=True))
    events = [json.loads(line) for line in RunFolder(tmp_path / "run").events.read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 2
    for name in ("rewards/accuracies", "rewards/margins", "loss"):
        assert all(name in step for step in steps if method != "kto" or name != "rewards/margins")
    evaluated = [event for event in events if event["event"] == "eval"]
    assert all("eval_rewards/accuracies" in event for event in evaluated)
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert result.report.after is not None
    assert result.report.after.preference_accuracy is not None


@pytest.mark.parametrize(
    ("method", "training", "message"),
    [
        ("orpo", {"loss_type": "ipo"}, "training.loss_type is not read by method: orpo; leave it out"),
        ("dpo", {"simpo_gamma": 1}, "training.simpo_gamma is not read by method: dpo"),
        ("dpo", {"betta": 1}, "did you mean 'beta'?"),
        ("dpo", {"loss_type": "best"}, "loss_type"),
        ("dpo", {"use_weighting": True}, "use_weighting is not supported on the packed step"),
        ("dpo", {"sync_ref_model": True}, "sync_ref_model is not supported on the packed step"),
        ("dpo", {"beta": "much"}, "training.beta: got 'much'"),
        ("kto", {"per_device_train_batch_size": 1}, "training.per_device_train_batch_size: got 1; kto"),
    ],
)
def test_a_setting_that_no_loss_reads_is_refused(
    method: str, training: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        dry_run(settings(tmp_path, method, **training), Console(quiet=True))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_resumed_run_is_the_undisturbed_one(method: str, tmp_path: Path) -> None:
    """Over the end of an epoch, whose order has to be found again; references are measured anew."""
    options = {"lr_scheduler_type": "constant", "save_steps": 2, "eval_steps": 100}
    runs = []
    for name, steps in (("whole", (14,)), ("part", (11, 14))):
        (tmp_path / name).mkdir()
        for count in steps:
            config = settings(tmp_path / name, method, **options | {"max_steps": count})
            config.data.source = str(pairs_file(tmp_path))
            resume = tmp_path / name / "run" if count != steps[0] else None
            result = train(config, Console(quiet=True), resume=resume)
        runs.append([(row.step, row.loss, row.grad_norm) for row in result.report.steps])
    assert runs[0] == runs[1]
    assert len(runs[0]) == 14


def test_a_method_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training\.method: got 'ppo'"):
        settings(tmp_path, "ppo")


def test_pairs_are_refused_by_supervised_fine_tuning(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"training\.method: dpo"):
        dry_run(
            RunConfig.create(
                {"model": "parley-demo", "data": str(pairs_file(tmp_path)), "output": str(tmp_path / "r")}
            ),
            Console(quiet=True),
        )


def test_the_learning_rate_is_lower_where_none_is_set() -> None:
    assert RunConfig.create({"training": {"method": "dpo"}}).training.learning_rate == 2e-5
    assert RunConfig.create({"training": {"method": "sft"}}).training.learning_rate == 2e-4
    assert RunConfig.create({"training": {"method": "dpo", "learning_rate": 0.1}}).training.learning_rate == 0.1


def test_a_plan_and_an_evaluation_refuse_what_they_do_not_count(tmp_path: Path) -> None:
    config = settings(tmp_path, "dpo")
    with pytest.raises(UsageError, match=r"parley plan counts supervised steps"):
        plan(config)
