"""Runs of several processes on the CPU, forked from the test's own so that nothing is imported twice."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from parley.config import RunConfig
from parley.errors import ParleyError
from parley.pipeline import train

LIMIT = 120.0  # seconds after which processes that did not end are killed, and their test fails


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _child(work: Callable[[], Any], rank: int, count: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)  # a forked process has none of the threads of OpenMP
    work()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the exit handlers of the test's own process


def in_processes(count: int, work: Callable[[], Any]) -> list[int | None]:
    """Call `work` in so many processes, each with its rank in the environment. Returns their exit codes."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=_child, args=(work, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and any([process.is_alive() for process in processes]):  # collects all that ended
        time.sleep(0.05)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {count} processes did not end"
    return [process.exitcode for process in processes]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"prompt": f"What be {n}?", "completion": "It be " + "arr " * (1 + n * 7 % 11) + f"{2 * n}."} for n in range(23)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def configured(
    tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """`configured("training.max_steps=4")`: settings of six steps of five conversations into a folder of its own."""
    folder, numbers = tmp_path_factory.mktemp("runs"), itertools.count()

    def create(*overrides: str) -> RunConfig:
        values: dict[str, Any] = {
            "model": {"name": str(tiny_llama_folder), "device": "cpu", "max_seq_length": 64},
            "data": {"source": str(rows), "heldout_rows": 3},
            "training": {
                "max_steps": 6, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 1,
                "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_steps": 2,
            },
            "report": {"from_heldout": 3, "max_new_tokens": 4},
            "output": str(folder / f"run-{next(numbers)}"),
        }  # fmt: skip
        return RunConfig.create(values, overrides)

    return create


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Callable[[RunConfig], str]:
    """`refusal(config)`: the errors that two processes print which train with `config`; both must refuse."""

    def work(config: RunConfig) -> None:
        try:
            train(config, Console(quiet=True))
        except ParleyError as error:
            print(error)
            raise

    def refused(config: RunConfig) -> str:
        codes = in_processes(2, lambda: work(config))
        assert 0 not in codes
        return capfd.readouterr().out

    return refused
