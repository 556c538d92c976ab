from typing import Any

import pytest

from parley.train_step.memory_plan import MemoryPlan
from parley.train_step.workspace import SAVED_BUFFERS, Workspace


@pytest.mark.parametrize(
    ("saved", "count"), [("all", 4), ("attention", 4), ("attention_offloaded", 2), ("layer_inputs", 1)]
)
def test_saved_buffers_exist_once_per_layer(bound: Any, saved: str, count: int) -> None:
    workspace = Workspace(bound, MemoryPlan(saved=saved, tokens=16, pad_multiple=8))
    workspace.reserve(16)
    taken = {workspace.take("attention_out", index, 16).data_ptr() for index in range(4)}
    assert len(taken) == count
    assert len({workspace.take("dh", index, 16).data_ptr() for index in range(4)}) == 1
    assert "x" in SAVED_BUFFERS[saved]


def test_passes_of_any_size_share_the_memory_and_only_growth_moves_it(bound: Any) -> None:
    workspace = Workspace(bound, MemoryPlan(tokens=20, pad_multiple=16))
    assert workspace.reserve(3)
    first = workspace.take("gate_up", 0, 3, 40)
    assert first.shape == (3, 40)
    assert not workspace.reserve(32)  # the plan's 20, rounded up
    assert workspace.take("gate_up", 0, 32).data_ptr() == first.data_ptr()
    assert workspace.reserve(33)


def test_a_chunked_mlp_takes_the_memory_of_a_chunk(bound: Any) -> None:
    whole, chunked = (
        Workspace(bound, MemoryPlan(saved="layer_inputs", tokens=64, pad_multiple=1, mlp_rows=rows)) for rows in (0, 16)
    )
    for workspace in (whole, chunked):
        workspace.reserve(64)
    assert chunked.buffers["act", 0].numel() * 4 == whole.buffers["act", 0].numel()
    assert chunked.buffers["qkv", 0].numel() == whole.buffers["qkv", 0].numel()
