"""A run that is interrupted and resumed ends, bit for bit, where the undisturbed one does."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig

from parley.config import LLAMA_PROJECTIONS, RunConfig
from parley.errors import DataError, RunError, UsageError
from parley.training.checkpoint import newest_whole
from parley.training.resume_run import open_to_resume
from parley.training.run_folder import RunFolder
from parley.training.trainer import SFTTrainer

STEPS = 8  # six of an epoch of 24 rows, then two of the next


def rows(count: int = 24, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, 300, int(rng.integers(5, 20))).tolist() for _ in range(count)]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in made])


class StopAt(TrainerCallback):
    """Saves after `step` and ends training there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def make(
    tokenizer: Any,
    folder: Path,
    *,
    dropout: float = 0.0,
    lora: bool = True,
    data: Any = None,
    stop_at: int | None = None,
    rank: int = 4,
    trainer_class: type[trl.SFTTrainer] = SFTTrainer,
    engine: str | None = None,
    **settings: Any,
) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: Any = LlamaForCausalLM(config).to(torch.float32)
    if lora:
        adapter = LoraConfig(r=rank, target_modules=LLAMA_PROJECTIONS, lora_dropout=dropout, task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "seed": 0,
    }
    args = SFTConfig(output_dir=str(folder), **(defaults | settings))
    options = {} if engine is None else {"engine": engine}
    made = trainer_class(
        model, args, train_dataset=rows() if data is None else data, eval_dataset=rows(4, seed=1),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    if stop_at is not None:
        made.add_callback(StopAt(stop_at))
    return made


def disturb() -> None:
    """Another process has other random states."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def figures(made: Any) -> list[dict[str, Any]]:
    """What was logged at steps and evaluations, without times."""
    logs = [entry for entry in made.state.log_history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in logs]


def trained(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}


def assert_same_end(resumed: Any, whole: Any) -> None:
    ours, theirs = trained(resumed), trained(whole)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []
    assert figures(resumed) == figures(whole)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert resumed.supervised_tokens == whole.supervised_tokens
    states = [made.optimizer.state_dict() for made in (resumed, whole)]
    assert json.dumps(states[0]["param_groups"]) == json.dumps(states[1]["param_groups"])
    assert same(states[0]["state"], states[1]["state"])


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in theirs)
    return torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "fused": (3, {}),
    "fused, second epoch": (7, {}),
    "fused, at the end of an epoch": (6, {}),
    "fused, 8-bit optimizer": (3, {"optim": "adamw_8bit", "rank": 16}),
    "fused, clipped, cosine, weight decay": (
        5,
        {"max_grad_norm": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.1},
    ),
    "fused, logs of two steps, evaluations": (
        3,
        {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "include_num_input_tokens_seen": "all"},
    ),
    "fused, dropout": (7, {"dropout": 0.2, "eval_strategy": "steps", "eval_steps": 3}),
    "fused, packed": (3, {"packing": True, "max_length": 32, "gradient_accumulation_steps": 1}),
    "fused, 3 steps in an epoch and a rest": (4, {"gradient_accumulation_steps": 5}),
    "plain, dropout and noise": (
        7,
        {"engine": "plain", "dropout": 0.2, "neftune_noise_alpha": 5, "eval_strategy": "steps", "eval_steps": 3},
    ),
    "plain, dropout, at the end of an epoch": (6, {"engine": "plain", "dropout": 0.2, "logging_steps": 4}),
    "plain, Adafactor, gradient checkpointing": (3, {"optim": "adafactor", "gradient_checkpointing": True}),
    "plain, packed": (5, {"engine": "plain", "packing": True, "max_length": 32, "gradient_accumulation_steps": 1}),
    "full fine-tuning": (3, {"lora": False, "learning_rate": 1e-3}),
    "a stream": (7, {"data": rows().to_iterable_dataset()}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_where_the_undisturbed_one_does(tiny_tokenizer: Any, tmp_path: Path, name: str) -> None:
    stop_at, settings = CASES[name]
    whole = make(tiny_tokenizer, tmp_path / "whole", **settings)
    whole.train()
    assert (whole.fused_step is not None) == name.startswith(("fused", "a stream"))
    disturb()
    make(tiny_tokenizer, tmp_path / "run", stop_at=stop_at, **settings).train()
    disturb()
    resumed = make(tiny_tokenizer, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same_end(resumed, whole)


@pytest.fixture(scope="module")
def two_checkpoints(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoint-2 and checkpoint-4; copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make(tiny_tokenizer, folder, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    return folder


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "resume_state.json",
    "tokenizer.json",
    "manifest.json",
]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "a bit flipped": flip_bit,
    "swapped": lambda path: path.write_bytes((path.parent / "README.md").read_bytes()),
    "of the checkpoint before": lambda path: path.write_bytes(
        (path.parent.with_name("checkpoint-2") / path.name).read_bytes()
    ),
    "removed": lambda path: path.unlink(),
}
UNCHANGED = {"adapter_config.json", "rng_state.pth", "tokenizer.json"}  # the same in each checkpoint


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_recognised(two_checkpoints: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    whole, damaged = newest_whole(folder)
    assert (whole, damaged) == (folder / "checkpoint-4", [])
    DAMAGES[damage](folder / "checkpoint-4" / name)
    whole, damaged = newest_whole(folder)
    if damage == "of the checkpoint before" and name in UNCHANGED:
        assert whole == folder / "checkpoint-4"
        return
    assert whole == folder / "checkpoint-2"
    assert [found.path.name for found in damaged] == ["checkpoint-4"]
    assert name in damaged[0].reason or name == "manifest.json"


@pytest.mark.parametrize("added", ["surprise.json", "checkpoint-9/x"])
def test_a_checkpoint_with_a_file_more_is_not_whole(two_checkpoints: Path, tmp_path: Path, added: str) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    (folder / "checkpoint-4" / added).parent.mkdir(exist_ok=True)
    (folder / "checkpoint-4" / added).write_text("")
    assert newest_whole(folder)[0] == folder / "checkpoint-2"


def test_the_checkpoint_of_another_step_is_not_whole_under_this_name(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints / "checkpoint-2", folder / "checkpoint-4")
    shutil.copytree(two_checkpoints / "checkpoint-2", folder / "checkpoint-2")
    assert newest_whole(folder)[0] == folder / "checkpoint-2"


def test_the_checkpoint_before_a_damaged_one_is_used_and_it_is_said(
    tiny_tokenizer: Any, two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    flip_bit(folder / "checkpoint-4" / "optimizer.pt")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    resumed = make(tiny_tokenizer, folder, **settings)
    with pytest.raises(RunError, match=r"checkpoint-4 is damaged .*optimizer.pt.*checkpoint-2 is whole"):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is damaged (the checksum of optimizer.pt is wrong): checkpoint-2 is used" in caplog.text
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert newest_whole(folder) == (folder / "checkpoint-4", [])  # written anew
    flip_bit(folder / "checkpoint-4" / "optimizer.pt")
    flip_bit(folder / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(RunError, match=r"no checkpoint is whole: checkpoint-4 is damaged .*checkpoint-2 is damaged"):
        make(tiny_tokenizer, folder, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01 and is 0.02"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, "gradient_accumulation_steps was 2"),
        ({"seed": 1}, "data_seed was 0 and is 1; seed was 0 and is 1"),
        ({"lr_scheduler_type": "cosine"}, 'lr_scheduler_type was "linear" and is "cosine"'),
        ({"optim": "adamw_torch"}, 'optim was "adamw_torch_fused" and is "adamw_torch"'),
        ({"engine": "plain"}, 'engine was "auto" and is "plain"'),
        ({"rank": 2}, "lora.r was 4 and is 2"),
        ({"dropout": 0.1}, "lora.lora_dropout was 0.0 and is 0.1"),
        ({"max_grad_norm": 0.5}, "max_grad_norm was 1.0 and is 0.5"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
    ],
)
def test_a_setting_that_would_break_exactness_is_refused_by_its_name(
    tiny_tokenizer: Any, two_checkpoints: Path, changes: dict[str, Any], said: str
) -> None:
    resumed = make(tiny_tokenizer, two_checkpoints, **({"max_steps": 6} | changes))
    with pytest.raises(UsageError, match=re.escape(said)):
        resumed.train(resume_from_checkpoint=True)


def test_other_rows_are_refused(tiny_tokenizer: Any, two_checkpoints: Path) -> None:
    with pytest.raises(DataError, match="24 rows then, 23 now"):
        make(tiny_tokenizer, two_checkpoints, data=rows(23)).train(resume_from_checkpoint=True)
    with pytest.raises(DataError, match="other content"):
        make(tiny_tokenizer, two_checkpoints, data=rows(seed=5)).train(resume_from_checkpoint=True)


def test_steps_logging_saving_and_evaluation_may_change(
    tiny_tokenizer: Any, two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    changes = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    resumed = make(tiny_tokenizer, folder, max_steps=6, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_run_that_is_complete_takes_no_step_more(tiny_tokenizer: Any, two_checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    before = make(tiny_tokenizer, tmp_path / "whole", max_steps=4)
    before.train()
    again = make(tiny_tokenizer, folder, max_steps=4)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert all(torch.equal(value, trained(before)[name]) for name, value in trained(again).items())


def test_without_a_checkpoint_the_error_says_what_to_do(tiny_tokenizer: Any, tmp_path: Path) -> None:
    made = make(tiny_tokenizer, tmp_path)
    with pytest.raises(UsageError, match=r"no checkpoint in .*without resume_from_checkpoint"):
        made.train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="no checkpoint there"):
        made.train(resume_from_checkpoint=str(tmp_path / "absent"))


def test_a_checkpoint_of_the_stock_trainer_is_used_and_said(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock = make(
        tiny_tokenizer, tmp_path, max_steps=2, save_strategy="steps", save_steps=2, trainer_class=trl.SFTTrainer
    )
    stock.train()
    assert (tmp_path / "checkpoint-2" / "training_args.bin").is_file()
    resumed = make(tiny_tokenizer, tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert "written by transformers' own Trainer" in caplog.text
    assert resumed.state.global_step == 3
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(UsageError, match=r"holds no optimizer.pt \(save_only_model\?\)"):
        make(tiny_tokenizer, tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_nothing_in_a_checkpoint_is_unpickled(two_checkpoints: Path) -> None:
    for path in (two_checkpoints / "checkpoint-4").iterdir():
        assert path.suffix in {".json", ".safetensors", ".pt", ".pth", ".md", ".jinja"}, path
        if path.suffix in {".pt", ".pth"}:
            torch.load(path, weights_only=True)  # without any safe globals


def test_relative_paths_are_no_change_of_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Python, where the settings that started a run are given again to resume it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    config = RunConfig.create({"model": "model", "data": {"source": "rows.jsonl", "heldout": "rows.jsonl"}})
    config.output = Path("run")
    RunFolder.create(config).unlock()
    more = config.model_copy(deep=True)
    more.training.max_steps = 9
    resumed = open_to_resume(Path("run"), more, Console(quiet=True))
    resumed.folder.unlock()
    assert resumed.changed == {"training.max_steps": (-1, 9)}
    assert resumed.config.data.source == str(tmp_path / "rows.jsonl")
    assert more.data.source == "rows.jsonl"  # the caller's settings are left as they are
