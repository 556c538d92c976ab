"""The trained weights of the evaluation with the lowest held-out loss: `best/step-40.safetensors` in the run folder.

A checkpoint resumes exactly only together with the best weights up to its own step, so those are kept as long as the
checkpoint is; the others go as soon as a better evaluation comes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.training.checkpoint import sync
from parley.training.early_stopping import Evaluated, evaluations, lowest
from parley.training.last_good_weights import trained_parameters
from parley.training.processes import copy_from_main, from_main, is_main_process

logger = logging.getLogger(__name__)

DIGEST = "sha256"  # metadata of the file: of names and bytes of its tensors


class BestWeights(TrainerCallback):
    """Writes the weights of each evaluation that is the best so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        best = lowest(evaluations(state))
        if best is None or best.step != state.global_step or not args.should_save:
            return
        assert model is not None
        self._write(best.step, {name: p.detach().cpu().contiguous() for name, p in trained_parameters(model).items()})
        self._prune(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._prune(args, state)

    def restore(self, model: nn.Module, state: TrainerState) -> Evaluated | None:
        """Load the best weights there are into `model`, in place. Returns their evaluation; None where there is none.

        Weights that are gone, as those from before a resumed checkpoint of another run, do not count.
        """
        # The main process alone has the folder.
        best = from_main(
            lowest([each for each in evaluations(state) if each.step == state.global_step or self._has(each.step)])
        )
        if best is not None and best.step != state.global_step:
            trained = trained_parameters(model)
            if is_main_process():
                saved = self._read(best.step)
                with torch.no_grad():
                    for name, parameter in trained.items():
                        parameter.copy_(saved[name])
            copy_from_main(list(trained.values()))
        return best

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"

    def _has(self, step: int) -> bool:
        """Whether the weights of `step` are there, as they were written."""
        path = self._path(step)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                recorded = (file.metadata() or {}).get(DIGEST)
            if recorded is None or recorded == _digest(self._read(step)):
                return True
        except (OSError, SafetensorError):
            pass
        logger.warning("%s is damaged and not used", path)
        return False

    def _read(self, step: int) -> dict[str, torch.Tensor]:
        return load_file(self._path(step))

    def _write(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / ".unfinished"
        # Clones: the fused step's parameters are views of one buffer, which safetensors would refuse.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, unfinished, {DIGEST: _digest(tensors)})
        sync(unfinished)
        os.replace(unfinished, self._path(step))
        sync(self.folder)

    def _prune(self, args: TrainingArguments, state: TrainerState) -> None:
        """Remove all but the best up to now and up to each checkpoint."""
        assert args.output_dir is not None
        numbers = [path.name.rpartition("-")[2] for path in Path(args.output_dir).glob("checkpoint-*")]
        ends = [state.global_step, *(int(number) for number in numbers if number.isdigit())]
        evaluated = evaluations(state)
        kept = [lowest([each for each in evaluated if each.step <= end]) for end in ends]
        names = {self._path(best.step) for best in kept if best is not None}
        for path in self.folder.glob("step-*.safetensors"):
            if path not in names:
                path.unlink()


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
