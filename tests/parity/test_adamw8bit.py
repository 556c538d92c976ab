"""The 8-bit AdamW kernel against bitsandbytes' update: on a GPU as it is, elsewhere through Triton's interpreter.

Codes are compared with the nearest ones, as bitsandbytes on a CPU rounds small moments coarsely.
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch

from parley.train_step import masked_update
from parley.train_step.masked_update import MaskedUpdate
from parley.train_step.optimizer import AdamW8bit

triton = pytest.importorskip("triton", reason="no Triton here")
adamw8bit = pytest.importorskip("parley.train_step.kernels.adamw8bit")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not triton.knobs.runtime.interpret, reason="needs a GPU or TRITON_INTERPRET=1"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU bitsandbytes decays the updated weights, where its update for a CPU and torch's AdamW decay those before.
ORDER = 1.1 * 1e-2**2 * 0.1 if DEVICE.type == "cuda" else 0.0
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.995), "eps": 1e-6, "weight_decay": 0.1}


def update(parameter: torch.nn.Parameter, state: dict[str, torch.Tensor], step: int, *, finite: bool = True) -> None:
    adamw8bit.adamw8bit(
        parameter.data, parameter.grad, (state["state1"], state["state2"]), (state["absmax1"], state["absmax2"]),
        (state["qmap1"], state["qmap2"]), torch.tensor(finite, device=DEVICE), step=step, **SETTINGS,
    )  # fmt: skip


def gradients(size: int) -> list[torch.Tensor]:
    """Over fourteen decades, so that every code comes up; some exactly 0, and a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        gradient = torch.randn(size, generator=generator) * 10 ** (-7 * torch.rand(size, generator=generator))
        gradient[::97] = 0
        gradient[256:512] = 0
        made.append(gradient.to(DEVICE))
    return made


def dequantized(state: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    codes = state[f"state{number}"]
    scale = state[f"absmax{number}"].repeat_interleave(256)[: len(codes)]
    return state[f"qmap{number}"][codes.long()] * scale


def rounding(state: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """The most that a moment may differ from its code's value: half of the larger distance to a neighbour."""
    book = state[f"qmap{number}"]
    gap = book.diff()
    half = torch.maximum(torch.cat([gap, gap[-1:]]), torch.cat([gap[:1], gap])) / 2
    if number == 1:
        half[126] = torch.maximum(half[126], -book[126])  # a negative moment keeps its sign
    half[127 if number == 1 else 0] = book[book > 0].min() / 2
    codes = state[f"state{number}"]
    return half[codes.long()] * state[f"absmax{number}"].repeat_interleave(256)[: len(codes)]


@pytest.mark.parametrize("size", [4096 + 100, 8192])
def test_weights_and_moments_are_those_of_bitsandbytes(size: int) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, size, device=DEVICE)) for _ in range(2))
    optimizer = bitsandbytes.optim.AdamW8bit([theirs], **SETTINGS)
    optimizer.init_state(optimizer.param_groups[0], theirs, 0, 0)
    wanted = optimizer.state[theirs]
    for step, gradient in enumerate(gradients(size), 1):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.data.copy_(theirs.data)  # each update from the same state
        state = {name: value.clone() for name, value in wanted.items() if torch.is_tensor(value)}
        before = {name: value.clone() for name, value in state.items()}
        optimizer.step()
        update(ours, state, step)
        torch.testing.assert_close(ours.data, theirs.data, rtol=2e-6, atol=1e-7 + ORDER)
        for number, zero in ((1, 127), (2, 0)):
            torch.testing.assert_close(state[f"absmax{number}"], wanted[f"absmax{number}"], rtol=1e-5, atol=0)
            beta, power = SETTINGS["betas"][number - 1], gradient**number
            moment = beta * dequantized(before, number) + (1 - beta) * power
            assert (state[f"state{number}"][256:512] == zero).all()
            error, spacing = (dequantized(state, number) - moment).abs(), rounding(state, number)
            assert (error <= spacing * (1 + 1e-3) + 1e-30).all()


@pytest.mark.parametrize(("number", "zero"), [(1, 127), (2, 0)])
def test_each_value_of_a_code_book_has_its_own_code(number: int, zero: int) -> None:
    """The values themselves, and what lies just below and above the middle of two neighbours."""
    parameter = torch.nn.Parameter(torch.zeros(4096, device=DEVICE))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], **SETTINGS)
    optimizer.step()
    state = optimizer.state[parameter]
    book = state[f"qmap{number}"]
    values = book[book >= 0]
    middle = (values[1:] + values[:-1]) / 2
    for probe, wanted in (
        (values, torch.arange(len(values))),
        (middle * (1 - 1e-4), torch.arange(len(middle))),
        (middle * (1 + 1e-4), torch.arange(len(middle)) + 1),
    ):
        gradient = torch.zeros(256, device=DEVICE)
        probed = min(len(probe), 255)
        # The first moment is a tenth of the gradient, the second the square of it; 1 fills the block's scale.
        gradient[:probed] = (probe[:probed] if number == 1 else probe[:probed].sqrt()).to(DEVICE)
        gradient[255] = 1
        parameter.grad = gradient.repeat(16)
        for scale in ("absmax1", "absmax2"):  # the moments before are 0
            state[scale].zero_()
        update(parameter, state, 1)
        codes = state[f"state{number}"][:probed].cpu().int() - zero
        assert torch.equal(codes, wanted[:probed].int())


def some_state() -> tuple[torch.nn.Parameter, dict[str, torch.Tensor]]:
    """After one update."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 4096, device=DEVICE))
    parameter.grad = gradients(4096)[0]
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], **SETTINGS)
    optimizer.step()
    return parameter, optimizer.state[parameter]


@pytest.mark.parametrize("poisoned", [1.0, float("nan"), float("inf")])
def test_nothing_is_written_where_the_step_is_not_finite(poisoned: float) -> None:
    parameter, state = some_state()
    before = parameter.detach().clone(), {name: copy.deepcopy(value) for name, value in state.items()}
    parameter.grad = gradients(4096)[1] * poisoned
    update(parameter, state, 2, finite=False)
    assert torch.equal(parameter.detach(), before[0])
    for name, value in before[1].items():
        assert torch.equal(state[name], value) if torch.is_tensor(value) else state[name] == value
    if poisoned == 1.0:
        update(parameter, state, 2)
        assert not torch.equal(parameter.detach(), before[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_masked_update_copies_nothing_where_the_kernel_reads_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192, device="cuda"))
    optimizer = type("Masked", (MaskedUpdate, AdamW8bit), {})([parameter], **SETTINGS)
    for number, finite in enumerate((True, True, False, True)):
        before = parameter.detach().clone(), copy.deepcopy(dict(optimizer.state[parameter]))
        parameter.grad = gradients(8192)[number] if finite else torch.full_like(parameter, torch.nan)
        optimizer.finite = torch.tensor(finite, device="cuda")
        optimizer.step()
        monkeypatch.setattr(masked_update, "Copies", None)  # the first update makes the state
        assert torch.equal(parameter.detach(), before[0]) is not finite
        if not finite:
            optimizer.forget_steps(1)
            for name, value in before[1].items():
                now = optimizer.state[parameter][name]
                assert torch.equal(now, value) if torch.is_tensor(value) else now == value
