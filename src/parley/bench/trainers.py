"""The timed trainers: Parley and its peers, each set up as its own users would."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from parley.bench.jobs import Job
from parley.bench.rows import as_text, read_rows
from parley.config import RunConfig
from parley.errors import UsageError

PEERS = ("trl", "unsloth")
PARLEY = "parley"


def check_trainer(name: str) -> None:
    """Raises UsageError for a name that is none of parley, parley-low, parley-plain, parley-GIB, trl, unsloth."""
    if name not in PEERS:
        _variant_options(name)


def build(name: str, job: Job, config: RunConfig, folder: Path) -> Any:
    """The trainer `name`, ready to train on the rows in `folder`."""
    return _unsloth(job, config, folder) if name == "unsloth" else _parley_or_trl(name, config, folder)


def _variant_options(name: str) -> dict[str, Any]:
    """The trainer options that the part after `parley-` stands for."""
    family, _, variant = name.partition("-")
    if family == PARLEY and variant in ("", "low"):
        return {"memory": variant or "auto"}
    if family == PARLEY and variant == "plain":
        return {"engine": "plain"}
    try:
        gib = float(variant) if family == PARLEY else 0.0
    except ValueError:
        gib = 0.0
    if not 0 < gib < math.inf:
        raise UsageError(
            f"unknown trainer {name!r}; there are parley, parley-low, parley-plain, parley-GIB such as parley-5.5, "
            f"{' and '.join(PEERS)}"
        )
    return {"memory": gib}


def _parley_or_trl(name: str, config: RunConfig, folder: Path) -> Any:
    """Parley, or stock TRL with its own padding collator, with the same model, adapter and ids."""
    # Imported here: Unsloth must be imported before TRL in a process of its own.
    import trl

    from parley.models.adapters import attach_lora, prepare_full
    from parley.models.device import pick_device
    from parley.models.load import load_model
    from parley.training.arguments import sft_config
    from parley.training.trainer import SFTTrainer

    model, tokenizer = load_model(config.model)
    lora, seed = config.lora, config.training.seed
    model = prepare_full(model) if lora is None else attach_lora(model, lora, seed=seed)
    args, _ = sft_config(config, folder / name, pick_device(config.model.device))
    data = {"train_dataset": read_rows(folder), "processing_class": tokenizer}
    if name == "trl":
        args.max_length = None  # no row is longer; TRL would map over all of them again
        return trl.SFTTrainer(model, args, **data)
    return SFTTrainer(model, args, **data, **_variant_options(name))


def _unsloth(job: Job, config: RunConfig, folder: Path) -> Any:
    """Unsloth as in its notebooks: its loader, adapters and checkpointing, on the same conversations as text."""
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel
    from unsloth.chat_templates import get_chat_template, train_on_responses_only

    training, lora, longest = config.training, config.lora, config.model.max_seq_length
    model, tokenizer = FastLanguageModel.from_pretrained(
        config.model.name,
        max_seq_length=longest,
        dtype=None,
        load_in_4bit=config.model.quantization == "nf4",
        full_finetuning=lora is None,
    )
    # Notebooks set the template and search for its headers; ids and masks equal those of the other trainers.
    tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
    if lora is not None:
        model = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            lora_alpha=int(lora.lora_alpha),
            lora_dropout=lora.lora_dropout,
            bias=lora.bias,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            random_state=training.seed,
            # Their own checkpointing is the faster of the two that Unsloth offers.
            use_gradient_checkpointing="unsloth" if job.checkpoint else False,
            **(lora.model_extra or {}),
        )
    args = SFTConfig(
        output_dir=str(folder / "unsloth"),
        dataset_text_field="text",
        max_length=longest,
        packing=False,
        dataset_num_proc=2,
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.accumulate,
        max_steps=training.max_steps,
        warmup_steps=training.warmup_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type=training.lr_scheduler_type,
        optim="adamw_8bit" if training.optim == "auto" else training.optim,
        logging_steps=1,
        seed=training.seed,
        bf16=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=as_text(read_rows(folder), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
        args=args,
    )
    return train_on_responses_only(
        trainer,
        instruction_part="<|start_header_id|>user<|end_header_id|>\n\n",
        response_part="<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
