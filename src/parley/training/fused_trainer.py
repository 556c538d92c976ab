"""The fused training step inside the trainer: packed rows go to parley.train_step, hook by hook.

Shape suffixes: T tokens of a packed row, L tokens of one document.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch
import trl
from datasets import Dataset
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader
from transformers.training_args import OptimizerNames

from parley.data.packing import Document
from parley.data.tokens import IGNORE_INDEX
from parley.train_step.bind import BoundModel, Unsupported, bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import MemoryPlan, make_plan
from parley.train_step.optimizer import AdamW8bit
from parley.training.regional_compile import WORTH_IT, compile_layers

logger = logging.getLogger(__name__)

BITSANDBYTES = (OptimizerNames.ADAMW_BNB, OptimizerNames.ADAMW_8BIT)
TORCH = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


class FusedTrainer(trl.SFTTrainer):
    """TRL's SFTTrainer with a seam for the fast step.

    Args:
        engine: "auto" takes the fast step for every model and option it knows and says why where it does not;
            "plain" always goes through transformers, PEFT and autograd.
        memory: "auto", "low", or the GiB of device memory that the run may take.

    `fast` is None until training starts, and stays None on the plain path.
    """

    optimizer: torch.optim.Optimizer | None
    max_tokens: int | None = None  # of one row

    def __init__(
        self,
        *args: Any,
        engine: Literal["auto", "plain"] = "auto",
        memory: Literal["auto", "low"] | float = "auto",
        **kwargs: Any,
    ) -> None:
        self.engine, self.memory = engine, memory
        self.fast: FusedStep | None = None
        self.plain_because: str | None = "engine: plain" if engine == "plain" else None
        self._flops_a_token: float | None = None
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches stay on the host, where the fast step reads their borders; the plain path moves them itself."""
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches stay on the host, as in training."""
        loader = super().get_eval_dataloader(eval_dataset)
        loader.device = None
        return loader

    def bind_fast(self) -> None:
        """Take the fast step where it knows the model and all options; asked again, nothing changes.

        A model whose adapters are switched off for a while is not judged by that, and an optimizer that was handed in
        keeps the plain path.
        """
        undecided = self.fast is None and self.plain_because is None
        if undecided and self.optimizer is None and adapters_on(self.model):
            self.fast = self._bind()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One parameter, the flat one, on the fast step; the same classes and settings as TRL's."""
        self.bind_fast()
        if self.fast is None or self.optimizer is not None:
            return super().create_optimizer(model)
        weight_Z = self.fast.bound.flat.weight_Z
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if self.args.optim in BITSANDBYTES:
            optimizer_class = AdamW8bit
            settings = {name: value for name, value in settings.items() if name in ("lr", "betas", "eps")}
        self.optimizer = optimizer_class([weight_Z], weight_decay=self.args.weight_decay, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The last hook before the first step, and the one that knows how many there will be."""
        compiled = self.fast is None and self.engine == "auto" and self.args.device.type == "cuda"
        if compiled and num_training_steps >= WORTH_IT and not self.args.torch_compile:
            count = compile_layers(self.model)
            logger.info("%d layers compiled, at the first step", count)
        return super().create_scheduler(num_training_steps, optimizer)

    def _bind(self) -> FusedStep | None:
        try:
            self._check_options()
            bound = bind(self.model)
            if self.args.bf16 and bound.dtype != torch.bfloat16:
                raise Unsupported(f"{bound.dtype} weights trained in bfloat16")
        except Unsupported as reason:
            self.plain_because = str(reason)
            logger.warning("plain path: %s", reason)
            return None
        plan = self._plan(bound)
        for line in plan.describe():
            logger.info("%s", line)
        step = FusedStep(bound, plan)
        step.compile()
        return step

    def _plan(self, bound: BoundModel) -> MemoryPlan:
        documents = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        state_bytes = 2 if self.args.optim in BITSANDBYTES else 8
        return make_plan(bound, self.memory, self._lengths(), documents, state_bytes)

    def _lengths(self) -> NDArray[np.integer]:
        """Tokens of each training row; of streams, which cannot be looked through, the most that a row may have."""
        rows = self.train_dataset
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            chunks = rows.data.column("input_ids").chunks
            return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        return np.array([self.max_tokens or self.model.config.max_position_embeddings])

    def _check_options(self) -> None:
        """Raises Unsupported for what a step does differently from the fast one."""
        args = self.args
        for wrong, reason in (
            (args.fp16, "fp16"),
            (args.optim not in (*BITSANDBYTES, *TORCH), f"optimizer {args.optim}"),
            (args.label_smoothing_factor > 0, "label smoothing"),
            (args.loss_type != "nll", f"loss {args.loss_type}"),
            (self.compute_loss_func is not None, "a loss function of its own"),
            (args.neftune_noise_alpha is not None, "NEFTune noise"),
            (self.accelerator.num_processes > 1, "several processes"),
            (args.optim_target_modules is not None, "optimizer target modules"),
        ):
            if wrong:
                raise Unsupported(reason)

    def fast_training_step(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Gradient of the packed row `inputs`; returns its loss, still on the device."""
        assert self.fast is not None
        if not self.model.training:
            self.model.train()
        examples = documents(inputs)
        count = max(sum(example.supervised_tokens for example in examples), 1)
        self.fast.forward_backward(examples, count)
        self.fast.bound.flat.expose_gradients()
        loss, right, entropy = (self.fast.metrics_3 / count).unbind()
        self._total_train_tokens += inputs["input_ids"].shape[1]
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropy)
        metrics["mean_token_accuracy"].append(right)
        metrics["num_tokens"] = [self._total_train_tokens]
        return loss

    def measure(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and number of the supervised tokens of a batch, on the device."""
        count = (inputs["labels"][..., 1:] != IGNORE_INDEX).sum().to(self.args.device)
        if self.fast is not None and "position_ids" in inputs and adapters_on(self.model):
            return self.fast.forward_only(documents(inputs))[0], count
        loss, _, _ = self.prediction_step(self.model, inputs, prediction_loss_only=True)
        return loss.double() * count, count

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        if self.fast is None:
            return super()._clip_grad_norm(model)
        grad_Z = self.fast.bound.flat.grad_Z
        norm = torch.linalg.vector_norm(grad_Z)
        grad_Z.mul_(torch.clamp(self.args.max_grad_norm / (norm + 1e-6), max=1.0))
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.fast is not None and grad_norm is None:
            return torch.linalg.vector_norm(self.fast.bound.flat.grad_Z)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the model counts them; its parameters are counted once, not at every step."""
        if self.fast is None:
            return super().floating_point_ops(inputs)
        tokens = inputs["input_ids"].numel()
        if self._flops_a_token is None:
            self._flops_a_token = super().floating_point_ops(inputs) / tokens
        return int(self._flops_a_token * tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the figures that stayed on the device, in one transfer."""
        for values in self._metrics["train"].values():
            if values and isinstance(values[0], torch.Tensor):
                values[:] = torch.stack(values).tolist()
        super().log(logs, start_time)


def adapters_on(model: torch.nn.Module) -> bool:
    """Whether answers come through the adapters; PeftModel.disable_adapter switches them off for a while."""
    return not any(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))


def documents(inputs: dict[str, torch.Tensor]) -> list[Document]:
    """The documents of a packed row, cut where `position_ids` begin anew."""
    ids_T, labels_T, position_T = (
        inputs[name][0].numpy().astype(np.int32) for name in ("input_ids", "labels", "position_ids")
    )
    (starts,) = np.nonzero(position_T == 0)
    return [
        Document(ids_L, label_L)
        for ids_L, label_L in zip(np.split(ids_T, starts[1:]), np.split(labels_T, starts[1:]), strict=True)
    ]
