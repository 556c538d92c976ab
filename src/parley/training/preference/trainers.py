"""`parley.DPOTrainer` and `parley.KTOTrainer`: TRL's trainers on the packed step, with Parley's masks.

What differs from TRL's is in docs/how-to/preferences.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from parley.config import DataSection, Overlong
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import PaddedCollator
from parley.data.preferences import Kind, render_preference_stream, render_preferences
from parley.data.summary import DataSummary
from parley.data.supervision import TrainOn
from parley.errors import UsageError
from parley.train_step.bind import has_lora_dropout
from parley.training.option_effects import left_to_the_fused_step, without_effect
from parley.training.preference.config import DPOConfig, KTOConfig
from parley.training.preference.documents import LabelledCollator, PairCollator
from parley.training.preference.losses import DPO, ORPO, Objective, SimPO, dpo_objective, kto_objective
from parley.training.preference.pair_options import pair_options_without_effect
from parley.training.preference.preference_trainer import PreferenceTrainer
from parley.training.trainer import logger, restore_adapters


def _lora_dropout(model: Any, config: Any) -> bool:
    """Whether the adapter of `model`, or the one that `config` is about to add, has dropout."""
    if isinstance(config, LoraConfig):
        return config.lora_dropout > 0
    return isinstance(model, PeftModel) and has_lora_dropout(model)


class _Prepares(PreferenceTrainer):
    """What both trainers share: their arguments, and the rendering of their rows.

    Args, beside those of TRL's trainer:
        engine, memory: see FusedTrainer.
        nonfinite, nonfinite_limit: see PackedTrainer.
        tokenizer: older name of `processing_class`.
        train_on, overlong: as in parley.SFTTrainer; an overlong pair is dropped without a value, and cut at the start
            where `truncation_mode` is "keep_end".
        beta, max_length, max_prompt_length: as in older releases of TRL.
    """

    kind: Kind

    def __init__(
        self,
        model: Any,
        ref_model: torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *positional: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_on: TrainOn = "all",
        overlong: Overlong | None = None,
        beta: float | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and processing_class is not None:
            raise UsageError("got both tokenizer and processing_class; pass one of them")
        if data_collator is not None:
            raise UsageError("data_collator: preference rows come with their own collator; leave it out")
        args = self._own_args(args, model)
        for name, value in {"beta": beta, "max_length": max_length}.items():
            if value is not None:
                setattr(args, name, value)
        if max_prompt_length is not None:
            logger.warning("max_prompt_length has no effect: prompts are not cut; overlong says what becomes of a row")
        self.objective = self._objective(args)
        for line in self.without_effect(args):
            logger.warning("%s", line)
        if args.disable_dropout and _lora_dropout(model, kwargs.get("peft_config")):
            logger.warning("lora_dropout has no effect: disable_dropout is true, TRL's default for preferences")
        # Before TRL fills in options of its own.
        self.left_to_fused_step = left_to_the_fused_step(args)
        if overlong is None:
            overlong = "truncate-start" if vars(args).get("truncation_mode") == "keep_end" else "drop"
        self.train_on, self.overlong, self.max_tokens = train_on, overlong, args.max_length
        self.data_summaries: dict[str, DataSummary] = {}
        if isinstance(args, trl.DPOConfig):
            args.padding_free = False  # TRL would warn of its own packing
        precomputes, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
        adapted = isinstance(model, PeftModel) or "peft_config" in kwargs
        if ref_model is None and not adapted:
            # TRL would load a second model from disk; the reference is a copy of the weights that are trained.
            args.precompute_ref_log_probs = True
        originals = (
            {} if isinstance(model, str) else {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        )
        try:
            super().__init__(
                model,
                ref_model,
                args,
                self._collator(),
                train_dataset,
                eval_dataset,
                processing_class or tokenizer,
                *positional,
                **kwargs,
            )
        finally:  # also where the data set is refused: the model is the caller's
            if not isinstance(model, str):
                restore_adapters(model, originals)
        self.args.precompute_ref_log_probs = precomputes
        self.reference_model = self.ref_model
        self.padded_collator = PaddedCollator(pad_rows)

    def without_effect(self, args: Any) -> list[str]:
        """One line for each option that is set and changes nothing."""
        read = {"label_smoothing"} if isinstance(self.objective, SimPO) else set()
        return without_effect(args) + pair_options_without_effect(args, frozenset(read))

    def _own_args(self, args: TrainingArguments | None, model: Any) -> Any:
        raise NotImplementedError

    def _objective(self, args: Any) -> Objective:
        raise NotImplementedError

    def _collator(self) -> Callable[..., Any]:
        raise NotImplementedError

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Render rows into ids and labels of both answers; those that have them already stay as they are."""
        if any(name.endswith("input_ids") for name in dataset.column_names or next(iter(dataset), {})):
            return dataset
        section = DataSection(train_on=self.train_on, overlong=self.overlong, bad_rows="error")
        longest = self.max_tokens or processing_class.model_max_length
        if isinstance(dataset, IterableDataset):
            return render_preference_stream(
                dataset, processing_class, section, longest, kind=self.kind, where=dataset_name
            )
        rows, summary = render_preferences(
            dataset, processing_class, section, longest, kind=self.kind, where=dataset_name
        )
        self.data_summaries[dataset_name] = summary
        lines = [summary.dropped_line()] if summary.dropped else []
        lines += [summary.shortened_line()] if summary.shortened.count else []
        for line in [*lines, *([summary.unread_line()] if summary.unread else [])]:
            logger.warning("%s: %s", dataset_name, line)
        return rows

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probabilities are measured when a step first needs them, and kept."""
        return dataset


class DPOTrainer(_Prepares, trl.DPOTrainer):
    """Direct preference optimization. Takes what TRL's DPOTrainer takes.

    Args, beside those of _Prepares:
        objective: a loss of parley.training.preference.losses in place of the one that `args` describe.
    """

    kind = "pairs"

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        self._given_objective = objective
        super().__init__(*args, **kwargs)

    def _own_args(self, args: TrainingArguments | None, model: Any) -> Any:
        return _own_config(args, DPOConfig, trl.DPOConfig, f"{_name(model)}-DPO")

    def _objective(self, args: Any) -> Objective:
        return self._given_objective or dpo_objective(args)

    def _collator(self) -> Callable[..., Any]:
        split = isinstance(self.objective, DPO) and self.objective.ld_alpha is not None
        return PairCollator(supervise_prompt=isinstance(self.objective, ORPO), split_tails=split)


class KTOTrainer(_Prepares, trl.KTOTrainer):
    """Kahneman-Tversky optimization, from answers that are labelled one by one. Takes what TRL's KTOTrainer takes."""

    kind = "labelled"

    def _own_args(self, args: TrainingArguments | None, model: Any) -> Any:
        return _own_config(args, KTOConfig, trl.KTOConfig, f"{_name(model)}-KTO")

    def _objective(self, args: Any) -> Objective:
        self.calculate_kl = args.loss_type == "kto"
        return kto_objective(args)

    def _collator(self) -> Callable[..., Any]:
        return LabelledCollator(mismatched=self.calculate_kl)


def _own_config(args: TrainingArguments | None, kind: type[Any], theirs: type[Any], name: str) -> Any:
    """A copy of `args`; a plain TrainingArguments, which older releases of TRL took, becomes a `kind`."""
    if args is None:
        args = kind(name)
    elif isinstance(args, theirs):
        args = copy.deepcopy(args)
    else:
        args = kind(**(args.to_dict() | {"hub_token": args.hub_token}))
    if args.accelerator_config.dispatch_batches is None:  # accelerate would look for tensors in a stream's batches
        args.accelerator_config.dispatch_batches = False
    if args.data_seed is None:  # else the order of rows follows torch's seed at the time, which a resumed run has not
        args.data_seed = args.seed
    return args


def _name(model: Any) -> str:
    name = model if isinstance(model, str) else model.config.name_or_path
    return name.rstrip("/").rpartition("/")[2] or "model"


def pad_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `attention_mask`, each (B, L), padded at the end."""

    def padded(values: list[list[int]], padding: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(value) for value in values], batch_first=True, padding_value=padding
        )

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([row["labels"] for row in rows], IGNORE_INDEX),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }
