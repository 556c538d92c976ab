"""Who is timed: Parley and its peers, each as its own users would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parley.bench.jobs import Job
from parley.bench.rows import as_text, read_rows
from parley.config import RunConfig
from parley.errors import UsageError

PEERS = ("trl", "unsloth")
PARLEY = "parley"


def check_who(who: str) -> None:
    """Raises UsageError for a name that is nobody's: parley, parley-low, parley-plain, parley-5.5, trl, unsloth."""
    if who not in PEERS:
        _variant(who)


def build(who: str, job: Job, config: RunConfig, folder: Path) -> Any:
    """The trainer called `who`, ready to train on the rows in `folder`."""
    return _unsloth(job, config, folder) if who == "unsloth" else _on_ids(who, config, folder)


def _variant(who: str) -> dict[str, Any]:
    """What the part after `parley-` tells Parley's trainer."""
    name, _, kind = who.partition("-")
    if name == PARLEY and kind in ("", "low"):
        return {"memory": kind or "auto"}
    if name == PARLEY and kind == "plain":
        return {"engine": "plain"}
    try:
        gib = float(kind) if name == PARLEY else 0.0
    except ValueError:
        gib = 0.0
    if gib <= 0:
        raise UsageError(
            f"nobody is called {who!r}; there are parley, parley-low, parley-plain, parley-GIB such as parley-5.5, "
            f"{' and '.join(PEERS)}"
        )
    return {"memory": gib}


def _on_ids(who: str, config: RunConfig, folder: Path) -> Any:
    """Parley, or stock TRL with its own padding collator, on one and the same model, adapter and ids."""
    import trl

    from parley.models.adapters import attach_lora
    from parley.models.device import pick_device
    from parley.models.load import load_model
    from parley.training.arguments import sft_config
    from parley.training.trainer import SFTTrainer

    model, tokenizer = load_model(config.model)
    assert config.lora is not None
    model = attach_lora(model, config.lora, seed=config.training.seed)
    args, _ = sft_config(config, folder / who, pick_device(config.model.device))
    data = {"train_dataset": read_rows(folder), "processing_class": tokenizer}
    if who == "trl":
        args.max_length = None  # no row is longer, and TRL would map over them once more
        return trl.SFTTrainer(model, args, **data)
    return SFTTrainer(model, args, **data, **_variant(who))


def _unsloth(job: Job, config: RunConfig, folder: Path) -> Any:
    """Unsloth as its notebooks go: its own loader, adapters and checkpointing, on the same conversations as text."""
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel
    from unsloth.chat_templates import get_chat_template, train_on_responses_only

    assert config.lora is not None
    training, lora, longest = config.training, config.lora, config.model.max_seq_length
    model, tokenizer = FastLanguageModel.from_pretrained(
        config.model.name, max_seq_length=longest, dtype=None, load_in_4bit=job.quantization == "nf4"
    )
    tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=int(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        random_state=training.seed,
        use_gradient_checkpointing="unsloth" if job.checkpoint else False,
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
        optim="adamw_8bit",
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
