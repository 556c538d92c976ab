from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from trl import SFTConfig

from parley.data.control_tokens import IGNORE_INDEX
from parley.errors import DataError, ModelError, UsageError
from parley.training.sft_config import SFTConfig as ParleyConfig
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
    with pytest.raises(DataError):  # which changes nothing either
        SFTTrainer(
            model,
            SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict({"input_ids": [[1]]}),
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


def of_a_batch(batch: dict[str, list[str]]) -> list[str]:
    """As the tutorials' formatting_prompts_func; `answer` is shorter than `question`, whose characters are no rows."""
    return [f"Q {batch['question'][i]} A {batch['answer'][i]}" for i in range(len(batch["question"]))]


def of_a_batch_by_zip(batch: dict[str, list[str]]) -> list[str]:
    return [f"Q {question} A {answer}" for question, answer in zip(batch["question"], batch["answer"], strict=False)]


def of_a_row(row: dict[str, str]) -> str:
    return f"Q {row['question'].strip()} A {row['answer']}"


@pytest.mark.parametrize("function", [of_a_batch, of_a_batch_by_zip, of_a_row])
def test_a_formatting_func_is_of_a_row_or_of_a_batch(tiny_llama_folder: Path, tmp_path: Path, function: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    rows = [{"question": f"how many apples {number}", "answer": f"{number}"} for number in range(3)]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
        ParleyConfig(output_dir=str(tmp_path), report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        formatting_func=function,
    )
    expected = [tokenizer(f"Q {row['question']} A {row['answer']}{tokenizer.eos_token}")["input_ids"] for row in rows]
    assert [row["input_ids"] for row in trainer.train_dataset] == expected


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


def plain_rows(lengths: list[int]) -> Dataset:
    return Dataset.from_list([{"input_ids": list(range(10, 10 + n)), "labels": [*range(10, 10 + n)]} for n in lengths])


def prepared_with(folder: Path, out: Path, rows: Dataset, overlong: Any = None, **settings: Any) -> SFTTrainer:
    """A trainer of `rows`, which prepares them."""
    args = ParleyConfig(output_dir=str(out), report_to="none", use_cpu=True, save_strategy="no", **settings)
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
        overlong=overlong,
    )


@pytest.mark.parametrize(
    ("overlong", "settings", "kept", "said"),
    [
        (None, {}, [5, 8], "train: 2 dropped: 2 longer than 8 tokens (train rows 2, 4)"),
        ("truncate", {}, [5, 8, 8, 8], "train: 2 rows cut to their first 8 tokens (train rows 2, 4)"),
        (None, {"truncation_mode": "keep_end"}, [5, 8, 8, 8], "train: 2 rows cut to their last 8 tokens"),
        ("split", {}, [5, 8, 1, 8, 8, 8, 4], "train: 2 rows split into parts of at most 8 tokens (train rows 2, 4)"),
    ],
)
def test_rows_over_max_length_are_kept_as_asked_and_named(
    tiny_llama_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overlong: Any,
    settings: dict[str, Any],
    kept: list[int],
    said: str,
) -> None:
    rows = plain_rows([5, 9, 8, 20])
    trainer = prepared_with(tiny_llama_folder, tmp_path, rows, overlong, max_length=8, **settings)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert lengths == [length for length in kept if length > 1]  # one token alone predicts nothing
    first = trainer.train_dataset[1]["input_ids"][0]
    assert first == (11 if settings else 10)
    assert [said in record.message for record in caplog.records if record.message.startswith("train:")] == [True]


def test_whole_turns_are_no_policy_for_token_ids(tiny_llama_folder: Path, tmp_path: Path) -> None:
    trainer = prepared_with(tiny_llama_folder, tmp_path, plain_rows([5, 9]), "keep-whole-turns", max_length=8)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [5]
    with pytest.raises(DataError, match=r"9 tokens, the longest allowed is 8; raise .* or set data.overlong to drop"):
        prepared_with(tiny_llama_folder, tmp_path, plain_rows([5, 9]), "error", max_length=8)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_is_trl_s(tiny_llama_folder: Path, tmp_path: Path, strategy: str) -> None:
    rows = plain_rows([5, 9, 3, 20])
    settings = {"max_length": 8, "packing": True, "packing_strategy": strategy, "bf16": False}
    ours = prepared_with(tiny_llama_folder, tmp_path, rows, **settings)
    theirs = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
        SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, save_strategy="no", **settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama_folder),
    )
    if strategy == "bfd_split":  # 20 = 8 + 8 + 4 and 9 = 8 + 1, whose last token predicts nothing: theirs packs it too
        assert sorted(map(sorted, ours.train_dataset["seq_lengths"])) == [[3, 5], [4], [8], [8], [8]]
    else:
        assert ours.train_dataset[:] == theirs.train_dataset[:]
    if strategy != "wrapped":
        documents = ours.data_collator(list(ours.train_dataset))["documents"]
        assert sorted(len(d.ids_L) for d in documents) == sorted(
            length for row in ours.train_dataset for length in row["seq_lengths"]
        )
    assert ours.train().training_loss > 0


def test_packing_sees_as_many_tokens_a_step_as_trl_s(tiny_llama_folder: Path, tmp_path: Path) -> None:
    rows = plain_rows([4] * 192)
    settings = {
        "max_length": 64,
        "packing": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "bf16": False,
    }
    seen = []
    for packing in (True, False):
        trainer = prepared_with(tiny_llama_folder, tmp_path, rows, **(settings | {"packing": packing}))
        trainer.train()
        seen.append(trainer.state.log_history[-2]["num_tokens"])
    assert seen == [2 * 2 * 64, 2 * 2 * 4]


PAIRS = [{"prompt": "The sea is", "completion": " blue."}, {"prompt": "Say", "completion": " ahoy"}]


@pytest.mark.parametrize(("setting", "everything"), [(None, False), (True, False), (False, True)])
def test_completion_only_loss(tiny_llama_folder: Path, tmp_path: Path, setting: bool | None, everything: bool) -> None:
    trainer = prepared_with(
        tiny_llama_folder, tmp_path, Dataset.from_list(PAIRS), completion_only_loss=setting, max_length=None
    )
    tokenizer = trainer.processing_class
    for row, pair in zip(trainer.train_dataset, PAIRS, strict=True):
        supervised = tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX])
        whole = pair["prompt"] + pair["completion"]
        assert (
            supervised.removeprefix("<|begin_of_text|>") == (whole if everything else pair["completion"]) + "<|eot_id|>"
        )


@pytest.mark.parametrize(("setting", "supervised"), [(None, [12]), (True, [12]), (False, [10, 11, 12])])
def test_a_completion_mask_is_followed(
    tiny_llama_folder: Path, tmp_path: Path, setting: bool | None, supervised: list[int]
) -> None:
    rows = Dataset.from_list([{"input_ids": [10, 11, 12], "completion_mask": [0, 0, 1]}])
    trainer = prepared_with(tiny_llama_folder, tmp_path, rows, completion_only_loss=setting)
    assert [label for label in trainer.train_dataset[0]["labels"] if label != IGNORE_INDEX] == supervised


def test_assistant_only_loss_needs_conversations_and_no_template_of_trl_s(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    trainer = prepared_with(tiny_llama_folder, tmp_path, Dataset.from_list(ROWS), assistant_only_loss=True)
    assert trainer.args.assistant_only_loss is True
    with pytest.raises(UsageError, match="it needs conversations"):
        prepared_with(tiny_llama_folder, tmp_path, Dataset.from_dict({"text": ["a b"]}), assistant_only_loss=True)


def test_a_model_s_name_and_data_are_enough(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(model=str(tiny_llama_folder), train_dataset=Dataset.from_list(ROWS))
    assert trainer.args.output_dir == "llama-SFT"
    assert trainer.args.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_number_format_that_the_device_lacks_is_left_out_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    args = ParleyConfig(output_dir=str(tmp_path), **{name: True})
    assert (args.bf16, args.fp16) == (False, False)
    assert [record.message for record in caplog.records] == [
        f"{name}=True: this device has no {name}; training in float32"
    ]
    assert ParleyConfig(output_dir=str(tmp_path)).bf16 is False
    assert ParleyConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True).bf16 is True  # a CPU has bf16 when asked


def test_metrics_get_one_row_an_example_and_evaluation_logs_what_trl_s_does(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    seen: list[tuple[Any, Any]] = []

    def count(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions.shape[:2], prediction.label_ids.shape))
        return {"rows": len(prediction.predictions)}

    made = {}
    for name, metrics in (("loss", None), ("logits", count)):
        torch.manual_seed(0)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
            ParleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=3),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(tiny_llama_folder),
            compute_metrics=metrics,
        )
        made[name] = trainer.evaluate()
    longest = max(len(row["input_ids"]) for row in trainer.eval_dataset)
    assert seen == [((len(ROWS), longest), (len(ROWS), longest))]
    assert made["logits"].pop("eval_rows") == len(ROWS)
    for figure in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy", "eval_num_tokens"):
        assert made["logits"][figure] == pytest.approx(made["loss"][figure], rel=1e-5), figure
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape == (len(ROWS), longest)
    assert predicted.metrics["test_loss"] == pytest.approx(made["loss"]["eval_loss"], rel=1e-5)
    row = trainer.eval_dataset[0]
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    torch.testing.assert_close(torch.tensor(predicted.predictions[0, : len(logits)]), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("peft_config", "reason"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (
            LoraConfig(
                r=4,
                target_modules=["q_proj", "down_proj"],
                task_type="CAUSAL_LM",
                init_lora_weights=False,
                alora_invocation_tokens=[2],  # <|start_header_id|>
            ),
            "an activated LoRA",
        ),
    ],
    ids=["prompt tuning", "alora"],
)
def test_an_adapter_that_looks_at_a_whole_row_gets_a_row_a_document(
    tiny_llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, peft_config: Any, reason: str
) -> None:
    losses = []
    for batch in (1, 8):
        torch.manual_seed(0)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
            ParleyConfig(
                output_dir=str(tmp_path),
                report_to="none",
                use_cpu=True,
                max_length=60,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=8 // batch,
                gradient_checkpointing=False,
                max_steps=1,
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(tiny_llama_folder),
            peft_config=peft_config,
        )
        losses.append(trainer.train().training_loss)
    assert f"padded batches in place of packed rows: {reason}" in caplog.text
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_name_that_matches_nothing_is_refused_for_peft_s_config_too(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lora\.modules_to_save nope matches no module of LlamaForCausalLM"):
        SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
            ParleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(tiny_llama_folder),
            peft_config=LoraConfig(modules_to_save=["nope"], task_type="CAUSAL_LM"),
        )


def test_held_out_sets_may_be_streams_by_name(tiny_llama_folder: Path, tmp_path: Path) -> None:
    trainer, _ = make(tiny_llama_folder, tmp_path)
    rows = Dataset.from_list(ROWS)
    whole = trainer.evaluate(rows)
    named = trainer.evaluate({"a": rows.to_iterable_dataset(), "b": rows})
    assert named["eval_a_loss"] == named["eval_b_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert named["eval_a_supervised_tokens"] == whole["eval_supervised_tokens"]


def test_each_row_has_template_settings_of_its_own(tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = (
        "{{ 'LOUD ' if loud else 'low ' }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    )
    rows = [row | {"chat_template_kwargs": {"loud": bool(n % 2)}} for n, row in enumerate(ROWS)]
    args = ParleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_length=None, max_steps=1)
    for data in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
        texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
        assert [text.split()[0] for text in texts] == ["low", "LOUD"] * 4
        assert trainer.data_summaries["train"].unread == []
