"""Updates of a step that is not finite change nothing, whichever optimizer makes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from parley.train_step.masked_update import Copies, MaskedUpdate
from parley.train_step.optimizer import AdamW8bit

SIZE = 8192  # bitsandbytes keeps the moments of less than 4,096 weights in 32 bits
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "fused": (torch.optim.AdamW, {"fused": True}),
    "for-each": (torch.optim.AdamW, {"foreach": True}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "8-bit": (AdamW8bit, {}),
}


def made(name: str) -> tuple[torch.nn.Parameter, Any]:
    optimizer_class, options = OPTIMIZERS[name]
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, SIZE))
    return parameter, type("Masked", (MaskedUpdate, optimizer_class), {})([parameter], lr=0.1, **options)


def step(parameter: torch.nn.Parameter, optimizer: Any, gradient: float, finite: bool | None) -> None:
    parameter.grad = torch.linspace(-1, 2, SIZE) * gradient
    optimizer.finite = None if finite is None else torch.tensor(finite)
    optimizer.step()
    if finite is False:
        optimizer.forget_steps(1)


def tensors(parameter: torch.nn.Parameter, optimizer: Any) -> list[Any]:
    return [parameter.detach().clone(), copy.deepcopy(dict(optimizer.state[parameter]))]


def assert_equal(one: list[Any], other: list[Any]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        same = torch.equal(value, other[1][name]) if isinstance(value, torch.Tensor) else value == other[1][name]
        assert same, name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poisoned", [float("nan"), float("inf")])
def test_a_masked_step_is_as_if_it_had_not_been(name: str, poisoned: float) -> None:
    (parameter, optimizer), (wanted, plain) = made(name), made(name)
    for gradient in (1.0, -0.5):
        step(parameter, optimizer, gradient, True)
        step(wanted, plain, gradient, None)
    before = tensors(parameter, optimizer)
    assert_equal(before, tensors(wanted, plain))
    step(parameter, optimizer, poisoned, False)
    assert_equal(tensors(parameter, optimizer), before)
    step(parameter, optimizer, 0.25, True)
    step(wanted, plain, 0.25, None)
    assert_equal(tensors(parameter, optimizer), tensors(wanted, plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_masked_first_step_leaves_no_state(name: str) -> None:
    parameter, optimizer = made(name)
    before = parameter.detach().clone()
    step(parameter, optimizer, float("nan"), False)
    assert torch.equal(parameter, before)
    step(parameter, optimizer, 1.0, True)
    wanted, plain = made(name)
    step(wanted, plain, 1.0, None)
    assert_equal(tensors(parameter, optimizer), tensors(wanted, plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_first_steps_that_are_noticed_late_are_not_taken_off_the_count(name: str) -> None:
    """The host reads flags some steps later: by then an update may have made the state."""
    (parameter, optimizer), (wanted, plain) = made(name), made(name)
    for gradient, finite in ((float("nan"), False), (float("nan"), False), (1.0, True), (float("nan"), False)):
        parameter.grad = torch.linspace(-1, 2, SIZE) * gradient
        optimizer.finite = torch.tensor(finite)
        optimizer.step()
    step(wanted, plain, 1.0, None)
    optimizer.forget_steps(3)
    assert_equal(tensors(parameter, optimizer), tensors(wanted, plain))
    step(parameter, optimizer, 0.25, True)
    step(wanted, plain, 0.25, None)
    assert_equal(tensors(parameter, optimizer), tensors(wanted, plain))


@pytest.mark.parametrize("sizes", [(), (7,), (24, 1), (64, 3, 400), (4096,)])
def test_copies_fill_idle_buffers_of_any_size_first(sizes: tuple[int, ...]) -> None:
    idle = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    originals = [torch.arange(100.0), torch.arange(77, dtype=torch.uint8), torch.tensor(3.0)]
    changed = [tensor.clone() for tensor in originals]
    copies = Copies(changed, idle)
    for tensor in changed:
        tensor.fill_(0)
    copies.restore_unless(torch.tensor(True))
    assert all(not tensor.any() for tensor in changed)
    copies.restore_unless(torch.tensor(False))
    assert all(torch.equal(*pair) for pair in zip(changed, originals, strict=True))
    owners = {buffer.untyped_storage().data_ptr() for buffer in idle}
    inside = sum(c.nbytes for _, c in copies.pairs if c.untyped_storage().data_ptr() in owners)
    assert inside >= min(sum(2 * size for size in sizes) - 32 * len(sizes), 400)
