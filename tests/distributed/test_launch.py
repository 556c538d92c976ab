"""`parley train --processes`, torchrun on two machines, and what the options refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist
from rich.console import Console
from tests.distributed.conftest import free_port, in_processes
from tests.distributed.test_data_parallel import assert_same_run, events

from parley.cli import launch
from parley.cli.main import main
from parley.config import RunConfig
from parley.errors import UsageError
from parley.pipeline import train
from parley.training.processes import from_all, joined_processes, process_rank


def written(config: RunConfig) -> str:
    path = config.output.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    return str(path)


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_with_one_checkpoint(configured: Callable[..., RunConfig]) -> None:
    config = configured("training.max_steps=100000", "training.save_steps=100000")
    command = started("-m", "parley", "train", written(config), "--processes", "2")
    end = time.monotonic() + 150
    while time.monotonic() < end and command.poll() is None:
        if (config.output / "events.jsonl").is_file() and events(config.output, "step"):
            break
        time.sleep(0.1)
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=100)
    assert command.returncode == 128 + signal.SIGINT, errors
    last = events(config.output, "step")[-1]["step"]
    assert f"parley: stopped; step {last} is saved; to continue: parley train --resume {config.output}" in errors
    assert errors.count("SIGINT received") == 1
    assert "Traceback" not in errors
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == [f"checkpoint-{last}"]


@pytest.mark.slow
# With --cpu, accelerate starts several processes through MPI alone; --multi_gpu is its way to torch's launcher.
def test_accelerate_launch_starts_the_same_processes(configured: Callable[..., RunConfig]) -> None:
    alone, together = configured("training.max_steps=2"), configured("training.max_steps=2")
    train(alone, Console(quiet=True))
    accelerate = [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}", "-m", "parley", "train",
        written(together),
    ]  # fmt: skip
    command = started(*accelerate)
    printed, errors = command.communicate(timeout=150)
    assert command.returncode == 0, errors
    assert printed.count("step 2/2") == 1
    assert "2 processes: the 5 conversations of each step are dealt out" in " ".join(printed.split())
    assert_same_run(together.output, alone.output)


def test_scale_batch_keeps_the_batch_settings_for_each_process(configured: Callable[..., RunConfig]) -> None:
    alone = configured("training.max_steps=2", "training.gradient_accumulation_steps=2")
    train(alone, Console(quiet=True))
    together = configured("training.max_steps=2")
    assert in_processes(2, lambda: main(["train", written(together), "--scale-batch"])) == [0, 0]
    assert_same_run(together.output, alone.output)


def test_restarted_processes_do_not_meet_those_that_are_gone() -> None:
    """torchrun without --rdzv-backend keeps its store over restarts."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def work(attempt: int) -> None:
        os.environ |= {
            "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }  # fmt: skip
        with joined_processes():
            assert from_all(process_rank()) == [0, 1]

    for attempt in range(2):
        assert in_processes(2, lambda attempt=attempt: work(attempt)) == [0, 0]


@pytest.mark.slow
def test_two_launchers_as_two_machines(configured: Callable[..., RunConfig]) -> None:
    alone, together = configured("training.max_steps=2"), configured("training.max_steps=2")
    train(alone, Console(quiet=True))
    torchrun = [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}", "-m", "parley", "train", written(together),
    ]  # fmt: skip
    machines = [started(*torchrun) for _ in range(2)]
    outputs = [machine.communicate(timeout=150) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sum("step 2/2" in printed for printed, _ in outputs) == 1
    assert_same_run(together.output, alone.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "--gpus and model.device: cpu contradict each other"),
        (["--processes", "2", "--dry-run"], "leave --gpus and --processes out"),
        (["--gpus", "two", "--set", "model.device=auto"], "wanted a number of GPUs, or all"),
        (["--processes", "2", "--set", "model.device=cuda"], "set model.device: cpu too, or use --gpus N"),
    ],
)
def test_refused_options(
    configured: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", written(configured()), *arguments])
    assert exit_.value.code == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.create({})
    for there, message in ((0, "has no usable GPU"), (2, "has 2; more machines are joined by torchrun")):
        monkeypatch.setattr("torch.cuda.device_count", lambda there=there: there)
        with pytest.raises(UsageError, match=message):
            launch.gpu_processes("3", config)
    assert launch.gpu_processes("all", config) == 2
    assert launch.gpu_processes("2", config) == 2


def test_processes_that_were_launched_are_not_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a launcher has started the processes already"):
        launch.cpu_processes(2, RunConfig.create({"model": {"device": "cpu"}}))


def test_the_launched_command_has_every_option(
    monkeypatch: pytest.MonkeyPatch, configured: Callable[..., RunConfig]
) -> None:
    launched: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(launch, "launch", lambda count, arguments: launched.append((count, arguments)))
    settings = written(configured())
    options = ["--set=training.max_steps=3", "--scale-batch"]
    with pytest.raises(SystemExit):
        main(["train", settings, *options, "--model", "parley-demo", "--output", "there", "--processes", "3"])
    [(count, arguments)] = launched
    assert count == 3
    assert arguments[:2] == ["train", settings]
    assert sorted(arguments[2:]) == sorted([*options, "--model=parley-demo", "--output=there"])
