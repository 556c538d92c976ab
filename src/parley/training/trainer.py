"""`parley.SFTTrainer`: TRL's SFTTrainer with Parley's masks, packing and accounting.

What differs from TRL's, each with the setting that gives TRL's behaviour, is in docs/how-to/trl.md.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import TrainableTokensWrapper
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig as TRLConfig
from trl import pack_dataset

from parley.config import DataSection, Overlong
from parley.data.packing import LOSS_WEIGHTS, ORIGIN, DocumentCollator, PaddedCollator
from parley.data.prepare import render_rows
from parley.data.summary import DataSummary
from parley.data.supervision import TrainOn
from parley.errors import UsageError
from parley.library_compat.bitsandbytes import keep_trainable_layout
from parley.library_compat.trl import keep_column
from parley.models.lora_options import check_modules
from parley.models.quantization import quantization_of
from parley.training.fused_trainer import FusedTrainer
from parley.training.option_effects import check_options, left_to_the_fused_step, without_effect
from parley.training.sft_config import SFTConfig, unavailable_formats

logger = logging.getLogger(__name__)

OLD_SPELLINGS = ("dataset_text_field", "max_seq_length", "dataset_num_proc", "packing")
PACKING_OVERLONG: dict[str, Overlong] = {"bfd": "truncate", "bfd_split": "split", "wrapped": "truncate"}
"""What TRL's packing does with documents over `max_length`; for wrapped rows there are none."""
IMAGE_COLUMNS = ("image", "images")


class SFTTrainer(FusedTrainer, trl.SFTTrainer):
    """Supervised fine-tuning on the assistant's words. Takes what TRL's SFTTrainer takes, and:

    Args:
        engine, memory: see FusedTrainer.
        deterministic: see CheckpointingTrainer.
        nonfinite, nonfinite_limit: see PackedTrainer.
        tokenizer: older name of `processing_class`.
        train_on: as data.train_on: "all" assistant turns, the "last", "inputs", "nothing", or a list of roles.
        overlong: what becomes of rows over `max_length`, as `data.overlong` in a run's settings. Without a value they
            are dropped, with packing treated as TRL's strategy treats them, and cut at the start where
            `truncation_mode` is "keep_end".
        scale_batch: with several processes, the batch settings are those of each process, as in TRL; False: of a whole
            step, whatever the number of processes.
        dataset_text_field, max_seq_length, dataset_num_proc, packing: as in older releases of TRL.

    Data sets may hold `input_ids`, with `labels` or a mask, or rows of any format Parley recognises. `data_summaries`
    reports, for "train" and "eval", what became of them. `args` are copied: what is handed in stays as it is.

    Raises:
        UsageError: arguments that contradict each other, or a data set of images.
        DataError: rows that cannot be rendered or leave nothing to train on.
        ValueError, TypeError: what TRL's trainer refuses.
    `train` raises ModelError where weights are not finite before the first step, and NonfiniteStepError (TrainingError)
    at a step that is not.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_on: TrainOn = "all",
        overlong: Overlong | None = None,
        scale_batch: bool = True,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        dataset_num_proc: int | None = None,
        packing: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and processing_class is not None:
            raise UsageError("got both tokenizer and processing_class; pass one of them")
        old = dict(zip(OLD_SPELLINGS, (dataset_text_field, max_seq_length, dataset_num_proc, packing), strict=True))
        args = _own_config(args, model, {name: value for name, value in old.items() if value is not None})
        for line in without_effect(args):
            logger.warning("%s", line)
        # Asked before TRL fills in options of its own.
        self.left_to_fused_step = left_to_the_fused_step(args)
        _refuse_images(train_dataset, processing_class or tokenizer)
        self.train_on = train_on
        self.overlong: Overlong = overlong or _overlong(args)
        self.max_tokens = args.max_length
        self.data_summaries: dict[str, DataSummary] = {}
        self._prepared: WeakSet[Dataset | IterableDataset] = WeakSet()
        custom = not isinstance(data_collator, DataCollatorForSeq2Seq | DocumentCollator | None)
        self._reads_origins = not custom
        if custom:
            kwargs["engine"] = "plain"  # the fused step reads documents
        else:
            args.gradient_accumulation_steps *= args.world_size if scale_batch else 1  # each reads the rows of all
            # Accelerate would dispatch a stream's batches from the first process, as tensors; documents are none.
            args.accelerator_config.dispatch_batches = False
        # Parley's masks need no template that TRL knows: its own preparation is not asked for them.
        assistant_only, args.assistant_only_loss = args.assistant_only_loss, False
        peft_config = kwargs.pop("peft_config", None)
        if peft_config is not None and not isinstance(model, str | PeftModel):
            if isinstance(peft_config, LoraConfig):
                check_modules(model, peft_config)
            set_seed(args.seed)
            model, peft_config = get_peft_model(model, peft_config), None
        originals = (
            {} if isinstance(model, str) else {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        )
        self.assistant_only = assistant_only
        try:
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator if custom else None,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class or tokenizer,
                peft_config=peft_config,
                **kwargs,
            )
        finally:  # also where the data set is refused: the model is the caller's
            if not isinstance(model, str):
                restore_adapters(model, originals)
        self.args.assistant_only_loss = assistant_only
        if isinstance(model, str):
            restore_adapters(self.model, {})
        if isinstance(self.model.get_output_embeddings(), TrainableTokensWrapper):
            raise UsageError(
                "lora.trainable_token_indices: the head shares the embedding's weights here, and TRL reads the head "
                "without the trained tokens; set modules_to_save: [embed_tokens, lm_head] in its place"
            )
        if not custom:
            # TRL's own collator pads, but for packing: only the padding is wanted of it here.
            self.padded_collator = PaddedCollator(dataclasses.replace(self.data_collator, padding_free=False))
            self.data_collator = DocumentCollator()
        sets = [
            self.train_dataset,
            *(self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]),
        ]
        if any(isinstance(rows, Dataset) and LOSS_WEIGHTS in rows.column_names for rows in sets):
            self.check_loss_weights(has_collator=custom)
        if keep_trainable_layout(self.model):
            logger.warning(
                "4-bit weights had been rearranged for answers on a CPU; they are put back, with scales rounded to bf16"
            )

    def _set_signature_columns_if_needed(self) -> None:
        """The origin of each row is no input of the model, but goes along with it."""
        super()._set_signature_columns_if_needed()
        if self._reads_origins:
            keep_column(self, ORIGIN)
            keep_column(self, LOSS_WEIGHTS)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: TRLConfig,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Render rows into `input_ids` and `labels`, and pack them where TRL's packing is asked for.

        `evaluate` hands every one of several data sets over a second time: what is prepared stays as it is.
        """
        if dataset in self._prepared:
            return dataset
        rows, summary = self._render(dataset, processing_class, args, formatting_func, dataset_name)
        self.data_summaries[dataset_name] = summary
        if packing or not self._reads_origins:
            rows = rows.remove_columns(ORIGIN)
        if summary.dropped:
            logger.warning("%s: %s", dataset_name, summary.dropped_line())
        if summary.shortened.count:
            logger.warning("%s: %s", dataset_name, summary.shortened_line())
        if self.assistant_only and summary.format in ("text", "tokens"):
            raise UsageError(
                f"assistant_only_loss=True, and {dataset_name} has {summary.reason or 'text'}; it needs conversations"
            )
        if packing:
            if args.max_length is None:
                raise UsageError("packing=True needs max_length: the tokens of a packed row")
            if args.shuffle_dataset:  # so that rows packed together are no neighbours
                rows = rows.shuffle(seed=args.seed)
            if LOSS_WEIGHTS in (rows.column_names or ()):  # TRL joins columns of lists, which a null is not
                rows = rows.map(_with_weights_of_one)
            rows = pack_dataset(rows, args.max_length, args.packing_strategy)
        if args.shuffle_dataset:
            rows = rows.shuffle(seed=args.seed)
        self._prepared.add(rows)
        return rows

    def _render(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: TRLConfig,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> tuple[Dataset | IterableDataset, DataSummary]:
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise UsageError(
                f"{dataset_name} uses Dataset.with_transform(), which preparation would apply once and for all; set "
                "dataset_kwargs={'skip_prepare_dataset': True} and let it give trainer-ready rows of input_ids and "
                "labels, or apply it with Dataset.map()"
            )
        columns = dataset.column_names or list(next(iter(dataset)))
        section = DataSection(train_on=self.train_on, overlong=self.overlong, bad_rows="error")
        everything = args.completion_only_loss is False and not self.assistant_only
        if "input_ids" in columns:
            section.format = "tokens"
            if formatting_func is not None:
                logger.warning("%s: formatting_func is not called, as the rows have input_ids", dataset_name)
            if everything and "completion_mask" in columns:
                dataset, everything = dataset.remove_columns("completion_mask"), False
        elif formatting_func is not None:
            dataset = dataset.map(lambda row: {"text": _formatted(formatting_func, row)}, remove_columns=columns)
            section.format = "text"
        elif args.dataset_text_field in columns:
            section.format, section.columns = "text", {"text": args.dataset_text_field}
        wrapped = args.packing and args.packing_strategy == "wrapped"  # cuts wherever a row is full
        longest = processing_class.model_max_length if wrapped or self.max_tokens is None else self.max_tokens
        rows, summary = render_rows(dataset, processing_class, section, longest, where=dataset_name)
        if everything and section.format != "tokens":
            rows = rows.map(_supervise_everything)
        return rows, summary


@torch.no_grad()
def restore_adapters(model: Any, originals: dict[str, torch.Tensor]) -> None:
    """Adapters of a quantised model as they were, or in float32: TRL rounds them to bfloat16, which loses 1e-4."""
    if quantization_of(model.config) == "none":
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            original = originals.get(name)
            parameter.data = parameter.data.float() if original is None else original.to(parameter.device)


def _own_config(args: TrainingArguments | None, model: Any, old: dict[str, Any]) -> TRLConfig:
    """A copy of `args` as SFTConfig, with older spellings moved into it; a plain TrainingArguments becomes one."""
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        args = SFTConfig(f"{name.rstrip('/').rpartition('/')[2] or 'model'}-SFT")
    elif isinstance(args, TRLConfig):
        args = _copied(args)
    else:
        args = SFTConfig(**(args.to_dict() | {"hub_token": args.hub_token}))
    if args.data_seed is None:  # else the order of rows follows torch's seed at the time, which a resumed run has not
        args.data_seed = args.seed
    for name in unavailable_formats(args):
        logger.warning("%s=True: this device has no %s; training in float32", name, name)
        setattr(args, name, False)
    if "max_seq_length" in old:
        old["max_length"] = old.pop("max_seq_length")
    for name, value in old.items():
        setattr(args, name, value)
    check_options(args)
    return args


def _copied(args: TRLConfig) -> TRLConfig:
    """A copy that shares nothing changeable with `args`: TRL and Trainer write into their arguments."""
    copied = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, dict | list) or name == "accelerator_config":
            setattr(copied, name, copy.deepcopy(value))
    return copied


def _overlong(args: TRLConfig) -> Overlong:
    if args.packing:
        return PACKING_OVERLONG[args.packing_strategy]
    return "truncate-start" if args.truncation_mode == "keep_end" else "drop"


def _refuse_images(dataset: Any, processing_class: Any) -> None:
    """Raises UsageError for image data that comes with an image processor; TRL itself refuses it for a text model."""
    if not isinstance(processing_class, ProcessorMixin) or dataset is None:
        return
    found = [name for name in IMAGE_COLUMNS if name in (dataset.column_names or next(iter(dataset)))]
    if found:
        raise UsageError(f"train_dataset has {found[0]}: images are not trained on here; use trl.SFTTrainer for them")


def _formatted(formatting_func: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> Any:
    """The text of a row by a function of one row or, as tutorials of older releases have it, of columns of a batch."""
    try:
        text = formatting_func(row)
    except IndexError:  # a function of a batch takes the characters of one column for rows, which another has not
        text = []
    if isinstance(text, list):
        text = formatting_func({name: [value] for name, value in row.items()})
    return text[0] if isinstance(text, list) and len(text) == 1 else text


def _with_weights_of_one(row: dict[str, Any]) -> dict[str, Any]:
    return {LOSS_WEIGHTS: row[LOSS_WEIGHTS] or [1.0] * len(row["input_ids"])}


def _supervise_everything(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": list(row["input_ids"])}
