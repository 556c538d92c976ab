"""The captured path in TRL's trainer (train_step/captured_step.py): between the fused step and the plain path."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.tensor import DTensor
from trl import SFTConfig

from parley.data.packing import DOCUMENTS, Document, loss_weight
from parley.errors import UsageError
from parley.library_compat.trl import count_tokens, metrics
from parley.models.packing_isolation import LENGTH_DEPENDENT_ROPE
from parley.train_step.bind import Unsupported
from parley.train_step.captured_step import SPARE, CapturedStep, base_of, check_captured
from parley.train_step.context_parallel import ContextGroup
from parley.training.dealing import deal_documents
from parley.training.out_of_memory import Result, Stage, halved_limit, lengths_of
from parley.training.packed_evaluation import METRICS
from parley.training.processes import group_of, sum_all_in_place
from parley.training.sharded_trainer import ShardedTrainer

logger = logging.getLogger(__name__)

MAX_PASS_TOKENS = 16384  # more are no faster, and activations are saved whole
SAMPLED_STEPS, RARE_STEPS = 400, 4  # before training, to capture their sizes; as many at either end are left out
READ_STEPS = 64  # of these, for their supervised tokens


def unsupported_captured_option(args: SFTConfig) -> str | None:
    """The first option in `args` that the captured step does not implement."""
    for unsupported, reason in (
        (args.fp16, "fp16"),
        (args.loss_type not in ("nll", "dft"), f"loss {args.loss_type}"),
        (args.use_liger_kernel, "Liger kernels"),
        (args.torch_compile, "torch_compile"),
        (args.activation_offloading, "activation offloading"),
    ):
        if unsupported:
            return reason
    return None


def captured_pass_tokens(longest: int, rows: int) -> int:
    """Tokens of a pass, where the longest row has `longest` and a step `rows` rows."""
    return max(longest, min(longest * rows, MAX_PASS_TOKENS))


def supervised_share(documents: Sequence[Document]) -> float:
    """Of the tokens of a step."""
    return sum(document.supervised_tokens for document in documents) / sum(len(d.ids_L) for d in documents)


class CapturedTrainer(ShardedTrainer):
    """ShardedTrainer, whose passes are the captured step's once `bind_captured_step` has taken it.

    `captured_step` is None on the plain path, for which `plain_because` gives the reason.
    """

    captured_step: CapturedStep | None = None
    plain_because: str | None = None

    def __init__(self, *args: Any, context_parallel: int = 1, **kwargs: Any) -> None:
        self.context_parallel = context_parallel
        super().__init__(*args, **kwargs)

    def bind_captured_step(self) -> None:
        """Take the captured step, or set `plain_because`."""
        try:
            self._check_captured_options()
            base = base_of(self.model)
            if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
                raise Unsupported("virtual tokens precede a row")
            check_captured(self.model, self.max_tokens)
            if self.passes_together and self.args.gradient_checkpointing:  # passes are not captured
                base.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                base.gradient_checkpointing_disable()  # a capture cannot restore random states for a second pass
            self.captured_step = CapturedStep(
                self.model,
                tokens=self._pass_tokens(),
                autocast=torch.bfloat16 if self.args.bf16 else None,
                smoothing=self._smoothing,
                dft=self.args.loss_type == "dft",
                noise=bool(self.args.neftune_noise_alpha),
                router_loss=self.router_coefficient / self.shares,
                context=self._context_group(),
            )
        except Unsupported as reason:
            if self.passes_together:
                raise self._cannot_pass_together(reason) from None
            self.plain_because = str(reason)

    @property
    def passes_together(self) -> bool:
        """Whether each pass is one of several processes, which exchange weights or tokens in it."""
        return self.sharded or self.context_parallel > 1

    def _cannot_pass_together(self, reason: Unsupported) -> UsageError:
        option = "training.shard: none" if self.sharded else "training.context_parallel: 1"
        return UsageError(f"{reason}: this is not trained in passes of several processes; set {option}")

    def _context_group(self) -> ContextGroup | None:
        if self.context_parallel == 1:
            return None
        rope = json.dumps(vars(self.model.config.get_text_config()).get("rope_parameters"), default=str)
        if LENGTH_DEPENDENT_ROPE.search(rope):
            raise Unsupported("rotary embeddings that depend on a row's length")
        rank, group = group_of(self.context_parallel)
        return ContextGroup(rank, self.context_parallel, group)

    def _check_captured_options(self) -> None:
        """Raises Unsupported for an option that the captured step does not implement."""
        if (reason := unsupported_captured_option(self.args)) is not None:
            raise Unsupported(reason)
        for unsupported, reason in (
            (self.compute_loss_func is not None, "a loss function of its own"),
            (self.is_deepspeed_enabled or self.is_fsdp_enabled, "DeepSpeed or FSDP"),
            (
                self.router_coefficient and self.passes_together,
                "the router's auxiliary loss (training.router_aux_loss_coef: 0 leaves it out)",
            ),
        ):
            if unsupported:
                raise Unsupported(reason)

    @property
    def router_coefficient(self) -> float:
        """Of the router's auxiliary loss, as TRL decides: 0 beside label smoothing and for models without experts."""
        left_out = not self.aux_loss_enabled or self._smoothing > 0
        return 0.0 if left_out else float(self.router_aux_loss_coef)

    @property
    def _smoothing(self) -> float:
        """TRL smooths the labels of its default loss alone."""
        return self.args.label_smoothing_factor if self.args.loss_type == "nll" else 0.0

    def _pass_tokens(self) -> int:
        longest = int(self.row_lengths().max())
        return captured_pass_tokens(longest, self.rows_per_step)

    # ---- Training ----

    def _step_on_documents(
        self, model: torch.nn.Module, documents: Sequence[Document], supervised: int, divisor: float
    ) -> torch.Tensor:
        step = self.captured_step
        if step is None:
            return super()._step_on_documents(model, documents, supervised, divisor)
        self.model.train()
        count, share = max(supervised, 1), self.own_share(documents)
        passes = self._common_passes(documents)
        try:
            self._retry_captured("training", share, lambda: step.forward_backward(share, divisor, passes))
        except Unsupported as reason:  # what only a pass in training mode shows, as dropout of attention
            self.model.zero_grad()
            self._give_up_captured_step(str(reason))
        if self.captured_step is None:  # also where memory ran out for a single document
            return super()._step_on_documents(model, documents, supervised, divisor)
        if self.deals_documents:  # FSDP has summed the gradients of sharded weights
            replicated = [gradient for gradient in step.gradients if not isinstance(gradient, DTensor)]
            sum_all_in_place([*replicated, step.metrics_3, *([] if step.router is None else [step.router.total])])
        metrics_3 = step.metrics_3
        for name, index in METRICS.items():
            metrics(self, "train")[name].append(metrics_3[index] / count)
        count_tokens(self, sum(len(document.ids_L) for document in documents))
        loss = metrics_3[0] / divisor
        if step.router is not None:
            router_loss = step.router.total / self.shares
            metrics(self, "train")["aux_loss"].append(router_loss)
            loss = loss + self.router_coefficient * router_loss
        return loss

    def _common_passes(self, documents: Sequence[Document]) -> int:
        """The most passes that a process has for its share of `documents`, where each pass is one of all processes."""
        step = self.captured_step
        if step is None or not self.sharded:
            return 0
        return max(map(step.count_passes, deal_documents(documents, self.shares)))

    def rehearse_step(self, model: torch.nn.Module, documents: Sequence[Document]) -> None:
        if self.captured_step is None:
            super().rehearse_step(model, documents)
        else:
            supervised = sum(document.supervised_tokens for document in documents)
            self._step_on_documents(model, documents, supervised, loss_weight(documents))
            self._rehearse_typical_steps()

    def _rehearse_typical_steps(self) -> None:
        """Have the graph threshold measured, and the sizes captured that the data's steps will have."""
        if self.captured_step is None or not self.captured_step.uses_graphs:
            return
        steps, self.captured_step.row_share = self._typical_steps()
        for documents in steps:
            step = self.captured_step
            if step is None or not step.uses_graphs:
                return
            share = self.own_share(documents)
            self._retry_captured("rehearsal", share, partial(step.forward_backward, share, loss_weight(documents)))

    def _typical_steps(self) -> tuple[list[Sequence[Document]], float]:
        """Steps of randomly sampled rows, each smaller than the one before by what a captured size allows.

        And the largest share of supervised tokens in such steps.
        """
        rows = self.train_dataset
        if not isinstance(rows, Dataset) or self.padded_collator is None:
            return [], 0.0
        samples = np.random.default_rng(0).integers(len(rows), size=(SAMPLED_STEPS, self.rows_per_step))
        tokens = self.row_lengths()[samples].sum(1)
        chosen: list[int] = []
        for index in np.argsort(-tokens)[RARE_STEPS:-RARE_STEPS]:
            if not chosen or SPARE * tokens[index] < tokens[chosen[-1]]:
                chosen.append(int(index))

        def documents(index: int) -> Sequence[Document]:
            return self.data_collator([rows[int(i)] for i in samples[index]])[DOCUMENTS]

        share = max(map(supervised_share, map(documents, range(READ_STEPS))))
        # The first of these is timed without a graph, and captured when it comes again.
        return [documents(index) for index in chosen[:1] + chosen], share

    def _retry_captured(self, during: Stage, documents: Sequence[Document], attempt: Callable[[], Any]) -> Any:
        """`attempt()`, with passes halved while memory runs out; the plain path where one document does not fit.

        Where others wait in the middle of the pass, memory that runs out ends the run.
        """
        if self.passes_together:
            try:
                return attempt()
            except Unsupported as reason:
                raise self._cannot_pass_together(reason) from None

        def reduce() -> bool:
            step = self.captured_step
            assert step is not None
            self.model.zero_grad()
            tokens = halved_limit(lengths_of(documents), step.tokens)
            if tokens is None:
                if self.deals_documents:  # the other processes stay on this path
                    return False
                self._give_up_captured_step("out of memory on the captured path")
                return True
            step.limit_pass(tokens)
            self.record_reduction(during, f"passes of at most {tokens:,} tokens")
            return True

        def attempt_if_captured() -> Result | None:
            return None if self.captured_step is None else attempt()

        return self.retry(attempt_if_captured, reduce, collective=False)

    def _give_up_captured_step(self, reason: str) -> None:
        self.captured_step, self.plain_because = None, reason
        logger.warning("plain path: %s", reason)
        if self.args.gradient_checkpointing:
            base_of(self.model).gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        documents, step = inputs.get(DOCUMENTS), self.captured_step
        if documents is None or step is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        passes = self._common_passes(documents)
        documents = self.own_share(documents)
        metrics_3 = self._retry_captured("evaluation", documents, lambda: step.forward_only(documents, passes))
        if metrics_3 is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.sums_5[:3] += metrics_3
        if step.context is None or step.context.rank == 0:  # the others of a group have the same documents
            self.sums_5[3] += sum(document.supervised_tokens for document in documents)
            self.sums_5[4] += sum(document.loss_weight for document in documents)
        return metrics_3[0] / loss_weight(documents), None, None
