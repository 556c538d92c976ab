"""The trainer on the fused step against the same trainer on the plain path, on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from tests.training.rows import supervised_rows
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from parley.config import LLAMA_PROJECTIONS
from parley.data.packing import PackedCollator
from parley.errors import RunError, UsageError
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import make_plan
from parley.training.trainer import SFTTrainer


def trainer(
    tokenizer: Any,
    folder: Path,
    steps: int = 6,
    lora: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    rows: Dataset | None = None,
    **kwargs: Any,
) -> SFTTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    adapter = LoraConfig(target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM", **lora or {})
    model = get_peft_model(LlamaForCausalLM(config).to(torch.float32), adapter)
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "seed": 0,
    }
    args = SFTConfig(output_dir=str(folder), **(defaults | (settings or {})))
    return SFTTrainer(model, args, train_dataset=rows or supervised_rows(), processing_class=tokenizer, **kwargs)


class LastGradient(TrainerCallback):
    """Norm of the gradient that the optimizer saw last, and whether it is that of PEFT's own parameters."""

    norm = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.norm = float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())


def trl_trainer(tokenizer: Any, made: SFTTrainer) -> trl.SFTTrainer:
    """TRL's own trainer of the same model, data and arguments."""
    return trl.SFTTrainer(made.model, made.args, train_dataset=supervised_rows(), processing_class=tokenizer)


def steps_of(trained: SFTTrainer) -> list[dict[str, float]]:
    return [logs for logs in trained.state.log_history if "loss" in logs]


def weights(trained: SFTTrainer) -> torch.Tensor:
    return torch.cat([value.flatten() for value in get_peft_model_state_dict(trained.model).values()])


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
def test_learns_what_the_plain_path_learns(tiny_tokenizer: Any, tmp_path: Path, lora: dict[str, Any]) -> None:
    fast, plain = (trainer(tiny_tokenizer, tmp_path / engine, engine=engine, lora=lora) for engine in ("auto", "plain"))
    fast.train()
    plain.train()
    assert fast.plain_because is None
    assert plain.fused_step is None
    assert len(steps_of(fast)) == 6
    for ours, theirs in zip(steps_of(fast), steps_of(plain), strict=True):
        assert ours["grad_norm"] > 0
        for figure in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3), figure
    torch.testing.assert_close(weights(fast), weights(plain), rtol=1e-2, atol=1e-4)


def weighted_rows() -> Dataset:
    """Every third row with fractional loss weights."""
    made = supervised_rows().to_list()
    for row in made[::3]:
        row["loss_weights"] = np.linspace(0.05, 0.5, len(row["input_ids"]), dtype=np.float32).tolist()
    for row in made:
        row.setdefault("loss_weights", None)
    return Dataset.from_list(made)


PLAIN = {"engine": "plain"}
KEEP = {"skip_prepare_dataset": True}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, PLAIN),
        ({}, {"engine": "captured"}),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, PLAIN),
        ({"label_smoothing_factor": 0.0, "neftune_noise_alpha": None}, PLAIN | {"padded": True}),
    ],
)
def test_loss_weights_on_every_path(
    tiny_tokenizer: Any, tmp_path: Path, settings: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradient, weights and held-out loss as on the fused step, and other ones than without the weights."""
    padded = options.get("padded", False)
    made = []
    for index, extra in enumerate(({}, {name: value for name, value in options.items() if name != "padded"})):
        settings = settings | {"dataset_kwargs": KEEP}
        one = trainer(
            tiny_tokenizer, tmp_path / str(index), settings=settings, rows=weighted_rows(),
            eval_dataset=weighted_rows(), **extra,
        )  # fmt: skip
        if padded and index:
            one.__dict__["padded_because"] = "a test asks for it"
        one.train()
        made.append((one, one.evaluate()))
    (fused, of_fused), (other, of_other) = made
    assert fused.fused_step is not None
    assert other.fused_step is None
    for ours, theirs in zip(steps_of(fused), steps_of(other), strict=True):
        for figure in ("loss", "grad_norm", "mean_token_accuracy", "entropy"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3), figure
    torch.testing.assert_close(weights(fused), weights(other), rtol=1e-2, atol=1e-4)
    for figure in ("eval_loss", "eval_mean_token_accuracy", "eval_supervised_tokens"):
        assert of_fused[figure] == pytest.approx(of_other[figure], rel=1e-3), figure
    unweighted = trainer(tiny_tokenizer, tmp_path / "ones", steps=1, settings={"dataset_kwargs": KEEP})
    unweighted.train()
    assert steps_of(unweighted)[0]["loss"] != pytest.approx(steps_of(fused)[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "options", "named"),
    [
        ({"loss_type": "dft"}, {}, "loss_type=dft"),
        pytest.param(
            {},
            {"compute_loss_func": lambda *args, **kwargs: None},
            "compute_loss_func",
            marks=pytest.mark.filterwarnings("ignore:`compute_loss_func`:FutureWarning"),
        ),
        ({}, {"data_collator": lambda rows: rows}, "a data_collator of its own"),
    ],
)
def test_losses_that_follow_no_weights_are_refused(
    tiny_tokenizer: Any, tmp_path: Path, settings: Any, options: Any, named: str
) -> None:
    with pytest.raises(UsageError, match=f"loss weights between 0 and 1, which {named} does not follow"):
        trainer(tiny_tokenizer, tmp_path, settings=settings | {"dataset_kwargs": KEEP}, rows=weighted_rows(), **options)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_loss_weights_survive_trl_s_packing(tiny_tokenizer: Any, tmp_path: Path, strategy: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]
    half = [messages[0], messages[1] | {"weight": 0.5}]
    packed = trainer(
        tiny_tokenizer, tmp_path, settings={"packing": True, "max_length": 64, "packing_strategy": strategy},
        rows=Dataset.from_list([{"messages": m} for m in (messages, half) * 6]),
    )  # fmt: skip
    documents = packed.data_collator(list(packed.train_dataset))["documents"]
    found = {float(w) for d in documents for w, label in zip(d.weight_L, d.label_L, strict=True) if label != -100}
    assert found == {0.5, 1.0}


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(("limit", "clipped"), [(0.01, True), (1e6, False), (0.0, False)])
def test_gradients_are_clipped_at_the_limit_and_the_norm_before_is_logged(
    tiny_tokenizer: Any, tmp_path: Path, engine: Any, limit: float, clipped: bool
) -> None:
    seen = LastGradient()
    trained = trainer(tiny_tokenizer, tmp_path, 1, settings={"max_grad_norm": limit}, engine=engine, callbacks=[seen])
    trained.train()
    (logs,) = steps_of(trained)
    assert logs["grad_norm"] > 0.1
    assert seen.norm == pytest.approx(limit if clipped else logs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit"])
def test_weight_decay_shrinks_the_weights(tiny_tokenizer: Any, tmp_path: Path, optim: str) -> None:
    ended = []
    for engine in ("auto", "plain"):
        settings = {"weight_decay": 20.0, "optim": optim}
        trained = trainer(tiny_tokenizer, tmp_path / engine, 4, settings=settings, engine=engine)
        start = weights(trained).clone()
        trained.train()
        assert (trained.fused_step is None) == (engine == "plain")
        ended.append(weights(trained))
        # The learning rate falls from 1e-2 to a quarter of it: 0.8 x 0.85 x 0.9 x 0.95 of A is left, and B is small.
        assert float(ended[-1].norm() / start.norm()) == pytest.approx(0.58, abs=0.04)
    torch.testing.assert_close(ended[0], ended[1], rtol=5e-2, atol=5e-3)


REFUSED: dict[str, Callable[[SFTTrainer, pytest.MonkeyPatch], None]] = {
    "fp16": lambda made, patch: patch.setattr(made.args, "fp16", True),
    "optimizer adafactor": lambda made, patch: patch.setattr(made.args, "optim", OptimizerNames.ADAFACTOR),
    "evaluation in 16 bits": lambda made, patch: patch.setattr(made.args, "bf16_full_eval", True),
    "debug": lambda made, patch: patch.setattr(made.args, "debug", ["underflow_overflow"]),
    "DeepSpeed or FSDP": lambda made, patch: patch.setattr(made, "is_fsdp_enabled", True),
    "label smoothing": lambda made, patch: patch.setattr(made.args, "label_smoothing_factor", 0.1),
    "loss dft": lambda made, patch: patch.setattr(made.args, "loss_type", "dft"),
    "a loss function of its own": lambda made, patch: patch.setattr(made, "compute_loss_func", lambda *_: None),
    "NEFTune noise": lambda made, patch: patch.setattr(made.args, "neftune_noise_alpha", 5.0),
    "optimizer target modules": lambda made, patch: patch.setattr(made.args, "optim_target_modules", ["q_proj"]),
    "torch.float32 weights trained in bfloat16": lambda made, patch: patch.setattr(made.args, "bf16", True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_option_that_the_fused_step_lacks_takes_the_plain_path(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    made = trainer(tiny_tokenizer, tmp_path)
    REFUSED[reason](made, monkeypatch)
    made.bind_fused_step()
    assert made.fused_step is None
    assert made.plain_because == reason


def test_label_smoothing_changes_the_loss_as_asked(tiny_tokenizer: Any, tmp_path: Path) -> None:
    losses = {}
    for smoothing in (0.0, 0.5):
        trained = trainer(tiny_tokenizer, tmp_path, 1, settings={"label_smoothing_factor": smoothing})
        trained.train()
        losses[smoothing] = steps_of(trained)[0]["loss"]
    # An untrained model puts near 1/V on every token, so that smoothing moves the loss by little, but it does.
    assert losses[0.5] != pytest.approx(losses[0.0], rel=1e-5)


def test_noise_reaches_the_embeddings_of_the_plain_path(tiny_tokenizer: Any, tmp_path: Path) -> None:
    losses = {}
    for alpha in (None, 50.0):
        trained = trainer(tiny_tokenizer, tmp_path, 1, settings={"neftune_noise_alpha": alpha})
        trained.train()
        losses[alpha] = steps_of(trained)[0]["loss"]
    assert losses[50.0] != pytest.approx(losses[None], rel=1e-4)


def test_evaluation_binds_nothing(tiny_tokenizer: Any, tmp_path: Path) -> None:
    made = trainer(tiny_tokenizer, tmp_path, eval_dataset=supervised_rows(4))
    plain = made.evaluate()
    assert made.fused_step is None
    assert made.plain_because is None
    made.bind_fused_step()
    bound = made.fused_step
    assert bound is not None
    fused = made.evaluate()
    assert fused["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    made.bind_fused_step()
    assert made.fused_step is bound


def test_tokens_seen_are_counted_without_padding(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for engine in ("auto", "plain"):
        settings = {"include_num_input_tokens_seen": "all", "max_steps": 6}
        trained = trainer(tiny_tokenizer, tmp_path / engine, settings=settings, engine=engine)
        trained.train()
        assert trained.state.num_input_tokens_seen == sum(len(row["input_ids"]) for row in trained.train_dataset)
        assert steps_of(trained)[-1]["num_tokens"] == trained.state.num_input_tokens_seen
        assert steps_of(trained)[-1]["num_supervised_tokens"] == trained.supervised_tokens
        assert trained.supervised_tokens == sum(
            label != -100 for row in trained.train_dataset for label in row["labels"][1:]
        )
        assert trained.state.total_flos == 6 * trained.state.num_input_tokens_seen * (
            trained.model.num_parameters(exclude_embeddings=True)
        )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_stream_that_ends_within_a_step_trains_on_what_is_left(
    tiny_tokenizer: Any, tmp_path: Path, engine: Any
) -> None:
    counted = []
    for count in (11, 3):  # rows; a step takes 8, in 4 micro-batches
        trained = trainer(tiny_tokenizer, tmp_path, 2, engine=engine)
        trained.train_dataset = supervised_rows(count).to_iterable_dataset()
        trained.train()
        counted.append((trained.state.global_step, steps_of(trained)[-1]["num_tokens"]))
    tokens = [len(row["input_ids"]) for row in supervised_rows(11)]
    assert counted == [(2, sum(tokens)), (2, 2 * sum(tokens[:3]))]


def test_a_resumed_run_ends_where_the_whole_one_does(tiny_tokenizer: Any, tmp_path: Path) -> None:
    whole = trainer(tiny_tokenizer, tmp_path / "whole")
    whole.train()
    resumed = trainer(tiny_tokenizer, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.fused_step is not None
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
    heldout = Dataset.from_list([{"input_ids": ids, "labels": ids}, *supervised_rows(5)])
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
    trained = trainer(tiny_tokenizer, tmp_path, steps=1, eval_dataset=supervised_rows(4))
    trained.optimizer = torch.optim.SGD([p for p in trained.model.parameters() if p.requires_grad], lr=0.1)
    trained.evaluate()
    trained.train()
    assert trained.fused_step is None
    assert isinstance(trained.optimizer.optimizer, torch.optim.SGD)


def test_what_it_does_not_know_takes_the_plain_path_and_says_so(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    biased = trainer(tiny_tokenizer, tmp_path, steps=1, lora={"lora_bias": True})
    biased.train()
    assert biased.fused_step is None
    assert biased.plain_because == "LoRA bias"
    assert [record.message for record in caplog.records if "plain path" in record.message] == ["plain path: LoRA bias"]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_documents_that_a_packed_row_would_not_isolate_are_padded(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    """Loss and held-out loss are those of each document by itself."""
    config = AutoConfig.for_model(
        family,
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    data = supervised_rows(16)
    losses, count = 0.0, 0
    for row in data.select(range(8)):
        labels = torch.tensor(row["labels"][1:])
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    first = data.select(range(8))
    made = SFTTrainer(model, args, train_dataset=first, processing_class=tiny_tokenizer, engine="plain")
    assert made.evaluate(first)["eval_loss"] == pytest.approx(losses / count, rel=1e-5)
    assert (made.padded_because is None) == (family == "llama")
    assert ("padded batches in place of packed rows: " in caplog.text) == (family == "opt")
    assert made.train().training_loss == pytest.approx(losses / count, rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_a_checkpoint_of_trl_goes_on_here_and_one_from_here_in_trl(
    tiny_tokenizer: Any, tmp_path: Path, optim: str
) -> None:
    settings = {"optim": optim, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    ended: dict[str, torch.Tensor] = {}
    for first in ("trl", "fused"):
        started: Any = trainer(tiny_tokenizer, tmp_path / first, settings=settings)
        started = trl_trainer(tiny_tokenizer, started) if first == "trl" else started
        started.train()
        ended[first] = weights(started)
        checkpoint = str(tmp_path / first / "checkpoint-3")
        for second in {"trl": ("fused", "plain"), "fused": ("trl",)}[first]:
            engine: Any = "plain" if second == "plain" else "auto"
            resumed: Any = trainer(tiny_tokenizer, tmp_path / "second", settings=settings, engine=engine)
            resumed = trl_trainer(tiny_tokenizer, resumed) if second == "trl" else resumed
            resumed.train(resume_from_checkpoint=checkpoint)
            assert vars(resumed).get("fused_step") is None or second == "fused"
            torch.testing.assert_close(weights(resumed), ended[first], rtol=1e-4, atol=1e-6)
    # 8-bit AdamW keeps small parameters' moments in 32 bits where they are not part of a flat one.
    torch.testing.assert_close(ended["fused"], ended["trl"], rtol=1e-2, atol=1e-3 if optim == "adamw_8bit" else 1e-6)


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(("rank", "targets", "said"), [(4, None, "shape"), (8, ["q_proj"], "not fit|28 parameters")])
def test_an_optimizer_state_of_other_parameters_is_one_clear_line(
    tiny_tokenizer: Any, tmp_path: Path, engine: Any, rank: int, targets: Any, said: str
) -> None:
    started = trainer(tiny_tokenizer, tmp_path / "first", 3, engine=engine)
    started.train()
    other = trainer(tiny_tokenizer, tmp_path / "second", 6, engine=engine)
    base = other.model.unload()
    lora = LoraConfig(r=rank, target_modules=targets or LLAMA_PROJECTIONS, task_type="CAUSAL_LM")
    other = SFTTrainer(
        get_peft_model(base, lora),
        other.args,
        train_dataset=supervised_rows(),
        processing_class=tiny_tokenizer,
        engine=engine,
    )
    other.create_optimizer_and_scheduler(6)
    with pytest.raises(RunError, match=said) as caught:
        other._load_optimizer_and_scheduler(str(tmp_path / "first" / "checkpoint-3"))
    assert "give the adapter settings it was made with" in str(caught.value) or "does not fit" in str(caught.value)


def test_a_frozen_tensor_stays_as_it_is(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for engine in ("auto", "plain"):
        made = trainer(tiny_tokenizer, tmp_path / engine, 2, settings={"weight_decay": 1.0}, engine=engine)
        for name, parameter in made.model.named_parameters():
            if "lora_A" in name or "layers.0." in name:
                parameter.requires_grad_(False)
        before = {name: p.clone() for name, p in made.model.named_parameters() if "lora_" in name}
        made.train()
        assert (made.fused_step is None) == (engine == "plain")
        changed = {n for n, p in made.model.named_parameters() if "lora_" in n and not torch.equal(p, before[n])}
        assert changed == {n for n in before if "lora_B" in n and "layers.1." in n}


class Freeze(TrainerCallback):
    """Freezes the weights whose names have `part` in them after the second step."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.values: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            chosen = {name: p for name, p in model.named_parameters() if "lora_" in name and self.part in name}
            self.values = {name: p.requires_grad_(False).clone() for name, p in chosen.items()}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_a_tensor_that_is_frozen_during_training_stays_as_it_is(
    tiny_tokenizer: Any, tmp_path: Path, optim: str
) -> None:
    ended, norms = [], []
    for engine in ("auto", "plain"):
        freeze = Freeze("layers.0.")
        settings = {"weight_decay": 1.0, "optim": optim}
        made = trainer(tiny_tokenizer, tmp_path / engine, 4, settings=settings, engine=engine, callbacks=[freeze])
        made.train()
        assert (made.fused_step is None) == (engine == "plain")
        assert len(freeze.values) == 14
        for name, value in freeze.values.items():
            assert torch.equal(made.model.get_parameter(name), value), name
        ended.append(weights(made))
        norms.append([logs["grad_norm"] for logs in steps_of(made)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3 if optim == "adamw_torch_fused" else 5e-2)
    torch.testing.assert_close(ended[0], ended[1], rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("later", [False, True])
def test_a_model_with_nothing_to_train_is_refused_in_one_line(
    tiny_tokenizer: Any, tmp_path: Path, engine: Any, later: bool
) -> None:
    made = trainer(tiny_tokenizer, tmp_path, 4, engine=engine, callbacks=[Freeze("lora_")] if later else [])
    if not later:
        made.model.requires_grad_(False)
    with pytest.raises(UsageError, match="every weight of the model is frozen") as caught:
        made.train()
    assert "\n" not in str(caught.value)


def test_options_that_the_fused_step_does_not_follow_are_named(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "gradient_checkpointing, torch_empty_cache_steps"
    line = f"the fused step decides {names} by itself; engine: plain follows them"
    settings = {"gradient_checkpointing": False, "torch_empty_cache_steps": 2, "hub_model_id": "me/x"}
    for engine, count in (("plain", 0), ("auto", 1)):
        caplog.clear()
        trainer(tiny_tokenizer, tmp_path, settings=settings, engine=engine).bind_fused_step()
        assert caplog.messages.count(line) == count
        assert caplog.messages.count("hub_model_id has no effect without push_to_hub: true") == 1
    caplog.clear()
    trainer(tiny_tokenizer, tmp_path).bind_fused_step()
    assert not [message for message in caplog.messages if "by itself" in message or "no effect" in message]


def test_names_of_the_version_before_are_read(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="DocumentCollator"):
        collator = PackedCollator()
    row = collator(supervised_rows(2))
    assert {name: value.shape for name, value in row.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (1, sum(len(row["input_ids"]) for row in supervised_rows(2)))
    )
    made = trainer(tiny_tokenizer, tmp_path, data_collator=collator)
    with pytest.warns(FutureWarning, match="bind_fused_step"):
        made.bind_fast()
    with pytest.warns(FutureWarning, match="fused_step"):
        assert made.fast is made.fused_step
    assert made.fused_step is not None


def test_the_plan_knows_the_step_s_rows_and_the_optimizer_s_state(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def recorded(bound: Any, memory: Any, lengths: Any, documents: int, state_bytes: int) -> Any:
        seen.append((memory, sorted(lengths.tolist()), documents, state_bytes))
        return make_plan(bound, memory, lengths, documents, state_bytes)

    monkeypatch.setattr("parley.training.fused_trainer.make_plan", recorded)
    lengths = sorted(len(row["input_ids"]) for row in supervised_rows())
    for optim, data, state_bytes in (
        (
            "adamw_8bit",
            supervised_rows(),
            2 + 8 / 256,
        ),  # two moments of a byte, with a scale of 4 for each block of 256
        ("adamw_torch", supervised_rows().to_iterable_dataset(), 8),
    ):
        made = trainer(tiny_tokenizer, tmp_path, settings={"optim": optim, "max_length": 33}, memory="low")
        made.train_dataset = data
        made.bind_fused_step()
        assert seen.pop() == ("low", lengths if optim == "adamw_8bit" else [33], 8, state_bytes)


def test_graphs_and_attention_are_prepared_for_the_lengths_of_the_data(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a stream, whose rows are unknown, only attention of the longest that a row may be."""
    prepared: dict[str, Any] = {}
    for name in ("graphs", "attention"):
        monkeypatch.setattr(FusedStep, f"prepare_{name}", lambda step, N, name=name: prepared.update({name: N}))
    made = trainer(tiny_tokenizer, tmp_path, steps=1)
    made.bind_fused_step()
    lengths = made.row_lengths()
    assert sorted(prepared["attention"]) == sorted(lengths)
    assert 8 * lengths.min() <= prepared["graphs"].min() < prepared["graphs"].max() <= 8 * lengths.max()
    assert prepared["graphs"].mean() == pytest.approx(8 * lengths.mean(), rel=0.02)
    prepared.clear()
    trainer(tiny_tokenizer, tmp_path, steps=1, rows=supervised_rows().to_iterable_dataset()).bind_fused_step()
    assert list(prepared) == ["attention"]


def test_adapters_that_are_switched_off_are_not_bound(tiny_tokenizer: Any, tmp_path: Path) -> None:
    made = trainer(tiny_tokenizer, tmp_path)
    with made.model.disable_adapter():
        made.bind_fused_step()
        assert (made.fused_step, made.plain_because) == (None, None)
    made.bind_fused_step()
    assert made.fused_step is not None


def test_a_model_whose_forward_knows_no_token_counts_has_the_same_loss(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Trainer divides a loss by the number of micro-batches where it believes that nobody did."""
    losses = []
    for accepts in (True, False):
        made = trainer(tiny_tokenizer, tmp_path, 1, engine="plain", settings={"max_length": 30})
        made.model.get_base_model().accepts_loss_kwargs = accepts
        made = SFTTrainer(
            made.model, made.args, train_dataset=supervised_rows(), processing_class=tiny_tokenizer, engine="plain"
        )
        losses.append(made.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
