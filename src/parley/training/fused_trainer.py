"""TRL's trainer with the fused training step: which steps it takes, and what of Trainer's loop it replaces.

Trainer's loop hands over one micro-batch at a time. Both paths of training collect the documents of a whole optimizer
step and train on them at its last micro-batch, so that the step costs as few passes as fit in memory and its loss is
one mean over all its supervised tokens.

Shape suffixes: see docs/design.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import trl
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import DOCUMENTS, Document, PaddedCollator, padding_free_row, split_by_tokens
from parley.errors import RunError, one_line
from parley.library_compat.trl import count_tokens, metrics, tokens_seen
from parley.models.packing_isolation import why_not_packed
from parley.train_step.bind import BoundModel, Unsupported, bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import MemoryPlan, make_plan
from parley.train_step.optimizer import AdamW8bit
from parley.training.optimizer_state import StateLayout, check_shapes, with_parameter_state
from parley.training.regional_compile import MIN_STEPS, compile_layers

logger = logging.getLogger(__name__)

BITSANDBYTES = (OptimizerNames.ADAMW_BNB, OptimizerNames.ADAMW_8BIT)
TORCH = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
# Key of a figure in TRL's metrics, to its index in FusedStep.metrics_3.
METRICS = {"mean_token_accuracy": 1, "entropy": 2}


class FusedTrainer(trl.SFTTrainer):
    """TRL's SFTTrainer, which takes the fused step where model and options allow it.

    Args:
        engine: "auto" takes the fused step for every model and option it supports and logs why where it does not;
            "plain" always goes through transformers, PEFT and autograd.
        memory: "auto", "low", or the GiB of device memory that the run may take.

    `fused_step` is None until `bind_fused_step`, and stays None on the plain path, for which `plain_because` gives the
    reason; `padded_because` gives the reason where that path pads. `supervised_tokens` counts those trained on so far,
    by all processes.
    """

    data_collator: Any
    optimizer: torch.optim.Optimizer | None
    max_tokens: int | None = None  # of one document
    padded_collator: PaddedCollator | None = None  # of one row a document; None beside a collator of the user's own

    def __init__(
        self,
        *args: Any,
        engine: Literal["auto", "plain"] = "auto",
        memory: Literal["auto", "low"] | float = "auto",
        **kwargs: Any,
    ) -> None:
        self.engine, self.memory = engine, memory
        self.fused_step: FusedStep | None = None
        self.plain_because: str | None = "engine: plain" if engine == "plain" else None
        self.supervised_tokens = 0
        self._documents: list[Document] = []  # of the optimizer step whose micro-batches are arriving
        self._sums_4 = torch.zeros(4)  # of an evaluation: loss, figures as in FusedStep.metrics_3, supervised tokens
        self._flops_per_token: float | None = None
        super().__init__(*args, **kwargs)
        # TRL's compute_loss divides by the tokens of the whole step, whether the model's own loss could or not.
        self.model_accepts_loss_kwargs = True

    # ---- Data loaders ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches stay on the host, where the fused step reads document lengths; the plain path moves them itself."""
        return self._on_host(super().get_train_dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches stay on the host, as in training. Where metrics want logits, a row is one example."""
        wants_logits = self.compute_metrics is not None and not self.args.prediction_loss_only
        return self._on_host(super().get_eval_dataloader, eval_dataset, padded=wants_logits)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """For `predict`, whose predictions are one row an example."""
        return self._on_host(super().get_test_dataloader, test_dataset, padded=not self.args.prediction_loss_only)

    def _on_host(self, make: Callable[..., DataLoader], *dataset: Any, padded: bool = False) -> DataLoader:
        collator = self.data_collator
        if padded and self.padded_collator is not None:
            self.data_collator = self.padded_collator
        try:
            loader = make(*dataset)
        finally:
            self.data_collator = collator
        loader.device = None
        return loader

    # ---- Binding, optimizer and scheduler ----

    def bind_fused_step(self) -> None:
        """Decide between the fused step and the plain path, once; every later call does nothing.

        `train` does this by itself; call it earlier to measure held-out loss on the fused step before training. A
        model whose adapters are switched off for a while is not judged by that, and an optimizer that was handed in
        keeps the plain path.
        """
        undecided = self.fused_step is None and self.plain_because is None
        if undecided and self.optimizer is None and adapters_enabled(self.model):
            self.fused_step = self._bind()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One parameter, the flat one, on the fused step; the same classes and settings as TRL's."""
        self.bind_fused_step()
        if self.fused_step is None or self.optimizer is not None:
            return super().create_optimizer(model)
        weight_Z = self.fused_step.bound.flat.weight_Z
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if self.args.optim in BITSANDBYTES:
            optimizer_class = AdamW8bit
            settings = {name: value for name, value in settings.items() if name in ("lr", "betas", "eps")}
        decayed = set(self.get_decay_parameter_names(self.model))
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        layout = StateLayout(self.fused_step.bound.flat, [list(trained.values()), []])
        assert decayed.issuperset(trained), "LoRA weights are no biases and no norms"
        # TRL's second group, of parameters without weight decay, is empty for LoRA; its schedulers count it.
        groups = [{"params": [weight_Z], "weight_decay": self.args.weight_decay}, {"params": [], "weight_decay": 0.0}]
        self.optimizer = with_parameter_state(optimizer_class, layout)(groups, **settings)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Raises RunError in one line for a state that is not of this model's parameters."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise RunError(f"{checkpoint}: the optimizer's state does not fit this model ({one_line(error)})") from None
        if checkpoint is not None and self.fused_step is None and self.optimizer is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            check_shapes([self.optimizer.state.get(p, {}) for p in parameters], [p.shape for p in parameters])

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The last hook before the first step, and the one that knows how many there will be."""
        compiled = self.fused_step is None and self.engine == "auto" and self.args.device.type == "cuda"
        if compiled and num_training_steps >= MIN_STEPS and not self.args.torch_compile:
            count = compile_layers(self.model)
            logger.info("%d layers are compiled at the first step", count)
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

    def _check_options(self) -> None:
        """Raises Unsupported for an option that the fused step does not implement."""
        args = self.args
        for unsupported, reason in (
            (args.fp16, "fp16"),
            (args.optim not in (*BITSANDBYTES, *TORCH), f"optimizer {OptimizerNames(args.optim).value}"),
            (args.label_smoothing_factor > 0, "label smoothing"),
            (args.loss_type != "nll", f"loss {args.loss_type}"),
            (self.compute_loss_func is not None, "a loss function of its own"),
            (args.neftune_noise_alpha is not None, "NEFTune noise"),
            (self.accelerator.num_processes > 1, "several processes"),
            (args.optim_target_modules is not None, "optimizer target modules"),
        ):
            if unsupported:
                raise Unsupported(reason)

    def _plan(self, bound: BoundModel) -> MemoryPlan:
        state_bytes = 2 if self.args.optim in BITSANDBYTES else 8
        return make_plan(bound, self.memory, self._lengths(), self._rows_per_step, state_bytes)

    @property
    def _rows_per_step(self) -> int:
        """Rows of an optimizer step in this process."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def _lengths(self) -> NDArray[np.integer]:
        """Tokens of each training row; of a stream, whose rows are not known yet, the most that one may have."""
        rows = self.train_dataset
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            chunks = rows.data.column("input_ids").chunks
            return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        return np.array([self.max_tokens or self.model.config.max_position_embeddings])

    # ---- Training ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step; at the end of a stream empty ones complete the step.

        Trainer would wait for its last micro-batch otherwise: without end, where a stream is shorter than a step.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and DOCUMENTS in batches[0]:
            batches += [{DOCUMENTS: []} for _ in range(num_batches - len(batches))]
        return batches, count

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of a whole optimizer step at its last micro-batch; earlier ones are only collected.

        Returns the mean loss over the step's supervised tokens, and 0 for earlier micro-batches: Trainer sums them.
        Batches of other collators go to TRL one by one.
        """
        if DOCUMENTS not in inputs:
            if self.accelerator.sync_gradients:  # num_items_in_batch counts the whole step's at every micro-batch
                self.supervised_tokens += int(num_items_in_batch or 0)
            return super().training_step(model, inputs, num_items_in_batch)
        self._documents += inputs[DOCUMENTS]
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        documents, self._documents = self._documents, []
        supervised = self._supervised_in_step(documents)
        self.supervised_tokens += supervised
        if self.fused_step is not None:
            return self._fused_training_step(self.fused_step, documents, supervised)
        return self._plain_training_step(model, documents, supervised)

    def _supervised_in_step(self, documents: Sequence[Document]) -> int:
        """Supervised tokens of the optimizer step: what its summed loss is divided by."""
        count = sum(document.supervised_tokens for document in documents)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = int(self.accelerator.gather(torch.tensor(count, device=self.args.device)).sum())
        return count

    def _fused_training_step(self, step: FusedStep, documents: Sequence[Document], supervised: int) -> torch.Tensor:
        if not self.model.training:
            self.model.train()
        count = max(supervised, 1)
        step.forward_backward(documents, count)
        step.bound.flat.expose_gradients()
        metrics_3 = step.metrics_3 / count
        for name, index in METRICS.items():
            metrics(self, "train")[name].append(metrics_3[index])
        count_tokens(self, sum(len(document.ids_L) for document in documents))
        return metrics_3[0]

    def _plain_training_step(
        self, model: torch.nn.Module, documents: Sequence[Document], supervised: int
    ) -> torch.Tensor:
        """The step through transformers and autograd, in as few passes as a micro-batch's tokens allow."""
        batches = self._plain_batches(documents)
        self.current_gradient_accumulation_steps = len(batches)  # TRL averages a router's auxiliary loss over these
        losses = []
        for batch in batches[:-1]:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, supervised))
        losses.append(super().training_step(model, batches[-1], supervised))
        return torch.stack(losses).sum()

    def _plain_batches(self, documents: Sequence[Document]) -> list[dict[str, torch.Tensor]]:
        """Padding-free rows of at most a micro-batch of longest documents, or padded micro-batches."""
        size = self.args.per_device_train_batch_size
        if self.padded_because is not None:
            return [self._padded(documents[start : start + size]) for start in range(0, len(documents), size)]
        if self.max_tokens is None:
            return [padding_free_row(documents)]
        runs = split_by_tokens([len(document.ids_L) for document in documents], size * self.max_tokens)
        return [padding_free_row(documents[run]) for run in runs]

    @cached_property
    def padded_because(self) -> str | None:
        """Why the plain path takes padded batches: documents of one row would not be isolated. None where they are.

        Asked at the first pass of the plain path, as the answer may take a probe of a second.
        """
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            reason: str | None = "virtual tokens stand before a row, and would before its first document alone"
        else:
            reason = why_not_packed(self.model, self.max_tokens)
        if reason is not None:
            logger.warning("padded batches in place of packed rows: %s", reason)
        return reason

    def _padded(self, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
        assert self.padded_collator is not None, "batches of documents come with Parley's collators"
        return self.padded_collator.pad_documents(documents)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        if self.fused_step is None:
            return super()._clip_grad_norm(model)
        grad_Z = self.fused_step.bound.flat.grad_Z
        norm = torch.linalg.vector_norm(grad_Z)
        # As torch.nn.utils.clip_grad_norm_ does, without waiting for the device.
        grad_Z.mul_(torch.clamp(self.args.max_grad_norm / (norm + 1e-6), max=1.0))
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.fused_step is not None and grad_norm is None:
            return torch.linalg.vector_norm(self.fused_step.bound.flat.grad_Z)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    # ---- Evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL, and the model is left in the mode it was in."""
        training = self.model.training
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.model.train(training)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop. Held-out loss is the mean over the set's supervised tokens, not a mean of batch means."""
        self._sums_4 = torch.zeros(4, device=self.args.device, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        *sums, count = self.accelerator.reduce(self._sums_4, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = sums[0] / max(count, 1)
        output.metrics[f"{metric_key_prefix}_supervised_tokens"] = int(count)
        averages = {name: sums[index] / max(count, 1) for name, index in METRICS.items()}
        for name, value in (averages | {"num_tokens": tokens_seen(self)}).items():
            metrics(self, "eval")[name] = [value]
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss of a batch, and what `evaluation_loop` sums."""
        documents = inputs.get(DOCUMENTS)
        if documents is not None and self.fused_step is not None and adapters_enabled(self.model):
            count = sum(document.supervised_tokens for document in documents)
            metrics_3 = self.fused_step.forward_only(documents)
            self._sums_4[:3] += metrics_3
            self._sums_4[3] += count
            return metrics_3[0] / max(count, 1), None, None
        batch = inputs
        if documents is not None:
            batch = padding_free_row(documents) if self.padded_because is None else self._padded(documents)
        loss, logits, labels = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)
        count = int((batch["labels"][..., 1:] != IGNORE_INDEX).sum())
        # TRL appends each batch's means; the set's own are weighted by tokens.
        means = [loss, *(metrics(self, "eval")[name].pop() for name in METRICS), 1.0]
        self._sums_4 += torch.stack([torch.as_tensor(mean).to(self._sums_4) for mean in means]) * count
        return loss, logits, labels

    # ---- Figures ----

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Trainer counts them; the model's parameters are counted once, not at every step."""
        if DOCUMENTS not in inputs:
            return super().floating_point_ops(inputs)
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops({"input_ids": torch.empty(1)})
        return int(self._flops_per_token * sum(len(document.ids_L) for document in inputs[DOCUMENTS]))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if documents := inputs.get(DOCUMENTS):
            inputs = padding_free_row(documents)
        super()._track_num_input_tokens(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the figures that stayed on the device, in one transfer."""
        for values in metrics(self, "train").values():
            if values and isinstance(values[0], torch.Tensor):
                values[:] = torch.stack(values).tolist()
        super().log(logs, start_time)


def adapters_enabled(model: torch.nn.Module) -> bool:
    """Whether the forward pass goes through the adapters; PeftModel.disable_adapter switches them off for a while."""
    return not any(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))
