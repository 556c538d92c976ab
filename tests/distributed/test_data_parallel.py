"""Runs of several processes learn what a run of one learns, on every path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.distributed.conftest import in_processes, rank

from parley.config import RunConfig
from parley.models.adapters import attach_lora
from parley.pipeline import train
from parley.training import prepare_training
from parley.training.resume_state import ResumeState, differences_in_rounding, this_device
from parley.training.run_folder import RunFolder
from parley.versions import library_versions

QUIET = Console(quiet=True)
FIGURES = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens", "learning_rate", "epoch")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def weights(folder: Path) -> torch.Tensor:
    return weights_in(RunFolder(folder).weights)


def weights_in(folder: Path) -> torch.Tensor:
    """All tensors of the safetensors file in `folder`, flat."""
    [file] = folder.glob("*model.safetensors")
    tensors = load_file(file)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_same_run(ours: Path, theirs: Path, *, bound: float = 1e-5) -> None:
    """Losses, other figures, held-out losses and weights within `bound`; the same answers."""
    for kind, figures in (("step", FIGURES), ("eval", ("eval_loss", "eval_supervised_tokens"))):
        pairs = list(zip(events(ours, kind), events(theirs, kind), strict=True))
        assert pairs
        for mine, other in pairs:
            assert mine["step"] == other["step"]
            for figure in figures:
                assert mine[figure] == pytest.approx(other[figure], rel=bound, abs=1e-7), (kind, mine["step"], figure)
    mine, other = weights(ours), weights(theirs)
    assert float((mine - other).norm() / other.norm()) < bound
    reports = [json.loads((folder / "report.json").read_text()) for folder in (ours, theirs)]
    assert reports[0]["answers"] == reports[1]["answers"]


@pytest.fixture(scope="module")
def single(configured: Callable[..., RunConfig]) -> Path:
    """The run of one process on the fused step."""
    config = configured()
    train(config, QUIET)
    return config.output


def perturbed(*args: Any, **kwargs: Any) -> Any:
    """An adapter that does not begin as that of the first process, which is the one that counts."""
    model = attach_lora(*args, **kwargs)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.add_(0.1)
    return model


@pytest.mark.parametrize("count", [2, 4])
def test_the_fused_step_in_several_processes(
    configured: Callable[..., RunConfig], single: Path, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured()

    def work() -> None:
        if rank() == count - 1:
            prepare_training.attach_lora = perturbed  # in the forked process alone
        train(config, Console(width=200))

    assert in_processes(count, work) == [0] * count
    assert_same_run(config.output, single)
    ours, theirs = (
        json.loads((folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
        for folder in (config.output, single)
    )
    assert ours["total_flos"] == pytest.approx(theirs["total_flos"], rel=1e-6) != 0  # each counts its share
    printed = capfd.readouterr().out
    assert printed.count("step 6/6") == 1  # one process prints
    assert f"{count} processes: the 5 conversations of each step are dealt out by their tokens" in printed
    assert "fused step: " in (config.output / "report.html").read_text() or "plain path" not in printed
    assert not list(config.output.glob("run.lock"))


def test_a_checkpoint_of_two_processes_is_resumed_by_four_and_by_one(
    configured: Callable[..., RunConfig], single: Path
) -> None:
    for count in (4, 1):
        config = configured("training.max_steps=3", "training.save_steps=3")
        assert in_processes(2, lambda config=config: train(config, QUIET)) == [0, 0]
        longer = RunFolder(config.output).config
        longer.training.max_steps, longer.training.save_steps = 6, 2
        work = lambda config=longer: train(config, Console(width=200), resume=config.output)  # noqa: E731
        assert in_processes(count, work) == [0] * count
        steps, wanted = events(config.output, "step"), events(single, "step")
        assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in wanted], rel=1e-5)
        mine, other = weights(config.output), weights(single)
        assert float((mine - other).norm() / other.norm()) < 1e-5


def test_another_number_of_processes_is_named_as_a_difference_in_rounding() -> None:
    device = this_device(torch.device("cpu"))
    state = ResumeState(1, {}, {}, library_versions(), device | {"processes": 2})
    assert differences_in_rounding(state, torch.device("cpu")) == ["processes 2 (now 1)"]


@pytest.mark.parametrize(
    "settings",
    [
        ("training.engine=captured",),
        ("training.engine=plain",),
        ("training.engine=captured", "lora=null", "training.learning_rate=0.001"),
    ],
    ids=["captured", "plain", "all weights"],
)
def test_other_paths_in_several_processes(configured: Callable[..., RunConfig], settings: tuple[str, ...]) -> None:
    alone, together = configured(*settings), configured(*settings)
    train(alone, QUIET)
    assert in_processes(3, lambda: train(together, QUIET)) == [0] * 3
    assert_same_run(together.output, alone.output)
