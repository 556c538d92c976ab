"""Full fine-tuning with sharded weights: gradients, moments and checkpoints where each parameter is cut over processes.

An adapter is whole in every process and needs nothing of this. Checkpoints are those of one process: weights in
ordinary safetensors files, moments in one optimizer.pt, gathered tensor by tensor, so that any number of processes
resumes them. A process reads its own rows of both.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from parley.models.load_sharded import SafetensorsSource
from parley.models.save_sharded import save_sharded
from parley.models.sharded_nf4 import local_rows
from parley.models.sharding import fill, is_sharded
from parley.training import checkpoint as files
from parley.training.packed_trainer import PackedTrainer

SCHEDULER = "scheduler.pt"
State = dict[str, Any]


class ShardedTrainer(PackedTrainer):
    """PackedTrainer, whose model may be sharded (models/sharding.py)."""

    @cached_property
    def sharded(self) -> bool:
        """Whether the model's weights are cut over the processes, so that each pass is one of all of them."""
        return is_sharded(self.model)

    @property
    def shards_trained(self) -> bool:
        """Whether what is trained is sharded."""
        return self.sharded and not isinstance(self.model, PeftModel)

    # ---- Gradients ----

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self.shards_trained:
            return super()._clip_grad_norm(model)
        norm = self._sharded_norm()
        clip_grads_with_norm_(self.model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.shards_trained and grad_norm is None:
            grad_norm = self._sharded_norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _sharded_norm(self) -> Tensor:
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # ---- Checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.shards_trained:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_tokenizer(folder)
        save_sharded(self.model, folder if self.args.should_save else None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shards_trained:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.state_dict()
        gathered = {index: _gathered(values) for index, values in state["state"].items()}
        if self.args.should_save:
            torch.save(state | {"state": gathered}, Path(output_dir) / files.OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.shards_trained:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        source = SafetensorsSource(Path(resume_from_checkpoint), resume_from_checkpoint)
        source.check(self.model)
        fill(self.model, source, self.args.device)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.shards_trained or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        # Mapped, not read: a process takes its rows alone.
        state = torch.load(folder / files.OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        saved = [index for group in state["param_groups"] for index in group["params"]]
        own = {
            index: {name: _sharded_as(parameter, value) for name, value in state["state"].get(index, {}).items()}
            for index, parameter in zip(saved, parameters, strict=True)
        }
        self.optimizer.load_state_dict(state | {"state": {index: values for index, values in own.items() if values}})
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


def _gathered(values: State) -> State:
    """Of each tensor the whole, on the host."""
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in values.items()}


def _sharded_as(parameter: Tensor, value: Any) -> Any:
    """`value` cut as `parameter` is, where it is a moment of it; a count of steps as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    local = value[local_rows(parameter)].to(parameter.device)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
