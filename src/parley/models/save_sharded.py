"""Write a model whose weights are cut over ranks as ordinary safetensors files, which any program reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

FILE_BYTES = 4 << 30  # of one file, and so of what the writing rank holds on the host at a time
METADATA = {"format": "pt"}


def save_sharded(model: PreTrainedModel, folder: Path | None) -> None:
    """Gather `model` tensor by tensor and write it, with its config, as `save_pretrained` does.

    Every rank calls this, one of them with the folder. The others pass None.
    """
    files = _files({name: parameter.nbytes for name, parameter in model.named_parameters()})
    parameters = dict(model.named_parameters())
    index: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for name in names:
            whole = _whole(parameters[name])
            if folder is not None:
                tensors[name] = whole.cpu().contiguous()
            index[name] = file
        if folder is not None:
            save_file(tensors, folder / file, METADATA)
    if folder is None:
        return
    if len(files) > 1:
        size = sum(parameter.nbytes for parameter in parameters.values())
        values = {"metadata": {"total_size": size}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 made it a subclass
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _files(sizes: dict[str, int]) -> list[list[str]]:
    """The names of each file, in order: at most FILE_BYTES, but for a single larger tensor."""
    files: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if files[-1] and total + size > FILE_BYTES:
            files.append([])
            total = 0
        files[-1].append(name)
        total += size
    return files


@torch.no_grad()
def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
