from __future__ import annotations

from typing import Any

import pytest

from parley.config import GenerationSection
from parley.inference.fan_in import FanIn, nth_seed
from parley.inference.scheduler import OutputChunk, QueueFull, Request

SETTINGS = GenerationSection()


class Handle:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Scheduled:
    """Takes `most` requests and keeps their callbacks."""

    def __init__(self, most: int = 9) -> None:
        self.most, self.handles, self.delivers = most, [], []  # type: ignore[var-annotated]

    def submit(self, request: Request, deliver: Any) -> Handle:
        if len(self.handles) == self.most:
            raise QueueFull("full")
        self.handles.append(Handle())
        self.delivers.append(deliver)
        return self.handles[-1]


def test_outputs_arrive_in_one_place_with_their_numbers_until_all_are_finished() -> None:
    scheduler, items = Scheduled(), []
    fan_in = FanIn(scheduler, [Request([1], SETTINGS)] * 3, items.append)  # type: ignore[arg-type]
    error, part, last = RuntimeError(), OutputChunk("a", ()), OutputChunk("b", (), "stop")
    scheduler.delivers[2](part)
    scheduler.delivers[0](last)
    scheduler.delivers[1](error)
    assert items == [(2, part), (0, last), (1, error)]
    left = []
    for item in items:
        assert fan_in.receive(item) == item
        left.append(fan_in.unfinished)
    assert left == [3, 2, 1]
    fan_in.cancel()
    assert all(handle.cancelled for handle in scheduler.handles)


def test_where_one_is_refused_those_before_it_are_cancelled() -> None:
    scheduler = Scheduled(most=2)
    with pytest.raises(QueueFull):
        FanIn(scheduler, [Request([1], SETTINGS)] * 3, print)  # type: ignore[arg-type]
    assert [handle.cancelled for handle in scheduler.handles] == [True, True]


def test_seeds_are_counted_up_and_none_stays_none() -> None:
    assert [nth_seed(GenerationSection(seed=5), index).seed for index in range(3)] == [5, 6, 7]
    assert nth_seed(SETTINGS, 3).seed is None
