from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from trl import SFTConfig

from parley.data.tokens import IGNORE_INDEX
from parley.errors import UsageError
from parley.training.trainer import SFTTrainer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Say " + "very " * n + "good"},
            {"role": "assistant", "content": "good " * n},
        ]
    }
    for n in (1, 2, 9, 3, 1, 5, 2, 7)
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


class Gradients(TrainerCallback):
    """Keeps the gradient of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def make(
    folder: Path, out: Path, rows: list[dict[str, Any]] = ROWS, engine: Any = "auto", **settings: Any
) -> tuple[SFTTrainer, Gradients]:
    gradients = Gradients()
    defaults = {
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_grad_norm": 1e9,
    }
    torch.manual_seed(0)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        SFTConfig(output_dir=str(out), **(defaults | {"save_strategy": "no"} | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LORA,
        callbacks=[gradients],
        engine=engine,
    )
    return trainer, gradients


@pytest.mark.parametrize(("engine", "checkpointing"), [("auto", False), ("plain", False), ("plain", True)])
def test_splitting_a_step_differently_changes_only_rounding(
    tiny_llama_folder: Path, tmp_path: Path, engine: str, checkpointing: bool
) -> None:
    splits = [(8, 1), (2, 4), (1, 8)]  # batch, accumulation
    losses, found, passes = [], [], []
    for batch, accumulation in splits:
        trainer, gradients = make(
            tiny_llama_folder,
            tmp_path,
            max_length=40,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            engine=engine,
        )
        passes.append(0)
        trainer.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(passes.pop() + 1))
        losses.append(trainer.train().training_loss)
        found.append(gradients.first)
    # The plain path does cut the step: into more passes, the smaller a micro-batch may be. The fused step has its own.
    assert passes == [0, 0, 0] if engine == "auto" else passes[0] == 1 < passes[2]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)
    assert max(g.abs().max() for g in found[0].values()) > 1e-4


def test_only_the_assistants_words_are_learned(tiny_llama_folder: Path, tmp_path: Path) -> None:
    trainer, _ = make(tiny_llama_folder, tmp_path)
    tokenizer = trainer.processing_class
    for row, messages in zip(trainer.train_dataset, ROWS, strict=True):
        learned = [label for label in row["labels"] if label != IGNORE_INDEX]
        assert tokenizer.decode(learned) == messages["messages"][1]["content"].strip() + "<|eot_id|>"


def test_loss_is_the_mean_over_supervised_tokens(tiny_llama_folder: Path, tmp_path: Path) -> None:
    trainer, _ = make(tiny_llama_folder, tmp_path, per_device_eval_batch_size=3)
    rows = trainer.train_dataset
    loss_sum, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor([row["labels"]])
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits
            loss_sum += torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum"
            ).item()
            tokens += int((labels[0, 1:] != IGNORE_INDEX).sum())
    metrics = trainer.evaluate(rows)
    assert metrics["eval_supervised_tokens"] == tokens
    assert metrics["eval_loss"] == pytest.approx(loss_sum / tokens, rel=1e-5)


def test_evaluation_leaves_training_as_it_was(tiny_llama_folder: Path, tmp_path: Path) -> None:
    trainer, _ = make(tiny_llama_folder, tmp_path)
    trainer.model.train()
    trainer.evaluate(trainer.train_dataset)
    assert trainer.model.training


def test_adapters_of_a_quantised_model_stay_in_float32(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from parley.config import LoraSection, ModelSection
    from parley.models.adapters import attach_lora
    from parley.models.load import load_model

    model, tokenizer = load_model(ModelSection(name=str(tiny_llama_folder), quantization="nf4", device="cpu"))
    model = attach_lora(model, LoraSection(r=4), seed=1)
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            torch.testing.assert_close(parameter.detach(), values[name], rtol=0, atol=0)


def test_older_spellings_are_taken(tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    texts = [{"chat": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in ROWS]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list(texts),
        dataset_text_field="chat",
        max_seq_length=40,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
        dataset_num_proc=1,
        packing=False,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
    )
    kept = list(trainer.train_dataset)
    assert 0 < len(kept) < len(ROWS)
    assert all(len(row["input_ids"]) <= 40 for row in kept)
    bos = tokenizer.bos_token_id
    assert all(row["input_ids"].count(bos) == 1 for row in kept)
    assert trainer.train().global_step == 1


def test_tokenizer_and_processing_class_together_are_refused(tiny_llama_folder: Path) -> None:
    with pytest.raises(UsageError, match="both tokenizer and processing_class"):
        SFTTrainer("model", tokenizer=object(), processing_class=object())  # type: ignore[arg-type]


def test_arguments_handed_in_are_not_changed(tiny_llama_folder: Path, tmp_path: Path) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_length=40,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    before = settings_of(args)
    substeps = Substeps()
    lengths = []
    for rows in (Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset()):
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
            args,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tiny_llama_folder),
            peft_config=LORA,
            max_seq_length=200,
            dataset_text_field="words",
            callbacks=[substeps],
        )
        trainer.train()
        lengths.append([len(row["input_ids"]) for row in trainer.train_dataset])
        assert settings_of(args) == before
    assert lengths[0] == lengths[1]
    assert len(lengths[0]) == len(ROWS)  # not cut at the 40 of the arguments
    # Loggers and callbacks see the numbers that the user gave.
    assert substeps.seen == [(2, 4)] * 6


def settings_of(args: SFTConfig) -> dict[str, Any]:
    return copy.deepcopy({field.name: getattr(args, field.name) for field in dataclasses.fields(args)})


class Substeps(TrainerCallback):
    """Batch and accumulation as callbacks see them, at each micro-batch but an optimizer step's last."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((args.per_device_train_batch_size, args.gradient_accumulation_steps))
