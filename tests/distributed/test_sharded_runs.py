"""Runs with sharded weights learn what a run of one process learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.distributed.conftest import in_processes
from tests.distributed.test_data_parallel import assert_same_run, events, weights, weights_in
from transformers import AutoModelForCausalLM

from parley.config import RunConfig
from parley.errors import UsageError
from parley.models import save_sharded
from parley.pipeline import train
from parley.training.run_folder import RunFolder

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("count", "settings"),
    [(2, ("model.quantization=nf4",)), (4, ())],
    ids=["nf4", "fp32"],
)
def test_a_sharded_run_learns_what_one_process_learns(
    configured: Callable[..., RunConfig], count: int, settings: tuple[str, ...]
) -> None:
    alone = configured("training.engine=captured", *settings)
    train(alone, QUIET)
    together = configured("training.shard=full", *settings)
    assert in_processes(count, lambda: train(together, QUIET)) == [0] * count
    assert_same_run(together.output, alone.output)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("training.engine=plain",), "training.engine: plain do not go together"),
        (("training.method=kto",), "training.method: kto trains in one process"),
        (("lora=null", "training.optim=adamw_8bit"), "training.optim: adamw_8bit with lora: null do not go together"),
        (("lora=null", "training.keep=best", "training.eval_steps=2"), "training.keep: best with lora: null do not go"),
        (("lora.use_dora=true",), "lora.use_dora do not go together"),
        (("lora.init_lora_weights=pissa",), "lora.init_lora_weights do not go together"),
        (("model.quantization=int8",), "model.quantization: int8 is not sharded; there are none, nf4"),
    ],
)
def test_what_sharded_weights_do_not_follow_is_refused(
    configured: Callable[..., RunConfig], refusal: Callable[[RunConfig], str], settings: tuple[str, ...], message: str
) -> None:
    assert message in refusal(configured("training.shard=full", *settings))


def test_sharding_takes_several_processes(configured: Callable[..., RunConfig]) -> None:
    with pytest.raises(UsageError, match="cuts weights over processes, and there is one; add --gpus N"):
        train(configured("training.shard=full"), QUIET)


FULL = ("training.shard=full", "lora=null", "training.learning_rate=0.001")


@pytest.mark.parametrize("count", [2, 4])
def test_full_fine_tuning_of_sharded_weights(configured: Callable[..., RunConfig], count: int) -> None:
    alone = configured("training.engine=captured", *FULL[1:])
    train(alone, QUIET)
    together = configured(*FULL)
    assert in_processes(count, lambda: train(together, QUIET)) == [0] * count
    assert_same_run(together.output, alone.output)


@pytest.mark.parametrize(
    ("settings", "counts"),
    [(("training.shard=full", "model.quantization=nf4"), (2, 4)), (FULL, (4, 1))],
    ids=["nf4 with LoRA", "all weights"],
)
def test_a_sharded_checkpoint_is_resumed_by_as_many_processes_exactly_and_by_others(
    configured: Callable[..., RunConfig], settings: tuple[str, ...], counts: tuple[int, ...]
) -> None:
    undisturbed = configured("training.max_steps=4", *settings)
    assert in_processes(2, lambda: train(undisturbed, QUIET)) == [0, 0]
    wanted = weights(undisturbed.output)
    for count in counts:
        config = configured("training.max_steps=2", "training.save_steps=2", *settings)
        assert in_processes(2, lambda config=config: train(config, QUIET)) == [0, 0]
        longer = RunFolder(config.output).config
        longer.training.max_steps, longer.training.save_steps = 4, 4
        longer.training.shard = "full" if count > 1 else "none"
        work = lambda config=longer: train(config, QUIET, resume=config.output)  # noqa: E731
        assert in_processes(count, work) == [0] * count
        ours = weights(config.output)
        if count == 2:
            assert torch.equal(ours, wanted)
        # What the moments made of it since the checkpoint: little beside the weights themselves.
        start = weights_in(RunFolder(config.output).checkpoints / "checkpoint-2")
        assert float((ours - wanted).norm() / (wanted - start).norm()) < 1e-4
        losses = [[step["loss"] for step in events(run, "step")] for run in (config.output, undisturbed.output)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_all_weights_are_saved_in_files_of_a_limited_size(
    configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_sharded, "FILE_BYTES", 1 << 17)
    config = configured("training.max_steps=1", *FULL)
    assert in_processes(2, lambda: train(config, QUIET)) == [0, 0]
    folder = RunFolder(config.output).model
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())


def test_a_model_with_a_shared_head_is_sharded_and_saved(
    configured: Callable[..., RunConfig], build_family: Callable[[str], Path]
) -> None:
    name = f"model.name={build_family('gemma3')}"
    alone, together = configured("training.engine=captured", name, *FULL[1:]), configured(name, *FULL)
    train(alone, QUIET)
    assert in_processes(2, lambda: train(together, QUIET)) == [0, 0]
    assert_same_run(together.output, alone.output)
