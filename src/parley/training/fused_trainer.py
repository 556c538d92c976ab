"""The fused training step in TRL's trainer: which models and options take it, and what of the plain path it replaces.

Shape suffixes: see docs/design.md.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from transformers.training_args import OptimizerNames, TrainingArguments
from trl import SFTConfig

from parley.data.packing import DOCUMENTS, Document, loss_weight
from parley.errors import RunError, one_line
from parley.library_compat.trl import count_tokens, metrics
from parley.train_step.bind import BoundModel, Unsupported, bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.masked_update import MaskedUpdate
from parley.train_step.memory_plan import MemoryPlan, make_plan, sampled_steps
from parley.train_step.optimizer import AdamW8bit
from parley.training.captured_trainer import CapturedTrainer
from parley.training.optimizer_memory import state_bytes
from parley.training.optimizer_state import StateLayout, check_shapes, with_parameter_state
from parley.training.out_of_memory import Result, Stage, halved_limit, lengths_of
from parley.training.packed_evaluation import METRICS
from parley.training.processes import sum_in_place
from parley.training.regional_compile import MIN_STEPS, compile_layers
from parley.training.rehearsal import rehearse_saving
from parley.training.resume_state import this_device

logger = logging.getLogger(__name__)

BITSANDBYTES = (OptimizerNames.ADAMW_BNB, OptimizerNames.ADAMW_8BIT)
TORCH = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


class FusedTrainer(CapturedTrainer):
    """PackedTrainer, which takes the fused step where model and options allow it, else the captured one.

    Args:
        engine: "auto" takes the fused step for every model and option that it supports, else on a GPU the captured
            path, else the plain one, and logs which and why; "captured" and "plain" leave out those before.
        memory: "auto", "low", or the GiB of device memory that the run may take.

    `fused_step` is None until `bind_fused_step`, and stays None on the other paths: `captured_step` is set on the
    captured one, `plain_because` gives the reason for the plain one.
    """

    optimizer: torch.optim.Optimizer | None

    left_to_fused_step: str | None = None  # the line that names options which the fused step does not follow

    def __init__(
        self,
        *args: Any,
        engine: Literal["auto", "captured", "plain"] = "auto",
        memory: Literal["auto", "low"] | float = "auto",
        **kwargs: Any,
    ) -> None:
        self.engine, self.memory = engine, memory
        self.fused_step: FusedStep | None = None
        self._masked: MaskedUpdate | None = None  # the optimizer of the fused step
        self.plain_because = "engine: plain" if engine == "plain" else None
        super().__init__(*args, **kwargs)

    # ---- Binding, optimizer and scheduler ----

    def bind_fused_step(self) -> None:
        """Decide between the fused step, the captured and the plain path, once; every later call does nothing.

        `train` does this by itself; call it earlier to measure held-out loss on the fused step before training. A
        model whose adapters are switched off for a while is not judged by that, and an optimizer that was handed in
        keeps the plain path.
        """
        undecided = self.fused_step is None and self.captured_step is None and self.plain_because is None
        if undecided and self.optimizer is None and adapters_enabled(self.model):
            self.fused_step = self._bind()

    @property
    def fast(self) -> FusedStep | None:
        """Name of `fused_step` in the version before."""
        warnings.warn("SFTTrainer.fast is now SFTTrainer.fused_step", FutureWarning, stacklevel=2)
        return self.fused_step

    def bind_fast(self) -> None:
        """Name of `bind_fused_step` in the version before."""
        warnings.warn("SFTTrainer.bind_fast is now SFTTrainer.bind_fused_step", FutureWarning, stacklevel=2)
        self.bind_fused_step()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One parameter, the flat one, on the fused step; the same classes and settings as TRL's.

        Raises UsageError where every weight is frozen.
        """
        self._check_trainable()
        self.bind_fused_step()
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if self.fused_step is None:
            optimizer = super().create_optimizer(model)
            if self.captured_step is not None and not self.sharded and self.args.optim in BITSANDBYTES:
                # The groups hold its settings. TRL's exception, 32 bits for embeddings, is bitsandbytes' to keep.
                self.optimizer = optimizer = AdamW8bit(optimizer.param_groups)
            return optimizer
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
        self.optimizer = self._masked = with_parameter_state(optimizer_class, layout)(groups, **settings)
        self._masked.idle = self.fused_step.idle_buffers
        self.fused_step.bound.flat.keep_frozen(self.optimizer)
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
        compiled = self.plain_because is not None and self.engine == "auto" and self.args.device.type == "cuda"
        if compiled and num_training_steps >= MIN_STEPS and not self.args.torch_compile:
            count = compile_layers(self.model)
            logger.info("%d layers are compiled at the first step", count)
        return super().create_scheduler(num_training_steps, optimizer)

    def _bind(self) -> FusedStep | None:
        try:
            if self.engine == "captured":
                raise Unsupported("engine: captured")
            if self.sharded:
                raise Unsupported("weights are sharded")
            if self.context_parallel > 1:
                raise Unsupported(f"rows are split over {self.context_parallel} processes")
            self._check_options()
            bound = bind(self.model)
            if self.args.bf16 and bound.dtype != torch.bfloat16:
                raise Unsupported(f"{bound.dtype} weights trained in bfloat16")
        except Unsupported as reason:
            self._take_another_path(str(reason))
            return None
        if self.left_to_fused_step is not None:
            logger.warning("%s", self.left_to_fused_step)
        return self._build_fused_step(bound)

    def _take_another_path(self, reason: str) -> None:
        """`reason`: why the fused step is not taken."""
        # On a CPU nothing is won by a capture.
        if self.engine == "captured" or self.passes_together or self.args.device.type == "cuda":
            self.bind_captured_step()
            if self.captured_step is not None:
                logger.warning("captured path: %s", reason)
                return
            reason = f"{reason}; no captured path: {self.plain_because}"
        self.plain_because = reason
        logger.warning("plain path: %s", reason)

    def _build_fused_step(self, bound: BoundModel) -> FusedStep:
        """The step, with all of its buffers allocated on a GPU; with memory low where they do not fit after all."""
        memory = self.memory

        def build() -> FusedStep:
            plan = self._plan(bound, memory)
            for line in plan.describe():
                logger.info("%s", line)
            step = FusedStep(bound, plan)
            step.compile()
            longest = max(self.longest_evaluated(), plan.positions)
            step.reserve(max(longest, plan.tokens), longest)
            lengths = self.row_lengths()
            step.prepare_attention(lengths)
            if len(lengths) > 1:  # of a stream, whose rows are unknown, each size is captured when it comes
                step.prepare_graphs(np.minimum(sampled_steps(lengths, self.rows_per_step), plan.tokens))
            return step

        def reduce() -> bool:
            nonlocal memory
            if memory == "low":
                return False
            memory = "low"
            for linear in bound.linears:
                linear.matrix = None
            self.record_reduction("rehearsal", "training.memory: low")
            return True

        return self.retry(build, reduce, collective=False)

    def _check_options(self) -> None:
        """Raises Unsupported for an option that the fused step does not implement."""
        if (reason := self._unsupported_option()) is not None:
            raise Unsupported(reason)
        for unsupported, reason in (
            (self.is_deepspeed_enabled or self.is_fsdp_enabled, "DeepSpeed or FSDP"),
            (self.compute_loss_func is not None, "a loss function of its own"),
        ):
            if unsupported:
                raise Unsupported(reason)

    def _unsupported_option(self) -> str | None:
        return unsupported_option(self.args)

    def _plan(self, bound: BoundModel, memory: Literal["auto", "low"] | float) -> MemoryPlan:
        # Free memory may differ when a run is resumed, and another split of a step rounds differently. With another
        # `memory` than the run's own, the checkpoint's plan was tried and did not fit.
        resumed = self.resumed
        same_device = resumed is not None and resumed.device == this_device(self.args.device)
        if resumed is not None and resumed.plan and same_device and memory == self.memory:
            return MemoryPlan(**resumed.plan)
        return make_plan(bound, memory, self.row_lengths(), self.rows_per_step, state_bytes(self.args.optim))

    def recorded_plan(self) -> dict[str, Any] | None:
        return None if self.fused_step is None else dataclasses.asdict(self.fused_step.plan)

    def recorded_settings(self) -> dict[str, Any]:
        return super().recorded_settings() | {"engine": self.engine, "memory": self.memory}

    # ---- Training ----

    def _step_on_documents(
        self, model: torch.nn.Module, documents: Sequence[Document], supervised: int, divisor: float
    ) -> torch.Tensor:
        step = self.fused_step
        if step is None:
            return super()._step_on_documents(model, documents, supervised, divisor)
        if not self.model.training:
            self.model.train()
        count, share = max(supervised, 1), self.own_share(documents)
        self._retry_fused("training", share, lambda: step.forward_backward(share, divisor))
        sum_in_place(step.bound.flat.reduce_buffer)  # metrics and gradient
        step.bound.flat.drop_frozen_gradients()
        step.bound.flat.expose_gradients()
        metrics_3 = step.metrics_3
        for name, index in METRICS.items():
            metrics(self, "train")[name].append(metrics_3[index] / count)
        count_tokens(self, sum(len(document.ids_L) for document in documents))
        return metrics_3[0] / divisor

    def rehearse(self, model: torch.nn.Module) -> None:
        if self.fused_step is None:
            super().rehearse(model)
        else:  # its largest pass has been run, and holds all of its buffers (FusedStep.compile)
            rehearse_saving(self)

    def _retry_fused(self, during: Stage, documents: Sequence[Document], attempt: Callable[[], Result]) -> Result:
        """`attempt()`, with the step's passes halved while memory runs out."""
        random_state = torch.get_rng_state()  # what the seeds of dropout are sampled from

        def reduce() -> bool:
            step = self.fused_step
            assert step is not None
            tokens = halved_limit(lengths_of(documents), step.plan.tokens)
            if tokens is None:
                return False
            step.limit_pass(tokens)
            torch.set_rng_state(random_state)
            self.record_reduction(during, f"passes of at most {tokens:,} tokens")
            return True

        return self.retry(attempt, reduce, collective=False)

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
            grad_norm = torch.linalg.vector_norm(self.fused_step.bound.flat.grad_Z)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _mask_update(self, finite: torch.Tensor) -> None:
        """On the fused step the device masks the update by itself; the host does not wait for it."""
        if self._masked is None:
            super()._mask_update(finite)
        else:
            self._masked.finite = finite

    def check_steps(self) -> None:
        skipped = self.monitor.skipped
        super().check_steps()
        if self._masked is not None and self.monitor.skipped > skipped:
            self._masked.forget_steps(self.monitor.skipped - skipped)

    # ---- Evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in PackedTrainer. Where passes are of several processes, none is evaluated by itself."""
        if self.passes_together:
            self.bind_fused_step()
        return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        documents, step = inputs.get(DOCUMENTS), self.fused_step
        if documents is None or step is None or not adapters_enabled(self.model):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        documents = self.own_share(documents)
        metrics_3 = self._retry_fused("evaluation", documents, lambda: step.forward_only(documents))
        self.sums_5[:3] += metrics_3
        self.sums_5[3] += sum(document.supervised_tokens for document in documents)
        self.sums_5[4] += sum(document.loss_weight for document in documents)
        return metrics_3[0] / loss_weight(documents), None, None


def unsupported_option(args: SFTConfig) -> str | None:
    """The first option in `args` that the fused step does not implement."""
    if args.loss_type != "nll":
        return f"loss {args.loss_type}"
    return unsupported_training_option(args)


def unsupported_training_option(args: TrainingArguments) -> str | None:
    """The same, of the options that every trainer has."""
    for unsupported, reason in (
        (args.fp16, "fp16"),
        (args.bf16_full_eval or args.fp16_full_eval, "evaluation in 16 bits"),
        (bool(args.debug), "debug"),
        (args.optim not in (*BITSANDBYTES, *TORCH), f"optimizer {OptimizerNames(args.optim).value}"),
        (args.label_smoothing_factor > 0, "label smoothing"),
        (args.neftune_noise_alpha is not None, "NEFTune noise"),
        (args.optim_target_modules is not None, "optimizer target modules"),
    ):
        if unsupported:
            return reason
    return None


def adapters_enabled(model: torch.nn.Module) -> bool:
    """Whether the forward pass goes through the adapters; PeftModel.disable_adapter switches them off for a while."""
    return not any(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))
