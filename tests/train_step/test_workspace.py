from typing import Any

import pytest

from parley.train_step.memory_plan import Plan
from parley.train_step.workspace import KEEP, Workspace


@pytest.mark.parametrize(("keep", "places"), [("everything", 4), ("attention", 4), ("offloaded", 2), ("inputs", 1)])
def test_what_is_kept_has_a_place_for_each_layer(bound: Any, keep: str, places: int) -> None:
    workspace = Workspace(bound, Plan(keep=keep, tokens=16, granule=8))
    workspace.reserve(16)
    taken = {workspace.take("attended", index, 16).data_ptr() for index in range(4)}
    assert len(taken) == places
    assert len({workspace.take("dh", index, 16).data_ptr() for index in range(4)}) == 1
    assert "x" in KEEP[keep]


def test_passes_of_any_size_share_the_memory_and_only_growth_moves_it(bound: Any) -> None:
    workspace = Workspace(bound, Plan(tokens=20, granule=16))
    assert workspace.reserve(3)
    first = workspace.take("gate_up", 0, 3, 40)
    assert first.shape == (3, 40)
    assert not workspace.reserve(32)  # the plan's 20, rounded up
    assert workspace.take("gate_up", 0, 32).data_ptr() == first.data_ptr()
    assert workspace.reserve(33)


def test_a_sliced_feed_forward_takes_the_memory_of_a_slice(bound: Any) -> None:
    whole, sliced = (Workspace(bound, Plan(keep="inputs", tokens=64, granule=1, feed_rows=rows)) for rows in (0, 16))
    for workspace in (whole, sliced):
        workspace.reserve(64)
    assert sliced.buffers["act", 0].numel() * 4 == whole.buffers["act", 0].numel()
    assert sliced.buffers["qkv", 0].numel() == whole.buffers["qkv", 0].numel()
