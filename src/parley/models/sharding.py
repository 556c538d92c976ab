"""A model whose weights are cut over ranks with FSDP2 (torch.distributed.fsdp.fully_shard), read slice by slice.

The modules are made on the meta device, sharded there, and given memory for this rank's rows alone; each rank then
reads those rows, and no rank ever holds more than its shard and one slice being read. A layer is gathered before its
forward and its backward pass and freed after each. NF4 layers (ShardedNf4Linear) shard packed bytes and scales.

An adapter is attached after sharding, so that FSDP does not see its parameters: they are replicated, and their gradient
takes the all-reduce of data parallel training.

Shape suffixes: see docs/design.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from parley.errors import ModelError
from parley.models.sharded_nf4 import BLOCK, ShardedNf4Linear, local_rows, local_tensor


class WeightSource(Protocol):
    """Weights of a model by the names of its own parameters."""

    def rows(self, name: str, rows: slice) -> Tensor:
        """Rows of dimension 0 of the whole tensor, in any floating-point type, on any device."""


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, *, nf4: bool, double: bool, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The modules of `config` with parameters on the meta device and buffers on the host; frozen.

    `nf4`: linear layers but the head are ShardedNf4Linear. Raises ModelError for a matrix that is no whole number of
    blocks.
    """
    # Parameters alone: rotary tables and the like are buffers, which no checkpoint holds.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # each parameter was made anew for its module
    model.requires_grad_(False)
    if nf4:
        head = model.get_output_embeddings()
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                _check_blocks(path, module)
                model.set_submodule(path, ShardedNf4Linear(module, double=double))
    return model


def _check_blocks(path: str, linear: nn.Linear) -> None:
    if linear.weight.numel() % BLOCK:
        raise ModelError(
            f"{path} has {linear.weight.numel():,} weights, no multiple of the {BLOCK} of an NF4 block: it cannot be "
            "sharded; set training.shard: none, or model.quantization: none"
        )


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Cut the parameters of an `empty_model` over all ranks and allocate this rank's part on `device`, unfilled."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    for module in _units(model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # The root, too: parameters that stay gathered after an evaluation would be handed to the optimizer whole.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the supervised tokens of all ranks: gradients are sums, which gloo has, too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)  # buffers, too
    for name, buffer in buffers.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, buffer)
    model.tie_weights()  # to_empty allocates a shared parameter once for each module


def _units(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Modules that are gathered by themselves: layers, and embedding and head unless they share their weight."""
    yield from (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding.weight is not head.weight:
        yield from (embedding, head)


@torch.no_grad()
def fill(model: PreTrainedModel, source: WeightSource, device: torch.device) -> None:
    """Read this rank's part of each parameter. Raises ModelError for weights with NaN or infinity."""
    finite = torch.ones((), dtype=torch.bool, device=device)
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, ShardedNf4Linear) and attribute == "absmax":
            continue  # written with the packed bytes
        rows = local_rows(parameter)
        if isinstance(module, ShardedNf4Linear) and attribute == "packed":
            values = _flat(source, f"{path}.weight", module, rows).to(device, module.compute_dtype)
            module.fill(values, lambda scales_b, blocks=module.blocks: _gathered(scales_b, blocks))
        else:
            values = source.rows(name, rows).to(device, parameter.dtype)
            local_tensor(parameter).copy_(values)
        finite &= values.isfinite().all()
    if not all(_of_all_ranks(bool(finite))):
        raise ModelError(f"{model.name_or_path}: weights hold NaN or infinity, not numbers; download them again")


def _flat(source: WeightSource, name: str, linear: ShardedNf4Linear, blocks: slice) -> Tensor:
    """The weights of these blocks of a matrix (N, K), flat in row-major order."""
    start, stop, columns = blocks.start * BLOCK, blocks.stop * BLOCK, linear.in_features
    first = start // columns
    rows = source.rows(name, slice(first, -(-stop // columns)))
    return rows.flatten()[start - first * columns : stop - first * columns].contiguous()


def _gathered(scales_b: Tensor, blocks: int) -> Tensor:
    """The scales of all ranks, in order."""
    count = dist.get_world_size()
    chunk = -(-blocks // count)
    padded = scales_b.new_zeros(chunk)
    padded[: len(scales_b)] = scales_b
    gathered = scales_b.new_empty(count * chunk)
    dist.all_gather(list(gathered.split(chunk)), padded)
    return gathered[:blocks]


def _of_all_ranks(value: bool) -> list[bool]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of `model` is cut over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers on this rank."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(local_tensor(tensor).nbytes for tensor in tensors.values())
