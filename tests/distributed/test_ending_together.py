"""One process that fails, is killed or gets a signal ends all of them, and nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.conftest import in_processes, rank
from tests.distributed.test_data_parallel import QUIET, assert_same_run

from parley.cli.main import main
from parley.config import RunConfig
from parley.errors import DeviceError
from parley.pipeline import train
from parley.training.callbacks import EventLog
from parley.training.peer_watch import PeerWatch

AT_STEP = 3


@pytest.fixture(scope="module")
def whole(configured: Callable[..., RunConfig]) -> Path:
    """The undisturbed run of two processes."""
    config = configured()
    assert in_processes(2, lambda: train(config, QUIET)) == [0, 0]
    return config.output


def disturbed(config: RunConfig, who: int, act: Callable[[], None]) -> Callable[[], Any]:
    """Training as `parley train` does it, in which the process of rank `who` acts within step three."""

    def on_optimizer_step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if rank() == who and state.global_step == AT_STEP - 1:
            act()

    def work() -> None:
        EventLog.on_optimizer_step = on_optimizer_step  # in the forked process alone
        config.output.parent.mkdir(exist_ok=True)
        settings = config.output.with_suffix(".yaml")
        if rank() == 0:
            settings.write_text(config.to_yaml())
        while not settings.is_file() or not settings.read_text().strip():
            pass
        main(["train", str(settings)])

    return work


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_message_alone(
    configured: Callable[..., RunConfig], who: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DeviceError("the card is on fire")

    codes = in_processes(2, disturbed(configured(), who, fail))
    assert codes[who] == DeviceError.exit_code
    assert codes[1 - who] == 1
    printed = capfd.readouterr().err
    assert [line for line in printed.splitlines() if "error" in line.lower()] == [
        f"parley: error: rank {who}: the card is on fire"
    ]


def test_an_error_is_printed_although_the_launcher_ends_its_process(
    configured: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun sends SIGTERM to all processes once one has ended, which may be another than the first that failed."""

    def fail() -> None:
        PeerWatch.outlive_peers = lambda watch: signal.raise_signal(signal.SIGTERM)  # in the forked process alone
        raise DeviceError("the card is on fire")

    assert in_processes(2, disturbed(configured(), 0, fail))[0] == DeviceError.exit_code
    assert "parley: error: rank 0: the card is on fire" in capfd.readouterr().err


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_ends_all_and_the_run_resumes_exactly(
    configured: Callable[..., RunConfig], whole: Path, who: int, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured()
    codes = in_processes(2, disturbed(config, who, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert codes[who] == -signal.SIGKILL
    assert codes[1 - who] == 1
    printed = capfd.readouterr().err
    if who == 1:
        assert "parley: error: rank 0: rank 1 (process " in printed
    assert "Traceback" not in printed
    assert in_processes(2, lambda: train(resume=config.output, console=QUIET)) == [0, 0]
    assert_same_run(config.output, whole, bound=1e-9)


def test_a_signal_to_one_process_stops_all_after_the_same_step_with_one_checkpoint(
    configured: Callable[..., RunConfig], whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured()
    codes = in_processes(2, disturbed(config, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert codes == [128 + signal.SIGTERM] * 2
    printed = capfd.readouterr().err
    assert printed.count("parley: stopped; step 3 is saved; to continue: parley train --resume") == 1
    assert {path.name for path in (config.output / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert in_processes(2, lambda: train(resume=config.output, console=QUIET)) == [0, 0]
    assert_same_run(config.output, whole, bound=1e-9)


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(
    configured: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured("data.source=nowhere.jsonl")
    codes = in_processes(2, disturbed(config, 0, lambda: None))
    assert sorted(codes) == [1, 1] or sorted(codes) == [1, 2]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("parley: error")]
    assert len(errors) == 1
    assert "nowhere.jsonl" in errors[0]
    assert not config.output.exists()
