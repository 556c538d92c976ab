"""The trainer on the captured path against the same trainer on the plain path, on a CPU."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.training.rows import supervised_rows
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from parley.errors import UsageError
from parley.train_step.captured_step import SPARE, CapturedStep, GraphSize
from parley.train_step.optimizer import AdamW8bit
from parley.training.trainer import SFTTrainer


def trainer(
    build_family: Any, tokenizer: Any, folder: Path, engine: str, lora: dict[str, Any] | None = None,
    family: str = "starcoder2", **settings: Any,
) -> SFTTrainer:  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(build_family(family), dtype=torch.float32)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora))
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "bf16": False,
        "optim": "adamw_torch", "output_dir": str(folder), "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    return SFTTrainer(
        model=model,
        args=SFTConfig(**defaults | settings),
        train_dataset=supervised_rows(40),
        eval_dataset=supervised_rows(9),
        processing_class=tokenizer,
        engine=engine,
    )


@pytest.mark.parametrize("lora", [None, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"neftune_noise_alpha": 0.0}]
)
def test_learns_what_the_plain_path_learns(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, lora: dict[str, Any] | None, settings: dict[str, Any]
) -> None:
    if settings and lora is not None:
        pytest.skip("once is enough")
    runs = [
        trainer(build_family, tiny_tokenizer, tmp_path, engine, lora, **settings) for engine in ("captured", "plain")
    ]
    for run in runs:
        run.train()
    captured, plain = runs
    assert isinstance(captured.captured_step, CapturedStep)
    assert captured.plain_because is None
    assert plain.captured_step is None
    assert_equal_runs(captured, plain)


def assert_equal_runs(captured: SFTTrainer, plain: SFTTrainer) -> None:
    names = ["loss", "grad_norm", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_entropy"]
    if captured.captured_step is not None and captured.captured_step.router is not None:
        names.append("aux_loss")  # beside label smoothing TRL logs it, too, and leaves it out of the loss
    logs = [
        [{n: entry[n] for n in names if n in entry} for entry in run.state.log_history] for run in (captured, plain)
    ]
    assert len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for ours, theirs in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


def test_8_bit_adamw_of_a_whole_model_updates_as_bitsandbytes_does(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    ended = []
    for engine in ("captured", "plain"):
        run = trainer(build_family, tiny_tokenizer, tmp_path, engine, optim="adamw_8bit", weight_decay=0.1)
        run.train()
        optimizer = run.optimizer.optimizer  # inside accelerate's
        assert isinstance(optimizer, AdamW8bit) == (engine == "captured")
        state = {name: optimizer.state[parameter] for name, parameter in run.model.named_parameters()}
        # TRL's exception: 32 bits for embeddings. Small weights have them, too.
        ended.append({name: (values["state1"].dtype, values["step"]) for name, values in state.items()})
        ended.append([parameter.detach() for parameter in run.model.parameters()])
    assert ended[0] == ended[2]
    assert torch.uint8 in {dtype for dtype, _ in ended[0].values()}
    for ours, theirs in zip(ended[1], ended[3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-4)


def test_a_router_whose_auxiliary_loss_trl_cannot_compute(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    """Its configuration has no num_experts. The captured path has the loss; the plain path says that it does not."""
    captured, plain, asked = (
        trainer(build_family, tiny_tokenizer, tmp_path, engine, {"r": 4}, "granitemoe", max_steps=2, **settings)
        for engine, settings in (("captured", {}), ("plain", {}), ("plain", {"router_aux_loss_coef": 0.1}))
    )
    captured.train()
    assert all("aux_loss" in entry for entry in captured.state.log_history if "loss" in entry)
    assert "auxiliary loss" not in caplog.text
    plain.train()
    assert "TRL computes no auxiliary loss of a router for the granitemoe family: training goes" in caplog.text
    with pytest.raises(UsageError, match=r"router_aux_loss_coef: TRL computes no auxiliary loss .* set it to 0"):
        asked.train()


def test_noise_of_embeddings_is_each_document_s_and_the_plain_path_takes_padded_batches(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    captured, plain = (
        trainer(build_family, tiny_tokenizer, tmp_path, engine, {"r": 4}, neftune_noise_alpha=5.0, max_steps=1)
        for engine in ("captured", "plain")
    )
    for run in (captured, plain):
        run.train()
    assert captured.captured_step is not None
    assert captured.captured_step.noise
    assert "padded batches in place of packed rows: NEFTune's noise is scaled by the length of a row" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"router_aux_loss_coef": 0.0}, {"label_smoothing_factor": 0.1}])
def test_a_mixture_of_experts_learns_its_router_s_auxiliary_loss_as_on_the_plain_path(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """As TRL has it by default. One pass a step on both paths: the loss of a pass is no sum over its tokens."""
    captured, plain = (
        trainer(
            build_family,
            tiny_tokenizer,
            tmp_path,
            engine,
            {"r": 4},
            "qwen3_moe",
            gradient_accumulation_steps=1,
            **settings,
        )
        for engine in ("captured", "plain")
    )
    for run in (captured, plain):
        run.train()
    assert captured.captured_step is not None
    assert (captured.captured_step.router is None) == bool(settings)
    assert any("aux_loss" in entry for entry in captured.state.log_history) == (not settings)
    assert_equal_runs(captured, plain)


def test_steps_rehearsed_before_training_cover_the_data_and_leave_no_trace(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, sizes = [], []
    for rehearses in (False, True):
        monkeypatch.setattr(SFTTrainer, "wants_rehearsal", rehearses)
        run = trainer(build_family, tiny_tokenizer, tmp_path, "captured", {"r": 4, "lora_dropout": 0.3})
        run.bind_fused_step()
        step = run.captured_step
        assert step is not None
        # What a GPU would capture: on a CPU passes run without a graph.
        step.uses_graphs = rehearses
        monkeypatch.setattr(
            step,
            "_pass",
            lambda packed, scale, alone, step=step: (
                sizes.append(GraphSize(len(packed.ids_T), len(packed.row_S), alone)),
                step._run_eager(packed, sizes[-1], scale),
            ),
        )
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad]))
    assert torch.equal(*weights)
    steps = run.args.max_steps
    trained, rehearsed = sizes[-steps:], sizes[steps:-steps]
    assert sizes[:steps] == trained
    assert len(rehearsed) > 2
    assert all(any(SPARE * size.tokens * 1.1 >= other.tokens for size in rehearsed) for other in trained)
    # The rehearsed steps leave rows for the supervised tokens of every other step.
    assert 0.3 < step.row_share < 0.7
    assert all(step.row_share * size.tokens * SPARE > size.rows for size in trained)
    tokens = [size.tokens for size in rehearsed[2:]]
    assert tokens == sorted(tokens, reverse=True)


def test_memory_that_runs_out_halves_passes_and_then_takes_the_plain_path(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    run, wanted = (
        trainer(build_family, tiny_tokenizer, tmp_path, engine, {"r": 4}) for engine in ("captured", "plain")
    )
    wanted.train()
    limits: list[float] = []

    def out_of_memory(step: CapturedStep, *args: Any) -> None:
        limits.append(step.tokens)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(CapturedStep, "forward_backward", out_of_memory)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert len(limits) > 2
    assert limits == sorted(limits, reverse=True)
    assert run.plain_because == "out of memory on the captured path"
    assert "plain path: out of memory on the captured path" in caplog.text
    for ours, theirs in zip(run.model.parameters(), wanted.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        (None, {}),
        ({"use_dora": True, "lora_dropout": 0.1}, {}),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 3}}, {}),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, {}),
        ({"trainable_token_indices": [5, 9], "target_modules": ["q_proj"]}, {"family": "qwen3_moe"}),
        ({}, {"label_smoothing_factor": 0.1}),
        ({}, {"loss_type": "dft"}),
        ({}, {"neftune_noise_alpha": 5.0}),
        ({}, {"optim": "adamw_8bit"}),
    ],
)
def test_where_the_fused_step_gives_way_it_takes_the_run_and_says_why(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: Any, lora: Any, settings: dict[str, Any]
) -> None:
    run = trainer(build_family, tiny_tokenizer, tmp_path, "auto", lora, max_steps=1, eval_strategy="no", **settings)
    # As on a GPU, where alone auto prefers it to the plain path.
    run._take_another_path = partial(take_another_path, run)  # type: ignore[method-assign]
    run.train()
    assert run.captured_step is not None
    assert run.plain_because is None
    reasons = [record.message for record in caplog.records if record.message.startswith("captured path: ")]
    assert len(reasons) == 1
    assert len(reasons[0]) > len("captured path: ")


def take_another_path(run: SFTTrainer, reason: str) -> None:
    run.engine = "captured"
    SFTTrainer._take_another_path(run, reason)


def test_options_that_it_lacks_take_the_plain_path_and_say_so(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    run = trainer(build_family, tiny_tokenizer, tmp_path, "captured", {"r": 4}, torch_compile=True)
    run.bind_fused_step()
    assert run.plain_because == "engine: captured; no captured path: torch_compile"


def test_what_only_training_mode_shows_takes_the_plain_path_and_is_said(
    build_family: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    run = trainer(build_family, tiny_tokenizer, tmp_path, "captured", {"r": 4}, max_steps=2)
    for layer in run.model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.1
    with caplog.at_level(logging.WARNING):
        run.train()
    assert run.state.global_step == 2
    assert run.plain_because == "attention dropout of 0.1"
    assert "plain path: attention dropout of 0.1" in caplog.text


def test_a_cpu_takes_it_only_where_it_is_asked_for(build_family: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    run = trainer(build_family, tiny_tokenizer, tmp_path, "auto", {"r": 4})
    run.bind_fused_step()
    assert run.captured_step is None
    assert run.plain_because == "no fused step for the starcoder2 family"
