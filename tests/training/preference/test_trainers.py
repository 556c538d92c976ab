"""What the preference trainers take as TRL's do, and what they say of options that change nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import parley
from parley.errors import UsageError
from parley.train_step.bind import has_lora_dropout

from .conftest import demo_adapter


def test_a_stream_is_rendered_as_rows_in_memory_are(pairs: Dataset, options: dict[str, Any]) -> None:
    model, tokenizer = demo_adapter()
    found = []
    stream = pairs.to_iterable_dataset()
    for rows in (pairs, stream):
        args = parley.DPOConfig(**options | {"max_steps": 1})
        trainer = parley.DPOTrainer(
            model, args=args, train_dataset=rows, eval_dataset={"other": stream}, processing_class=tokenizer
        )
        ids = [[list(row[name]) for row in trainer.train_dataset] for name in ("chosen_input_ids", "rejected_labels")]
        assert [list(row["chosen_input_ids"]) for row in trainer.eval_dataset["other"]] == ids[0]
        found.append([*ids, [row["origin"] for row in trainer.train_dataset]])
        assert "eval_other_preference_accuracy" in trainer.evaluate()
    assert found[0] == found[1]


def test_an_overlong_pair_of_a_stream_is_named(
    pairs: Dataset, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = demo_adapter()
    args = parley.DPOConfig(**options | {"max_steps": 1, "max_length": 45})
    with caplog.at_level(logging.WARNING):
        trainer = parley.DPOTrainer(
            model, args=args, train_dataset=pairs.to_iterable_dataset(), processing_class=tokenizer
        )
        kept = len(list(trainer.train_dataset))
    assert 0 < kept < len(pairs)
    assert f"{len(pairs) - kept} dropped: {len(pairs) - kept} longer than 45 tokens" in caplog.text


def test_plain_training_arguments_and_older_names_are_taken(pairs: Dataset, options: dict[str, Any]) -> None:
    model, tokenizer = demo_adapter()
    plain = TrainingArguments(options["output_dir"], use_cpu=True, report_to="none", learning_rate=3e-4, seed=5)
    trainer = parley.DPOTrainer(model, args=plain, beta=0.3, max_length=512, train_dataset=pairs, tokenizer=tokenizer)
    args = trainer.args
    assert (args.beta, args.max_length, args.learning_rate, args.data_seed) == (0.3, 512, 3e-4, 5)
    assert plain.data_seed is None, "args are copied"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"label_smoothing": 0.1},
            "label_smoothing has no effect without loss_type aot, aot_unpaired, exo_pair, robust",
        ),
        ({"discopop_tau": 0.2}, "discopop_tau has no effect without loss_type discopop"),
        ({"f_alpha_divergence_coef": 0.2}, "f_alpha_divergence_coef has no effect without f_divergence_type"),
        ({"ref_model_sync_steps": 3}, "ref_model_sync_steps has no effect without sync_ref_model"),
        ({"padding_free": True}, "padding_free has no effect"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs has no effect"),
        ({"dataset_num_proc": 2}, "dataset_num_proc has no effect"),
        ({"hub_model_id": "a/b"}, "hub_model_id has no effect without push_to_hub"),
        ({"loss_type": ["robust"], "label_smoothing": 0.1}, ""),
        ({}, ""),
    ],
)
def test_an_option_that_changes_nothing_is_named(
    changed: dict[str, Any], line: str, pairs: Dataset, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = demo_adapter()
    with caplog.at_level(logging.WARNING, "parley"):
        parley.DPOTrainer(
            model, args=parley.DPOConfig(**options | changed), train_dataset=pairs, processing_class=tokenizer
        )
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(said) == bool(line)
    assert not line or said[0].startswith(line)


@pytest.mark.parametrize("by_config", [True, False])
@pytest.mark.parametrize("disable", [True, False])
def test_lora_dropout_that_is_disabled_is_named(
    by_config: bool, disable: bool, pairs: Dataset, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = demo_adapter()
    base = model.unload()
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    adapter = {"model": base, "peft_config": lora} if by_config else {"model": get_peft_model(base, lora)}
    args = parley.DPOConfig(**options, disable_dropout=disable)
    with caplog.at_level(logging.WARNING, "parley"):
        trainer = parley.DPOTrainer(args=args, train_dataset=pairs, processing_class=tokenizer, **adapter)
    assert has_lora_dropout(trainer.model) is not disable
    assert ("lora_dropout has no effect: disable_dropout is true" in caplog.text) is disable


def test_settings_of_a_rows_template_and_unread_columns(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = demo_adapter()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "{{- bos_token }}{{- loud or '' }}")
    assert "loud" in tokenizer.chat_template
    turn = {"prompt": [{"role": "user", "content": "Hi"}], "score": 0.5}
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = Dataset.from_list([turn | answers | {"chat_template_kwargs": {"loud": word}} for word in ("LOUD", None)])
    with caplog.at_level(logging.WARNING, "parley"):
        trainer = parley.DPOTrainer(
            model, args=parley.DPOConfig(**options), train_dataset=rows, processing_class=tokenizer
        )
    texts = [tokenizer.decode(row["rejected_input_ids"]) for row in trainer.train_dataset]
    assert ["LOUD" in text for text in texts] == [True, False]
    assert "columns not used: score" in caplog.text


def test_an_auxiliary_loss_that_would_be_left_out_is_refused(pairs: Dataset, options: dict[str, Any]) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    _, tokenizer = demo_adapter()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_experts=2, num_experts_per_tok=1,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = Qwen3MoeForCausalLM(config)
    with pytest.raises(UsageError, match="router_aux_loss_coef"):
        parley.DPOTrainer(model, args=parley.DPOConfig(**options), train_dataset=pairs, processing_class=tokenizer)
    parley.DPOTrainer(
        model, args=parley.DPOConfig(router_aux_loss_coef=0.0, **options), train_dataset=pairs,
        processing_class=tokenizer,
    )  # fmt: skip
