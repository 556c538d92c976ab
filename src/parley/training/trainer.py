"""`parley.SFTTrainer`: TRL's SFTTrainer with Parley's masks, packing and accounting.

What differs from TRL's:
- conversations are rendered with the mask of the assistant's words (parley.data.render), whatever the template;
- a whole optimizer step is one row without padding, split only where it would exceed the tokens of one micro-batch of
  longest rows (parley.training.fused_trainer);
- adapter weights stay in float32 on a quantised model, where TRL rounds them to bfloat16;
- evaluation loss is the sum over supervised tokens divided by their count, not a mean of batch means;
- the older spellings of tutorials are accepted: tokenizer, dataset_text_field, max_seq_length, dataset_num_proc,
  packing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainingArguments, set_seed
from trl import SFTConfig

from parley.config import DataSection
from parley.data.packing import DocumentCollator
from parley.data.prepare import render_rows
from parley.data.summary import DataSummary
from parley.errors import UsageError
from parley.library_compat.bitsandbytes import keep_trainable_layout
from parley.training.fused_trainer import FusedTrainer

logger = logging.getLogger(__name__)

OLD_SPELLINGS = ("dataset_text_field", "max_seq_length", "dataset_num_proc", "packing")


class SFTTrainer(FusedTrainer):
    """Supervised fine-tuning on the assistant's words. Takes what TRL's SFTTrainer takes, and:

    Args:
        engine, memory: see FusedTrainer.
        tokenizer: older name of `processing_class`.
        train_on: "all" assistant turns, or only the "last" of each conversation.
        overlong: what happens to rows over the maximum length: "drop", "error" or "keep-whole-turns".
        dataset_text_field, max_seq_length, dataset_num_proc, packing: as in older releases of TRL.

    Data sets may hold `input_ids` and `labels`, or rows of any format Parley recognises. `data_summaries` says, for
    "train" and "eval", what became of them.

    Raises:
        UsageError: arguments that contradict each other.
        DataError: rows that cannot be rendered or leave nothing to learn.
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
        train_on: Literal["all", "last"] = "all",
        overlong: Literal["drop", "error", "keep-whole-turns"] = "drop",
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        dataset_num_proc: int | None = None,
        packing: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and processing_class is not None:
            raise UsageError("got both tokenizer and processing_class; pass one of them")
        old = dict(zip(OLD_SPELLINGS, (dataset_text_field, max_seq_length, dataset_num_proc, packing), strict=True))
        args = _as_sft_config(args, {name: value for name, value in old.items() if value is not None})
        self.train_on = train_on
        self.overlong = overlong
        self.max_tokens = args.max_length
        self.data_summaries: dict[str, DataSummary] = {}
        # TRL's own cutting and packing have nothing left to do.
        args.max_length, args.packing, args.padding_free = None, False, False
        if data_collator is None or isinstance(data_collator, DataCollatorForSeq2Seq):
            data_collator = DocumentCollator()
            # Accelerate would dispatch a stream's batches from the first process, as tensors; documents are none.
            args.accelerator_config.dispatch_batches = False
        elif not isinstance(data_collator, DocumentCollator):
            kwargs["engine"] = "plain"  # the fused step reads documents
        peft_config = kwargs.pop("peft_config", None)
        if peft_config is not None and not isinstance(model, str):
            set_seed(args.seed)
            model, peft_config = get_peft_model(model, peft_config), None
        masters = [] if isinstance(model, str) else [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class or tokenizer,
            peft_config=peft_config,
            **kwargs,
        )
        for parameter, master in masters:
            if parameter.dtype != master.dtype:  # TRL rounds adapters on quantised models; 1e-4 is lost in bfloat16
                parameter.data = master.to(parameter.device)
        if keep_trainable_layout(self.model):
            logger.warning(
                "4-bit weights had been rearranged for answers on a CPU; they are put back, with scales rounded to bf16"
            )

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Render rows into `input_ids` and `labels`; rows that have them already are left as they are."""
        columns = dataset.column_names or list(next(iter(dataset)))
        if "input_ids" in columns:
            return dataset if "labels" in columns else dataset.map(_learn_everything)
        if formatting_func is not None:
            dataset = dataset.map(lambda row: {"text": formatting_func(row)}, remove_columns=columns)
            columns = ["text"]
        section = DataSection(train_on=self.train_on, overlong=self.overlong)
        if args.dataset_text_field in columns:
            section.format, section.columns = "text", {"text": args.dataset_text_field}
        rows, summary = render_rows(
            dataset,
            processing_class,
            section,
            self.max_tokens or processing_class.model_max_length,
            where=dataset_name,
        )
        self.data_summaries[dataset_name] = summary
        return rows


def _as_sft_config(args: TrainingArguments | None, old: dict[str, Any]) -> SFTConfig:
    """A copy of `args` as SFTConfig, with older spellings moved into it; a plain TrainingArguments becomes one."""
    if args is None:
        args = SFTConfig(output_dir="outputs")
    elif isinstance(args, SFTConfig):
        args = _copied(args)
    else:
        args = SFTConfig(**(args.to_dict() | {"hub_token": args.hub_token}))
    if "max_seq_length" in old:
        old["max_length"] = old.pop("max_seq_length")
    for name, value in old.items():
        setattr(args, name, value)
    return args


def _copied(args: SFTConfig) -> SFTConfig:
    """A copy that shares nothing changeable with `args`: TRL and Trainer write into their arguments."""
    copied = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, dict | list) or name == "accelerator_config":
            setattr(copied, name, copy.deepcopy(value))
    return copied


def _learn_everything(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": list(row["input_ids"])}
