"""The studio's own process: calls in order, errors as they are, ended when idle, when killed, with its parent."""

from __future__ import annotations

import asyncio
import operator
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parley.config import RunConfig
from parley.errors import DeviceError, UsageError
from parley.studio.worker import Worker


def test_calls_errors_and_death() -> None:
    async def calls() -> None:
        worker = Worker(prepare=int)  # which imports no library
        first = await worker.call(os.getpid)
        assert await asyncio.gather(*(worker.call(operator.mul, 2, value) for value in range(3))) == [0, 2, 4]
        assert await worker.call(os.getpid) == first != os.getpid()
        with pytest.raises(UsageError, match=r"^training\.seed: got -1; Input should be greater than or equal to 0$"):
            await worker.call(RunConfig.create, {"training": {"seed": -1}})
        with pytest.raises(DeviceError, match="lack of memory"):
            await worker.call(os.abort)
        assert await worker.call(operator.mul, 2, 4) == 8
        worker.close()
        assert not worker.is_running

    asyncio.run(calls())


def test_an_idle_process_ends() -> None:
    async def calls() -> None:
        worker = Worker(idle_seconds=0, prepare=int)
        process = psutil.Process(await worker.call(os.getpid))
        assert worker.is_running
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert not worker.is_running
        await asyncio.to_thread(process.wait, 30)

    asyncio.run(calls())


def test_a_call_that_nobody_waits_for_is_abandoned() -> None:
    async def calls() -> None:
        worker = Worker(prepare=int)
        worker.abandon()
        process = psutil.Process(await worker.call(os.getpid))
        worker.abandon()  # nothing runs: the process is kept
        assert worker.is_running
        slow, waiting = (asyncio.ensure_future(worker.call(time.sleep, 600)) for _ in range(2))
        await asyncio.sleep(0.05)
        worker.abandon()
        assert await worker.call(operator.mul, 2, 4) == 8, "a call waited for one that was abandoned"
        for call in (slow, waiting):
            with pytest.raises(UsageError, match="another data set was chosen"):
                await call
        await asyncio.to_thread(process.wait, 30)
        assert worker.is_running
        worker.close()

    asyncio.run(calls())


def test_a_call_is_abandoned_while_its_process_starts() -> None:
    async def calls() -> None:
        worker = Worker(prepare=int)
        slow = asyncio.ensure_future(worker.call(time.sleep, 90))
        await asyncio.sleep(0.05)  # the pool has handed it over; Python itself takes longer to start
        worker.abandon()
        await asyncio.wait({slow}, timeout=40)
        assert slow.done(), "the abandoned call runs on"
        with pytest.raises(UsageError, match="another data set was chosen"):
            slow.result()

    asyncio.run(calls())


def test_it_ends_with_a_studio_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "studio_of_a_test.py"
    script.write_text(
        "import asyncio, os, time\n"
        "from parley.studio.worker import Worker\n"
        "async def main():\n"
        "    print(await Worker(prepare=int).call(os.getpid), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    studio = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert studio.stdout is not None
    child = psutil.Process(int(studio.stdout.readline()))
    studio.kill()
    studio.wait()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
