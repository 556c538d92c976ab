"""The processes of a run: joining them, what they exchange, and how they end together.

Launchers (torchrun, accelerate, `parley train --gpus`) give each process its rank in the environment. Without one, a
run is a single process and every function here returns at once. Tensors on a GPU go through NCCL, those on the host
through gloo.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from parley.errors import ParleyError, RunError, TrainingError
from parley.training.peer_watch import PeerWatch

Value = TypeVar("Value")

# One process may answer or save for long while others wait; what died is noticed by PeerWatch, not by a timeout.
TIMEOUT = timedelta(days=2)
BUCKET_BYTES = 256 << 20  # of gradients that are copied together for one all-reduce

_watch: PeerWatch | None = None  # of the processes that `joined_processes` has joined


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def is_main_process() -> bool:
    """Whether this is the process that prints and writes the run folder."""
    return process_rank() == 0


def launched_count() -> int:
    """The number of processes that a launcher has started, as the environment says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined_processes() -> Iterator[None]:
    """Inside, the processes that a launcher started are one group. Alone, or within another such block: no effect.

    An error in one process ends all: the first process that has one raises it, the others end without a message.
    """
    global _watch
    if launched_count() == 1 or dist.is_initialized():
        yield
        return
    _join()
    _watch = PeerWatch(dist.get_rank(), dist.get_world_size(), from_main)
    try:
        yield
        dist.barrier()  # a process that ends earlier would count as lost
        _watch.stop()
        dist.barrier()
    except BaseException as error:  # also Ctrl-C: the others would wait in a collective for good
        _end_all(_watch, error)
        raise
    else:
        dist.destroy_process_group()
    finally:
        _watch = None


def _join() -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun without --rdzv-backend keeps its store over restarts, with the addresses of processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as error:  # torch's own kinds: no rank, no address, no answer
        raise RunError(f"the processes could not join: {error}") from None


def _end_all(watch: PeerWatch, error: BaseException) -> None:
    """Let the other processes end. Does not return where another process has said already why they all end."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        watch.stop()
        return
    if isinstance(error, TrainingError) and not watch.is_main:
        watch.wait_for_failure()  # every process has this error, and the main one saves what is worth keeping
    if not isinstance(error, ParleyError) and (lost := watch.lost_peer(wait=True)) is not None:
        watch.end_because_of(lost)
    first = watch.is_first_failure()
    if first and threading.current_thread() is threading.main_thread():
        # A launcher that sees another process end sends SIGTERM to this one, before its error is printed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch.stop()
    watch.outlive_peers()
    if not first:
        sys.stdout.flush()
        os._exit(1)


def peer_failed() -> bool:
    """Whether another process has ended in an error, or is gone."""
    return _watch is not None and _watch.peer_failed()


def on_sudden_end(clean_up: Callable[[], None]) -> None:
    """Call `clean_up` before this process is ended because another one failed."""
    if _watch is not None:
        _watch.clean_ups.append(clean_up)


# ---- What processes exchange ----


def from_main(value: Value) -> Value:
    """The main process's `value`, in every process."""
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Value) -> list[Value]:
    """The `value` of each process, by rank."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def largest(*numbers: int) -> list[int]:
    """The largest of each number over all processes; waits for them, not for their devices."""
    if process_count() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(number) for number in tensor]


def group_of(size: int) -> tuple[int, dist.ProcessGroup | None]:
    """This process's rank in its group of `size` consecutive ones, and the group; None where that is all of them.

    Every process calls this, and their number is a multiple of `size`.
    """
    count, rank = process_count(), process_rank()
    if size == count:
        return rank, None
    groups = [dist.new_group(list(range(i, i + size)), timeout=TIMEOUT) for i in range(0, count, size)]
    return rank % size, groups[rank // size]


def sum_in_place(tensor: Tensor) -> None:
    """Replace a contiguous tensor by its sum over all processes. Every process gets the same bits."""
    if process_count() > 1:
        dist.all_reduce(tensor)


@torch.no_grad()
def sum_all_in_place(tensors: Sequence[Tensor]) -> None:
    """`sum_in_place` of many tensors, copied together into buckets of one type."""
    if process_count() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def copy_from_main(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the main process."""
    if process_count() == 1:
        return
    for tensor in tensors:
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        tensor.copy_(whole)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
