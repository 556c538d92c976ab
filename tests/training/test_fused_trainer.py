"""The trainer on the fast step against the same trainer on the plain path, on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from parley.config import LLAMA_PROJECTIONS
from parley.training.fused_trainer import documents
from parley.training.trainer import SFTTrainer


def rows(count: int = 48) -> Dataset:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        length = int(rng.integers(5, 30))
        ids = rng.integers(0, 300, length)
        made.append({"input_ids": ids, "labels": np.where(np.arange(length) > length // 2, ids, -100)})
    return Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in made])


def trainer(tokenizer: Any, folder: Path, steps: int = 6, dropout: float = 0.0, **kwargs: Any) -> SFTTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(target_modules=LLAMA_PROJECTIONS, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).to(torch.float32), lora)
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        optim="adamw_torch_fused",
        seed=0,
    )
    return SFTTrainer(model, args, train_dataset=rows(), processing_class=tokenizer, **kwargs)


def steps_of(trained: SFTTrainer) -> list[dict[str, float]]:
    return [logs for logs in trained.state.log_history if "loss" in logs]


def weights(trained: SFTTrainer) -> torch.Tensor:
    return torch.cat([value.flatten() for value in get_peft_model_state_dict(trained.model).values()])


def test_learns_what_the_plain_path_learns(tiny_tokenizer: Any, tmp_path: Path) -> None:
    fast, plain = (trainer(tiny_tokenizer, tmp_path / engine, engine=engine) for engine in ("auto", "plain"))
    fast.train()
    plain.train()
    assert fast.plain_because is None
    assert plain.fast is None
    assert len(steps_of(fast)) == 6
    for ours, theirs in zip(steps_of(fast), steps_of(plain), strict=True):
        assert ours["grad_norm"] > 0
        for figure in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3), figure
    torch.testing.assert_close(weights(fast), weights(plain), rtol=1e-2, atol=1e-4)


def test_a_resumed_run_ends_where_the_whole_one_does(tiny_tokenizer: Any, tmp_path: Path) -> None:
    whole = trainer(tiny_tokenizer, tmp_path / "whole")
    whole.train()
    resumed = trainer(tiny_tokenizer, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.fast is not None
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    ours, theirs = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    inner = (ours[0], theirs[0])
    assert inner[0].keys() == inner[1].keys()
    for name in inner[0]:
        torch.testing.assert_close(inner[0][name], inner[1][name], rtol=0, atol=0)


def test_held_out_loss_is_the_plain_path_s_also_of_longer_rows_and_of_the_base(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    ids = list(range(90))  # longer than any training row
    heldout = Dataset.from_list([{"input_ids": ids, "labels": ids}, *rows(5)])
    measured = []
    for engine in ("auto", "plain"):
        trained = trainer(tiny_tokenizer, tmp_path / engine, engine=engine, eval_dataset=heldout)
        before = trained.evaluate()
        trained.train()
        after = trained.evaluate()
        with trained.model.disable_adapter():
            base = trained.evaluate()
        assert base["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
        assert before["eval_supervised_tokens"] == after["eval_supervised_tokens"]
        measured.append([before["eval_loss"], after["eval_loss"]])
    assert after["eval_loss"] < before["eval_loss"]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)


def test_an_optimizer_handed_in_keeps_the_plain_path_also_when_asked_for_held_out_loss(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trained = trainer(tiny_tokenizer, tmp_path, steps=1, eval_dataset=rows(4))
    trained.optimizer = torch.optim.SGD([p for p in trained.model.parameters() if p.requires_grad], lr=0.1)
    trained.evaluate()
    trained.train()
    assert trained.fast is None
    assert isinstance(trained.optimizer.optimizer, torch.optim.SGD)


def test_what_it_does_not_know_takes_the_plain_path_and_says_so(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dropped = trainer(tiny_tokenizer, tmp_path, steps=1, dropout=0.1)
    dropped.train()
    assert dropped.fast is None
    assert dropped.plain_because == "LoRA dropout"
    assert [record.message for record in caplog.records if "plain path" in record.message] == [
        "plain path: LoRA dropout"
    ]


def test_documents_are_cut_where_positions_begin_anew() -> None:
    row = {"input_ids": [[5, 6, 7, 8, 9]], "labels": [[-100, 6, -100, 8, 9]], "position_ids": [[0, 1, 0, 1, 2]]}
    cut = documents({name: torch.tensor(values) for name, values in row.items()})
    assert [document.ids_L.tolist() for document in cut] == [[5, 6], [7, 8, 9]]
    assert [document.label_L.tolist() for document in cut] == [[-100, 6], [-100, 8, 9]]
