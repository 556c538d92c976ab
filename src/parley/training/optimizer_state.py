"""Optimizer state of the fused step's flat parameter, saved and loaded as that of PEFT's own parameters.

So a checkpoint is TRL's: one that TRL wrote can be resumed here, and one from here in TRL, on either path.

Shape suffixes (legend in docs/design.md): Z all trainable adapter weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor, nn

from parley.errors import RunError
from parley.library_compat.bitsandbytes import WRAPPED_STATE
from parley.train_step.flat_parameters import OPTIMIZER_BLOCK, FlatAdapters
from parley.train_step.masked_update import MaskedUpdate

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
QUANTISED = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}
"""8-bit moments of bitsandbytes, with their code book and the scales of their blocks."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat one."""

    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()

    @property
    def blocks(self) -> slice:
        return slice(self.start // OPTIMIZER_BLOCK, -(-self.stop // OPTIMIZER_BLOCK))


class StateLayout:
    """The trainable parameters in the order and the groups of TRL's optimizer: with weight decay, and without.

    Args:
        parameters: those of each group. All LoRA weights are in the first.
    """

    def __init__(self, flat: FlatAdapters, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        base = flat.weight_Z.data_ptr()
        size = flat.weight_Z.element_size()
        self.total = flat.weight_Z.numel()
        self.groups = [[Slot((p.data_ptr() - base) // size, p.shape) for p in group] for group in parameters]
        self.slots = [slot for group in self.groups for slot in group]

    def split(self, state_dict: State) -> State:
        """The state of each parameter, out of that of the flat one."""
        flat = state_dict["state"].get(0, {})
        wrapped = WRAPPED_STATE in flat
        values = _unwrapped(flat)
        states = [{name: self._part(name, value, slot) for name, value in values.items()} for slot in self.slots]
        if wrapped:
            states = [_wrapped(state, flat[WRAPPED_STATE]) for state in states]
        groups, first = [], 0
        for slots, group in zip(self.groups, state_dict["param_groups"], strict=True):
            groups.append(group | {"params": list(range(first, first + len(slots)))})
            first += len(slots)
        return state_dict | {"state": dict(enumerate(states)) if flat else {}, "param_groups": groups}

    def join(self, state_dict: State) -> State:
        """The flat parameter's state out of that of each parameter. Raises RunError where they do not fit."""
        states, groups = state_dict["state"], state_dict["param_groups"]
        saved = [index for group in groups for index in group["params"]]
        # PyTorch matches saved state to parameters by position, so their number has to agree.
        if len(saved) != len(self.slots):
            raise RunError(
                f"the checkpoint's optimizer has {len(saved)} parameters and this model trains {len(self.slots)}; "
                "give the adapter settings it was made with"
            )
        unwrapped = [_unwrapped(states.get(index, {})) for index in saved]
        names = {name: value for state in unwrapped for name, value in state.items()}
        check_shapes(unwrapped, [slot.shape for slot in self.slots])
        joined = {name: self._joined(name, value, unwrapped) for name, value in names.items()}
        for moment, (code, scales) in QUANTISED.items():
            if code in names:
                joined |= self._joined_blocks(moment, code, scales, names[code], unwrapped)
        state = {0: joined} if joined else {}
        decayed, *others = groups
        # TRL has a second group for parameters without weight decay; LoRA weights are all in the first.
        flat_groups = [decayed | {"params": [0]}, *(group | {"params": []} for group in others)]
        return state_dict | {"state": state, "param_groups": flat_groups}

    def _part(self, name: str, value: Any, slot: Slot) -> Any:
        if name.startswith("absmax"):
            return value[slot.blocks].clone()
        if isinstance(value, Tensor) and value.numel() == self.total and not name.startswith("qmap"):
            return value[slot.start : slot.stop].view(slot.shape).clone()
        # A shared count of steps would be incremented by every parameter once it is loaded.
        return value.clone() if isinstance(value, Tensor) else value

    def _joined(self, name: str, example: Any, states: Sequence[State]) -> Any:
        """A value of the flat parameter; those that are no moments are shared by all parameters."""
        if name not in MOMENTS:
            return example
        joined = torch.zeros(self.total, dtype=torch.float32, device=example.device)
        for state, slot in zip(states, self.slots, strict=True):
            if name in state:
                joined[slot.start : slot.stop] = state[name].flatten()
        return joined

    def _joined_blocks(self, moment: str, code: str, scales: str, book: Tensor, states: Sequence[State]) -> State:
        """An 8-bit moment of all parameters. bitsandbytes keeps that of small ones in 32 bits, which are quantised."""
        values = torch.zeros(self.total, dtype=torch.uint8, device=book.device)
        # 8-bit values are indices into the code book, where index 0 is not the value 0.
        values += int(book.abs().argmin())
        absmax = torch.zeros(self.total // OPTIMIZER_BLOCK, dtype=torch.float32, device=book.device)
        for state, slot in zip(states, self.slots, strict=True):
            if moment not in state:
                continue
            value, scale = state[moment], state.get(scales)
            if value.dtype != torch.uint8:
                value, quantised = functional.quantize_blockwise(
                    value.flatten().float(), code=book, blocksize=OPTIMIZER_BLOCK
                )
                scale = quantised.absmax
            values[slot.start : slot.stop] = value.flatten()
            absmax[slot.blocks] = scale
        return {moment: values, scales: absmax, code: book}


class ParameterState(torch.optim.Optimizer):
    """Put before an optimizer's class: its state reads and writes as that of the parameters in `layout`."""

    layout: StateLayout

    def state_dict(self) -> State:
        return self.layout.split(super().state_dict())

    def load_state_dict(self, state_dict: State) -> None:
        super().load_state_dict(self.layout.join(state_dict))


def with_parameter_state(optimizer_class: type, layout: StateLayout) -> Any:
    """`optimizer_class` with masked updates, whose state is that of the parameters in `layout`."""
    return type(optimizer_class.__name__, (MaskedUpdate, ParameterState, optimizer_class), {"layout": layout})


def check_shapes(states: Sequence[State], shapes: Sequence[torch.Size]) -> None:
    """Raises RunError in one line where the moments of a parameter have not its shape."""
    for index, (state, shape) in enumerate(zip(states, shapes, strict=True)):
        for name, value in _unwrapped(state).items():
            if name in MOMENTS and value.shape != shape:
                raise RunError(
                    f"the checkpoint's optimizer state {name} of parameter {index} has shape {tuple(value.shape)} and "
                    f"the parameter {tuple(shape)}; give the adapter settings it was made with"
                )


def _unwrapped(state: State) -> State:
    return {name: value for name, value in state.items() if name != WRAPPED_STATE} | state.get(WRAPPED_STATE, {})


def _wrapped(state: State, names: State) -> State:
    inner = {name: value for name, value in state.items() if name in names}
    return {name: value for name, value in state.items() if name not in names} | {WRAPPED_STATE: inner}
