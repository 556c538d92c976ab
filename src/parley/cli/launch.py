"""`parley train --gpus N`: one command for several processes of one machine, through torch's elastic launcher.

`torchrun` and `accelerate launch` start the same processes: `torchrun --nproc-per-node 2 -m parley train run.yaml`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from typing import TYPE_CHECKING, NoReturn

import psutil

from parley.errors import UsageError

if TYPE_CHECKING:
    from parley.config import RunConfig

# Of processes that were asked to stop: they finish a step and write a checkpoint. A failed one ends the others itself.
SHUTDOWN_SECONDS = 3600


def gpu_processes(gpus: str, config: RunConfig) -> int:
    """The number of GPUs that `--gpus` asks for. Raises UsageError where they are not there, or not wanted."""
    _check_not_launched("--gpus")
    if config.model.device == "cpu":
        raise UsageError("--gpus and model.device: cpu contradict each other; --processes N trains on the CPU")
    if gpus != "all" and not (gpus.isdecimal() and int(gpus) > 0):
        raise UsageError(f"--gpus {gpus}: wanted a number of GPUs, or all")
    import torch

    there = torch.cuda.device_count()
    if there == 0:
        raise UsageError(f"--gpus {gpus}: this machine has no usable GPU; --processes N trains on the CPU")
    count = there if gpus == "all" else int(gpus)
    if count > there:
        raise UsageError(f"--gpus {gpus}: this machine has {there}; more machines are joined by torchrun")
    return count


def cpu_processes(count: int, config: RunConfig) -> int:
    """`count`, where the run is one on the CPU. Raises UsageError elsewhere."""
    _check_not_launched("--processes")
    if config.model.device != "cpu":
        import torch

        if config.model.device == "cuda" or torch.cuda.is_available():
            raise UsageError("--processes trains on the CPU: set model.device: cpu too, or use --gpus N")
    return count


def _check_not_launched(option: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{option}: a launcher has started the processes already; leave it out")


def is_restart() -> bool:
    """Whether an elastic launcher (torchrun --max-restarts) has started the processes again, after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch(count: int, arguments: list[str]) -> None:
    """Run `parley` with `arguments` in `count` processes until all have ended. Exits with the code of one that failed.

    A signal that ends this process is passed on to all of them, which finish their step and save it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes say themselves what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for name in ("agent", "multiprocessing", "launcher", "rendezvous"):
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "parley", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(next((code for code in codes if code > 0), 1))
    except SignalException as stop:
        _end_now(stop.sigval)


def _end_now(number: signal.Signals) -> NoReturn:
    """Exit as a shell reports that signal; processes that are still there were interrupted a second time."""
    for child in psutil.Process().children():
        child.send_signal(number)
    sys.exit(128 + number)
