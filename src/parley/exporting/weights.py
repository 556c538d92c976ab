"""The tensors of a checkpoint, one at a time, so that memory is bounded by the largest of them.

Files are memory-mapped. Tensors that bitsandbytes quantised are dequantised to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parley.errors import ModelError, one_line

NF4_STATE = ".quant_state.bitsandbytes__"
"""Between a 4-bit weight's name and its type, in the name of its packed quantization state."""
INT8_SCALES = ".SCB"
INT8_RANGE = 127  # an int8 row is scaled so that its largest value is 127 (LLM.int8())


def _read_tensor(file: Path, name: str) -> Tensor:
    # Opened for this tensor alone: pages of a mapped file stay in memory as long as it is open.
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


class CheckpointWeights:
    """Tensors of the *.safetensors, or else *.bin files in a model's folder.

    `dequantized` says whether any of them was quantised in the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Callable[[], Tensor]] = {}
        files = sorted(folder.glob("*.safetensors"))
        try:
            for file in files:
                self._index_safetensors(file)
            if not files:
                for file in sorted(folder.glob("*.bin")):
                    self._index_pickle(file)
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise ModelError(f"{folder}: the weights are damaged ({one_line(error)}); fetch them again") from None
        if not self._read:
            raise ModelError(f"{folder}: no weights (*.safetensors or *.bin); copy them there")
        self.dequantized = any(NF4_STATE in name or name.endswith(INT8_SCALES) for name in self._read)

    def _index_safetensors(self, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        for name in names:
            self._read[name] = partial(_read_tensor, file, name)

    def _index_pickle(self, file: Path) -> None:
        values = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        for name, value in values.items():
            self._read[name] = lambda value=value: value  # type: ignore[misc]

    def __contains__(self, name: str) -> bool:
        return name in self._read

    def get(self, name: str) -> Tensor:
        if name not in self._read:
            raise ModelError(f"{self.folder}: the checkpoint lacks {name}; fetch weights and config.json again")
        try:
            value = self._read[name]()
            if value.is_floating_point():
                return value
            return self._dequantized(name, value)
        except (SafetensorError, OSError, RuntimeError, KeyError, AssertionError) as error:
            raise ModelError(f"{self.folder}: {name} cannot be read ({one_line(error)}); fetch it again") from None

    def _dequantized(self, name: str, value: Tensor) -> Tensor:
        scales = name.removesuffix(".weight") + INT8_SCALES
        if scales in self._read:
            return value.float() * (self._read[scales]().float() / INT8_RANGE)[:, None]
        prefix = f"{name}."
        state: dict[str, Any] = {key: read() for key, read in self._read.items() if key.startswith(prefix)}
        if not state:
            raise ModelError(
                f"{self.folder}: {name} has the type {value.dtype}, which is no quantization that Parley reads; "
                "give the 16-bit model it was made from with --base"
            )
        return dequantize_4bit(value, QuantState.from_dict(state, device=torch.device("cpu"))).float()
