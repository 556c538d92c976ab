"""Memory that runs out in a pass, and the rehearsal before the first step, on both paths of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from parley.config import LLAMA_PROJECTIONS
from parley.errors import RunError
from parley.training import rehearsal
from parley.training.callbacks import EventLog
from parley.training.out_of_memory import halved_limit, is_out_of_memory, join_rows, retry_smaller, split_rows
from parley.training.trainer import SFTTrainer

STEPS = 4
FAULTY = (1, 3)  # steps whose passes do not fit


def rows(count: int = 64, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(0, 300, int(rng.integers(5, 30)))
        made.append({"input_ids": ids.tolist(), "labels": np.where(np.arange(len(ids)) > 3, ids, -100).tolist()})
    return Dataset.from_list(made)


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make(
    tokenizer: Any, folder: Path, engine: str, *, dropout: float = 0.0, model: Any = None, cls: Any = SFTTrainer,
    **settings: Any,
) -> SFTTrainer:  # fmt: skip
    torch.manual_seed(0)
    base = llama() if model is None else model
    lora = LoraConfig(target_modules=LLAMA_PROJECTIONS, lora_dropout=dropout, task_type="CAUSAL_LM")
    args = SFTConfig(
        str(folder),
        **{
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": STEPS,
            "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
            "bf16": False, "disable_tqdm": True, "optim": "adamw_torch", "seed": 0, "max_length": 32,
            "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8, **settings,
        },
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    return cls(
        get_peft_model(base.to(torch.float32), lora), args, train_dataset=rows(), eval_dataset=rows(12, 1),
        processing_class=tokenizer, engine=engine, callbacks=[EventLog(folder / "events.jsonl", torch.device("cpu"))],
    )  # fmt: skip


def losses(trainer: SFTTrainer) -> list[float]:
    return [log[key] for log in trainer.state.log_history for key in ("loss", "grad_norm", "eval_loss") if key in log]


def events(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "out_of_memory"]


def limit_memory(trainer: SFTTrainer, tokens: int, during: str, steps: tuple[int, ...] = FAULTY) -> list[int]:
    """Passes of over `tokens` tokens run out of memory at their end, when they have added to the gradients already.

    `during` "training": in `steps` alone. Returns the list that gets the size of each failed pass.
    """
    failed: list[int] = []

    def check(size: int) -> None:
        training = trainer.model.training
        if size > tokens and (trainer.state.global_step + 1 in steps if training else during == "evaluation"):
            if training and during != "training":
                return
            failed.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    trainer.bind_fused_step()
    step = trainer.fused_step
    if step is not None:
        backward, head = step.backward, step.head

        def failing_backward(batch: Any, state: Any) -> None:
            backward(batch, state)
            check(batch.tokens)

        def failing_head(batch: Any, state: Any, **options: Any) -> Any:
            loss_S = head(batch, state, **options)
            if not trainer.model.training:
                check(batch.tokens)
            return loss_S

        step.backward, step.head = failing_backward, failing_head  # type: ignore[method-assign]
        return failed
    sizes: list[int] = []
    accelerator_backward = trainer.accelerator.backward

    def forward_hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if not trainer.model.training:
            check(sizes[-1])

    def failing_backward_of_loss(loss: torch.Tensor, **kwargs: Any) -> None:
        accelerator_backward(loss, **kwargs)
        check(sizes[-1])

    trainer.model.register_forward_hook(forward_hook, with_kwargs=True)
    trainer.accelerator.backward = failing_backward_of_loss
    return failed


@pytest.fixture(scope="module", params=["auto", "plain"])
def undisturbed(request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with memory enough, by each engine in turn."""
    trainer = make(tiny_tokenizer, tmp_path_factory.mktemp("undisturbed") / "whole", request.param)
    trainer.train()
    assert (trainer.fused_step is None) == (request.param == "plain")
    return trainer


def test_a_fused_step_with_dropout_is_done_again_from_its_own_random_state(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Also where the passes did not shrink, it samples the masks that it would have had."""
    trainer, states = make(tiny_tokenizer, tmp_path, "auto", dropout=0.2), []
    trainer.bind_fused_step()
    step = trainer.fused_step
    assert step is not None
    whole = step.forward_backward

    def failing_once(*given: Any) -> None:
        states.append(torch.get_rng_state())
        whole(*given)
        if len(states) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    step.forward_backward = failing_once  # type: ignore[method-assign]
    trainer.train()
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


@pytest.mark.parametrize("during", ["training", "evaluation"])
def test_a_step_that_does_not_fit_is_done_again_with_the_same_result(
    tiny_tokenizer: Any, tmp_path: Path, undisturbed: SFTTrainer, during: str
) -> None:
    engine = "plain" if undisturbed.fused_step is None else "auto"
    trainer = make(tiny_tokenizer, tmp_path / "short", engine)
    failed = limit_memory(trainer, 40, during)
    trainer.train()
    assert failed
    assert trainer.state.global_step == STEPS
    assert losses(trainer) == pytest.approx(losses(undisturbed), rel=1e-6)
    assert not events(Path(undisturbed.args.output_dir))
    recorded = events(tmp_path / "short")
    assert len(recorded) == len(failed)
    assert {event["during"] for event in recorded} == {during}
    assert recorded[0]["step"] == (1 if during == "training" else 2)
    assert "out of memory in " in recorded[0]["message"]


def test_later_steps_keep_to_the_smaller_passes(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer = make(tiny_tokenizer, tmp_path, "plain")
    failed = limit_memory(trainer, 40, "training", tuple(range(1, STEPS + 1)))
    trainer.train()
    assert {event["step"] for event in events(tmp_path)} == {1}
    assert len(failed) <= 3  # 128 tokens at most, halved to 40 or less


def test_padded_batches_are_halved_by_rows(
    tiny_tokenizer: Any, tmp_path: Path, build_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFTTrainer, "padded_because", "this test")
    undisturbed = make(tiny_tokenizer, tmp_path / "whole", "plain")
    undisturbed.train()
    trainer = make(tiny_tokenizer, tmp_path / "short", "plain")
    failed = limit_memory(trainer, 30, "training")
    trainer.train()
    assert len(failed) == 2  # 4 rows, then 2
    assert losses(trainer) == pytest.approx(losses(undisturbed), rel=1e-6)
    assert "padded batches of 1 rows" in events(tmp_path / "short")[-1]["message"]


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_document_that_does_not_fit_by_itself_ends_the_run(tiny_tokenizer: Any, tmp_path: Path, engine: str) -> None:
    trainer = make(tiny_tokenizer, tmp_path, engine)
    failed = limit_memory(trainer, 1, "training")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer.train()
    assert 1 < len(failed) < 10


def test_other_errors_are_not_taken_for_it(tiny_tokenizer: Any, tmp_path: Path) -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))

    def attempt() -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        retry_smaller(attempt, lambda: pytest.fail("there is nothing to reduce"))


def test_a_failed_attempt_leaves_no_tensors_behind() -> None:
    """The traceback would keep the memory that the next attempt needs."""
    import weakref

    alive: list[Any] = []

    def attempt() -> str:
        big = torch.zeros(8)
        if not alive:
            alive.append(weakref.ref(big))
            raise torch.OutOfMemoryError("no memory")
        return "done"

    def reduce() -> bool:
        assert alive[0]() is None
        return True

    assert retry_smaller(attempt, reduce) == "done"


def test_limits_halve_the_largest_pass() -> None:
    assert halved_limit([10, 10, 10, 10], float("inf")) == 20
    assert halved_limit([10, 10, 10, 10], 20) == 10
    assert halved_limit([10, 10], 10) is None
    assert halved_limit([], 10) is None
    # The longest document is a pass of its own: the others are split.
    assert halved_limit([100, 10, 20], 40) == 15


def test_batches_are_split_by_rows_and_joined() -> None:
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.arange(5)}
    parts = split_rows(batch, 2)
    assert [len(part["labels"]) for part in parts] == [2, 3]
    assert torch.equal(join_rows([part["input_ids"] for part in parts]), batch["input_ids"])
    assert len(split_rows(batch, 64)) == 5
    assert split_rows({"a": torch.zeros(3), "b": torch.zeros(2)}, 2)[0]["b"].shape == (2,)  # rows that do not agree
    joined = join_rows([(torch.zeros(2, 3), torch.ones(2)), (torch.zeros(1, 3), torch.ones(1))])
    assert [tuple(value.shape) for value in joined] == [(3, 3), (3,)]


def test_logits_of_a_split_evaluation_are_those_of_the_whole(tiny_tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for name, limit in (("whole", 10**9), ("short", 100)):
        trainer = make(tiny_tokenizer, tmp_path / name, "plain")
        failed = limit_memory(trainer, limit, "evaluation")
        with pytest.warns(FutureWarning):
            output = trainer.predict(rows(12, 1))
        assert bool(failed) == (name == "short")
        found.append(output)
    whole, short = found
    np.testing.assert_allclose(short.predictions, whole.predictions, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(short.label_ids, whole.label_ids)
    assert short.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)


class Rehearsing(SFTTrainer):
    """As on a GPU."""

    wants_rehearsal = True  # type: ignore[assignment]


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # packed rows and padded ones
def test_a_rehearsal_changes_no_bit(
    tiny_tokenizer: Any, tmp_path: Path, build_family: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: a random number that was taken would show."""
    config = AutoConfig.from_pretrained(build_family(family))
    found = []
    for cls in (SFTTrainer, Rehearsing):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        trainer = make(
            tiny_tokenizer,
            tmp_path / cls.__name__,
            "plain",
            dropout=0.2,
            model=model,
            cls=cls,
            max_steps=2,
            eval_steps=1,
        )
        sizes: list[int] = []
        trainer.model.register_forward_hook(
            lambda module, args, kwargs, output, sizes=sizes: sizes.append(kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        found.append((losses(trainer), weights, sizes))
        assert [path.name for path in (tmp_path / cls.__name__).iterdir()] == ["events.jsonl"]
    (plain_losses, plain_weights, plain_sizes), (losses_after, weights_after, sizes_after) = found
    assert losses_after == plain_losses
    assert torch.equal(weights_after, plain_weights)
    rehearsed = sizes_after[: len(sizes_after) - len(plain_sizes)]
    assert sizes_after[len(rehearsed) :] == plain_sizes
    assert rehearsed
    assert max(rehearsed) >= max(plain_sizes)  # no pass of the run is larger than what was rehearsed


def test_a_rehearsal_finds_passes_that_fit_before_the_first_step(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer = make(tiny_tokenizer, tmp_path, "plain", cls=Rehearsing, eval_strategy="no")
    failed = limit_memory(trainer, 60, "training", tuple(range(1, STEPS + 1)))
    trainer.train()
    assert failed
    assert {(event["step"], event["during"]) for event in events(tmp_path)} == {(1, "rehearsal")}


def test_a_full_disk_is_found_before_the_first_step(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tiny_tokenizer, tmp_path, "plain", cls=Rehearsing, save_strategy="steps")
    usage = rehearsal.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    rehearsal.rehearse_saving(trainer)
    assert "lower training.save_total_limit" in caplog.text

    def full(folder: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left"):
        trainer.train()
    assert trainer.state.global_step == 0
