"""`parley.GRPOTrainer`: TRL's trainer, whose answers Parley's decoder samples and whose loss the packed step learns.

TRL's own code makes groups, calls rewards, and computes advantages, loss and figures. What is put in its place is the
sampling of answers, the log-probabilities of their tokens, and the backward pass. What differs is in
docs/how-to/preferences.md.

Shape suffixes (legend in docs/design.md): see policy_step.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl.trainer.utils import RepeatSampler

from parley.data.messages import parse_messages
from parley.data.packing import ORIGIN, Document, PaddedCollator
from parley.data.tool_calls import parse_tools
from parley.errors import DataError, UsageError
from parley.grpo.policy_step import MicroBatch, PolicyStep, TokenScores
from parley.grpo.rewards import checked_reward
from parley.grpo.sampler import EpochSampler
from parley.inference.output_processor import control_token_stops
from parley.inference.prompts import context_length, end_of_turn_ids, prompt_ids
from parley.inference.rollouts import RolloutDecoder
from parley.library_compat.trl import count_tokens, generation_state, metrics, set_generation_state
from parley.train_step.bind import BoundModel
from parley.train_step.fused_step import FusedStep
from parley.train_step.ops import LogitTransform
from parley.train_step.slots import Slots
from parley.training.log_prob_trainer import LogProbTrainer
from parley.training.preference.config import GRPOConfig
from parley.training.preference.grpo_options import check_options, sampling_settings
from parley.training.preference.reference import Reference
from parley.training.preference.trainers import pad_rows
from parley.training.trainer import restore_adapters

MAX_SLOTS = 256
"""The most answers that are sampled at a time: more gain nothing, and each has its KV cache."""


SAMPLED_ROWS = 2000
"""Rows whose prompts are measured before training: longer ones make buffers grow when they come."""
MAX_TOKENS = 4096
"""Tokens of an answer where neither max_completion_length nor the model has a limit."""


class GRPOTrainer(LogProbTrainer, trl.GRPOTrainer):
    """Group relative policy optimization. Takes what TRL's GRPOTrainer takes, and:

    Args:
        engine, memory: see FusedTrainer.
        nonfinite, nonfinite_limit: see PackedTrainer.
        tokenizer: older name of `processing_class`.

    Raises:
        UsageError: options that cannot have effect, by their names.
        RewardError: from `train`, for a reward function that raises or returns no numbers.
        ValueError, TypeError: what TRL's trainer refuses.
    """

    group_size = 1
    reward_funcs: list[Any]
    eos_token_ids: list[int]
    _current_train_step_time: float

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *positional: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and processing_class is not None:
            raise UsageError("got both tokenizer and processing_class; pass one of them")
        args = copy.deepcopy(args) if args is not None else GRPOConfig(f"{_name(model)}-GRPO")
        if args.world_size > 1:
            raise UsageError(
                f"GRPO trains in one process, and here are {args.world_size}: start it without --gpus and torchrun"
            )
        check_options(args)
        self._scores: TokenScores | None = None  # of the micro-batch whose loss TRL computes
        self._micro_batches: list[MicroBatch] = []  # of the step that is arriving
        self._row_tools: list[Any] = []  # of the generation that is sampled
        self._eval_loss = [0.0, 0]  # of an evaluation: summed over its rows, and their number
        self._eval_tokens = 0
        self.reference: Reference | None = None
        beta, args.beta = args.beta, 0.0  # TRL would keep a second adapter, or load a second model
        originals = (
            {} if isinstance(model, str) else {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        )
        try:
            super().__init__(
                model,
                list(reward_funcs) if isinstance(reward_funcs, list | tuple) else reward_funcs,
                args,
                train_dataset,
                eval_dataset,
                processing_class or tokenizer,
                *positional,
                **kwargs,
            )
        finally:  # also where the data set is refused: the model is the caller's
            if not isinstance(model, str):
                restore_adapters(model, originals)
        self.compute_loss_func = None  # TRL's mark for older releases of transformers that losses are scaled
        self.beta = self.args.beta = beta
        if beta:
            self.reference = self.ref_model = Reference(self.model)
        self.monitor.watches_spikes = False  # a policy gradient's loss is no measure of how good the policy is
        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else checked_reward(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self.sampling = sampling_settings(args, context_length(self.model) or MAX_TOKENS)
        stops = control_token_stops(self._tokenizer, self.sampling.stop)
        self.eos_token_ids = sorted({*self.eos_token_ids, *end_of_turn_ids(self.model, self._tokenizer), *stops})
        slots = min(args.generation_batch_size, MAX_SLOTS)
        self.rollouts = RolloutDecoder(self.model, self._tokenizer, slots=slots, plain=self.engine == "plain")
        self.padded_collator = PaddedCollator(pad_rows)
        if isinstance(self.train_dataset, Dataset) and self.environment_factories is None:
            # Buffers are for answers to these prompts, not for the model's context.
            self.max_tokens = min(int(self.row_lengths().max()), context_length(self.model) or MAX_TOKENS)

    # ---- What FusedTrainer asks ----

    def _unsupported_option(self) -> str | None:
        for unsupported, reason in (
            (self.args.top_entropy_quantile < 1, "top_entropy_quantile"),
            (self.args.entropy_coef != 0 or self.args.use_adaptive_entropy, "an entropy bonus"),
        ):
            if unsupported:
                return reason
        return super()._unsupported_option()

    def _build_fused_step(self, bound: BoundModel) -> FusedStep:
        # c tanh(s z / c) / t is the transform with s / t and c / t.
        logits, temperature = bound.logits, self.temperature
        cap = None if logits.softcap is None else logits.softcap / temperature
        transform = LogitTransform(logits.scale / temperature, cap)
        return super()._build_fused_step(BoundModel(**(vars(bound) | {"logits": transform})))

    def row_lengths(self) -> NDArray[np.integer]:
        """The most tokens of a completion with its prompt, for at most SAMPLED_ROWS rows; a stream's are not known."""
        rows = self.train_dataset
        if not isinstance(rows, Dataset) or self.environment_factories is not None:
            return np.array([self.longest_row])
        sampled = rows.select(range(0, len(rows), -(-len(rows) // SAMPLED_ROWS)))
        self._row_tools = list(sampled["tools"]) if "tools" in sampled.column_names else []
        ids, _, _ = self._tokenize_prompts(list(sampled["prompt"]))
        return np.array([len(prompt) for prompt in ids]) + self.sampling.max_new_tokens

    def longest_evaluated(self) -> int:
        return 0 if self.eval_dataset is None else self.longest_row

    def recorded_settings(self) -> dict[str, Any]:
        names = [
            f"{name} x {float(weight):g}"
            for name, weight in zip(self.reward_func_names, self.reward_weights, strict=True)
        ]
        return super().recorded_settings() | {"rewards": names}

    # ---- Data ----

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(sampler) if isinstance(sampler, RepeatSampler) and sampler.shuffle else sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        size, group = self.args.per_device_eval_batch_size, self.num_generations_eval
        if size % group:
            raise UsageError(
                f"per_device_eval_batch_size: got {size}; wanted a multiple of the {group} answers to a prompt, "
                f"such as {group * max(1, size // group)}"
            )
        return super().get_eval_dataloader(eval_dataset)

    # ---- Rollouts ----

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        """As Parley renders them for training and chat, where nothing of TRL's own asks for another template."""
        ids, images, fields = self._rendered_prompts(prompts)
        if (longest := vars(self.args).get("max_prompt_length")) is not None:
            ids = [each[-longest:] for each in ids]
        return ids, images, fields

    def _rendered_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        own = isinstance(prompts[0], list) and self.environment_factories is None and not self.tools
        if not own or self.chat_template_kwargs or self._is_vlm:
            return super()._tokenize_prompts(prompts)
        rendered: list[list[int]] = []
        tools = self._row_tools or [None] * len(prompts)
        for index, prompt in enumerate(prompts):
            if index and (prompt, tools[index]) == (prompts[index - 1], tools[index - 1]):  # groups are neighbours
                rendered.append(rendered[-1])
                continue
            messages = parse_messages(prompt, "a prompt", "prompt")
            parsed = parse_tools(tools[index], "a prompt")
            rendered.append(prompt_ids(self.model, self._tokenizer, messages, parsed))
        return rendered, None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], None]:
        if images is not None:
            raise UsageError("images: Parley trains on text alone; remove the column, or use trl.GRPOTrainer")
        started, before = perf_counter(), self.rollouts.tokens
        # Of torch's generator, whose state is part of a checkpoint.
        seeds = torch.randint(2**62, (len(prompt_ids),)).tolist()
        completions = self.rollouts.sample(
            prompt_ids, self.sampling, seeds, self.eos_token_ids, self._dequantized_weights()
        )
        seconds = perf_counter() - started
        figures = metrics(self, "train" if self.model.training else "eval")
        figures["sampling/seconds"].append(seconds)
        figures["sampling/tokens_per_s"].append((self.rollouts.tokens - before) / seconds)
        return completions, None

    def _dequantized_weights(self) -> list[Tensor] | None:
        """Each layer's base weights as the fused step keeps them on a GPU, in the order of ModelWeights.linears."""
        step = self.fused_step
        if step is None or not step.plan.cache_matrices or self.args.device.type == "cpu":
            return None
        return [
            linear.matrix.forward_NKP[:, : linear.in_features]
            for linear in step.bound.linears
            if linear.matrix is not None
        ]

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        if empty := [index for index, ids in enumerate(generated[1]) if not ids]:
            raise DataError(f"rollout_func: completion {empty[0]} is empty; wanted at least its end token")
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> MicroBatch:
        self._row_tools = [row.get("tools") for row in inputs]
        scored = super()._generate_and_score_completions(inputs)
        return scored | {ORIGIN: [str(row.get(ORIGIN, "")) for row in inputs]}

    # ---- Log-probabilities ----

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """(B, L) each. Within a step they are what the packed pass has computed; elsewhere they have no gradient."""
        scores = self._scores
        if scores is None:
            start = input_ids.shape[1] - logits_to_keep
            batch = {
                "prompt_ids": input_ids[:, :start],
                "prompt_mask": attention_mask[:, :start],
                "completion_ids": input_ids[:, start:],
                "completion_mask": attention_mask[:, start:],
            }
            scores = self._measure(batch, of_reference=model is self.ref_model)
        return scores.logps_BL, scores.entropies_BL if compute_entropy else None, None

    @torch.no_grad()
    def _measure(self, batch: MicroBatch, *, of_reference: bool) -> TokenScores:
        found: list[TokenScores] = []

        def keep(_: MicroBatch, scores: TokenScores, last: bool) -> Tensor:
            found.append(scores)
            return scores.logps_BL.sum()

        step = PolicyStep([batch], keep, self._mean_entropy)
        training = self.model.training
        if of_reference:
            assert self.reference is not None
            self.model.eval()  # a reference has no dropout
            try:
                with self.reference.weights(self.model):
                    step.evaluate(self.policy_sums(step.documents, step.slots))
            finally:
                self.model.train(training)
        else:
            step.evaluate(self.policy_sums(step.documents, step.slots))
        return found[0]

    def _mean_entropy(self, tokens: int) -> Tensor:
        """Of the `tokens` of the fused step's last pass."""
        assert self.fused_step is not None
        return self.fused_step.metrics_3[2] / max(tokens, 1)

    def plain_sums(self, model: torch.nn.Module, documents: Sequence[Document], slots: Slots) -> Tensor:
        """Log-probabilities and entropies by slot, (2, slots.count), through TRL's own head, which has no logits."""
        sums = torch.zeros(2, slots.count, device=self.args.device)
        for run in self._plain_runs(documents):
            batch = self.packed_or_padded(documents[run])
            inputs = {name: value.to(self.args.device) for name, value in batch.items()}
            with self.compute_loss_context_manager():
                outputs = model(**inputs, fused_lm_head=True)
            supervised = outputs.label_mask
            values_2S = torch.stack([outputs.log_probs[supervised], outputs.entropy[supervised]])
            sums = sums.index_add(1, slots.of(run).to(sums.device), values_2S)
        return sums

    # ---- Training ----

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Any,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of a whole optimizer step at its last micro-batch. Returns its loss, and 0 before."""
        started = perf_counter()
        if not self._rehearsed:
            self._rehearsed = True
            if self.wants_rehearsal:
                self.rehearse(model)
        if not self.model.training:
            self.model.train()
        self._micro_batches.append(self._prepare_inputs(inputs))
        self._step += 1
        if not self.accelerator.sync_gradients:
            self._current_train_step_time += perf_counter() - started
            return torch.zeros((), device=self.args.device)
        self._check_trainable()
        batches, self._micro_batches = self._micro_batches, []
        step = PolicyStep(batches, self._micro_batch_loss, self._mean_entropy)
        self.step_on_sums(model, step)
        self.supervised_tokens += step.supervised_tokens
        count_tokens(self, sum(len(document.ids_L) for document in step.documents))
        metrics(self, "train")["step_time"].append(self._current_train_step_time + perf_counter() - started)
        self._current_train_step_time = 0.0
        return self.monitor.add_loss(step.loss, step.documents)

    def _micro_batch_loss(self, batch: MicroBatch, scores: TokenScores, last: bool) -> Tensor:
        self._scores = scores
        self.accelerator.sync_gradients = last  # TRL's entropy controller moves on at the last one
        try:
            return self._compute_loss(self.model, batch)
        finally:
            self._scores, self.accelerator.sync_gradients = None, True

    # ---- Evaluation ----

    def begin_evaluation(self) -> None:
        metrics(self, "eval").clear()
        self._eval_loss, self._eval_tokens = [0.0, 0], 0

    def evaluation_figures(self) -> tuple[float, int, dict[str, float]]:
        """As in PackedTrainer; TRL's figures, means over the set's batches."""
        total, rows = self._eval_loss
        figures = {name: [float(value) for value in values] for name, values in metrics(self, "eval").items()}
        means = {name: float(np.nanmean(values)) for name, values in figures.items() if not np.isnan(values).all()}
        return total / max(rows, 1), self._eval_tokens, means

    @torch.no_grad()
    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        batch = self._prepare_inputs(inputs)
        loss = self._compute_loss(model, batch).detach()
        rows = len(batch["completion_ids"])
        self._eval_loss[0] += float(loss) * rows
        self._eval_loss[1] += rows
        self._eval_tokens += int(batch["completion_mask"].sum())
        return loss, None, None

    # ---- Checkpoints ----

    def _counters(self) -> dict[str, Any]:
        return super()._counters() | {"generation": generation_state(self)}

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        super()._restore_counters(counters)
        set_generation_state(self, counters["generation"])


def _name(model: Any) -> str:
    name = model if isinstance(model, str) else model.config.name_or_path
    return name.rstrip("/").rpartition("/")[2] or "model"
