"""The plan of a run: its bytes against those that are really allocated, and what it says where a run does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.plan.conftest import BIG, ROWS, SHAPE, gpu, settings
from transformers import AutoModelForCausalLM, LlamaConfig

import parley
from parley.config import LoraSection, ModelSection
from parley.data.packing import Document
from parley.errors import ModelError, UsageError
from parley.library_compat.torch import LiveBytes
from parley.models.adapters import attach_lora
from parley.models.meta_model import base_bytes, meta_model
from parley.train_step.bind import bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import buffer_bytes, make_plan
from parley.training.optimizer_memory import state_bytes
from parley.training.plan import plain_memory
from parley.training.plan.device import parse_memory
from parley.training.plan.memory import Batches, plain_passes
from parley.training.plan.plain_memory import PassShape, pass_bytes
from parley.training.plan.planner import Data, Planner
from parley.training.plan.run_plan import plan_for
from parley.training.plan.step_time import earlier_rate, peaks
from parley.units import GIB


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_pass_on_fake_tensors_takes_what_a_real_one_takes(checkpointing: bool) -> None:
    section = ModelSection(name="x", quantization="none")
    fake = meta_model(LlamaConfig(**SHAPE), section, torch.float32, LoraSection(r=4), 0)
    shape = PassShape(1, 96, True, None, checkpointing, accumulated=False)
    predicted = pass_bytes(fake, shape)

    real = attach_lora(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), LoraSection(r=4), seed=0)
    base = real.get_base_model()
    plain_memory._prepare(base, checkpointing=checkpointing)
    real.train()
    memory = LiveBytes()
    with memory:
        for tensor in (*real.parameters(), *real.buffers()):
            memory.add(tensor)
        weights = memory.live
        plain_memory._pass(base, shape)
    assert predicted == pytest.approx(memory.peak - weights, rel=0.01)


def test_layers_are_extrapolated_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    section = ModelSection(name="x", quantization="nf4")
    model = meta_model(LlamaConfig(**SHAPE), section, torch.bfloat16, LoraSection(), 0)
    shape = PassShape(2, 64, True, torch.bfloat16, True, accumulated=True)
    extrapolated = pass_bytes(model, shape)
    monkeypatch.setattr(plain_memory, "LAYERS", (2, 5))
    assert extrapolated == pass_bytes(model, shape)


def test_the_fused_plan_counts_what_the_step_allocates() -> None:
    """The same model with weights and without gives the same plan; the step's own tensors are counted."""
    section = ModelSection(name="x", quantization="none")
    lora = LoraSection(r=4)
    without = bind(meta_model(LlamaConfig(**SHAPE), section, torch.float32, lora, 0), "cpu")
    bound = bind(attach_lora(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), lora, seed=0))
    plans = [make_plan(b, 1.0, np.array([64]), 4, 8.0) for b in (without, bound)]
    cpu = torch.device("cpu")
    assert plans[0].tokens == plans[1].tokens
    parts, wanted = (buffer_bytes(plans[0], b, cpu, 8.0) for b in (without, bound))
    assert parts == wanted
    memory = LiveBytes()
    ids = np.arange(64, dtype=np.int32)
    with memory:
        for tensor in (bound.embedding_VD, bound.flat.weight_Z, bound.flat.grad_Z, *bound.flat.weights):
            memory.add(tensor)
        held = memory.live
        step = FusedStep(bound, plans[1])
        step.forward_backward([Document(ids, ids)] * 4, 4 * 63)
    counted = sum(size for name, size in parts.items() if name != "optimizer state")
    weights = sum(p.nbytes for n, p in [(n, p) for n, p in vars(bound).items() if isinstance(p, torch.Tensor)])
    assert counted <= memory.peak - held + weights
    assert sum(t.nbytes for t in step.workspace.buffers.values()) <= parts["activations"]


@pytest.mark.parametrize(("quantization", "bytes_each"), [("none", 2.0), ("nf4", 0.5 + 1 / 64 + 4 / 256 / 64)])
def test_base_weights_by_quantization(quantization: str, bytes_each: float) -> None:
    config = LlamaConfig(**(SHAPE | {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}))
    model = meta_model(config, ModelSection(name="x", quantization=quantization), torch.bfloat16, LoraSection(), 0)
    linear = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if name.endswith("base_layer")
    )
    vocabulary = 2 * 384 * 512 * 2  # embedding and head stay in 16 bits
    assert base_bytes(model) == pytest.approx(linear * bytes_each + vocabulary, rel=0.03)


def test_a_model_that_does_not_fit_says_what_would(model_folder: Any) -> None:
    planned = plan_for(settings(model_folder(**BIG)), ROWS, gpu(4))
    assert planned.parameters == pytest.approx(1.923e9, rel=0.01)
    assert planned.trained_parameters == pytest.approx(5.24e6, rel=0.01)
    assert [(estimate.path, estimate.memory) for estimate in planned.estimates] == [
        ("fused", "auto"), ("fused", "low"), ("plain", ""),
    ]  # fmt: skip
    assert planned.peak_bytes == sum(planned.estimates[0].parts.values()) > 3.5 * GIB
    assert not planned.fits
    found = {alternative.settings: alternative for alternative in planned.alternatives}
    nf4 = found["--set model.quantization=nf4"]
    assert nf4.fits
    assert 2.3 * GIB < nf4.peak_bytes < 4 * GIB
    assert not found["--set training.memory=low"].fits
    assert plan_for(settings(model_folder(**BIG)), ROWS, gpu(80)).fits
    assert plan_for(settings(model_folder(**BIG), "model.quantization=nf4"), ROWS, gpu(4)).peak_bytes == nf4.peak_bytes


def test_where_no_single_change_fits_pairs_are_tried(model_folder: Any) -> None:
    config = settings(model_folder(**BIG), "training.engine=plain", "training.per_device_train_batch_size=16")
    config.model.max_seq_length = 2048
    planned = plan_for(config, Data(np.array([2048] * 64), 64), gpu(4))
    assert not any(a.fits for a in planned.alternatives if a.settings.count("--set") == 1)
    assert planned.alternatives[-1].settings.count("--set") > 1
    assert planned.alternatives[-1].fits
    # A smaller micro-batch keeps the rows of a step.
    assert any("gradient_accumulation_steps=64" in a.settings for a in planned.alternatives)


def test_full_fine_tuning_counts_weights_gradients_and_moments_in_fp32(model_folder: Any) -> None:
    config = settings(model_folder(**BIG), "lora=null", "training.optim=adamw_torch")
    planned = plan_for(config, ROWS, gpu(100))
    captured, estimate = planned.estimates
    assert (captured.path, estimate.path) == ("captured", "plain")
    assert planned.not_fused_because == "the model has no PEFT adapters"
    assert estimate.parts["trained weights"] == pytest.approx(4 * 1.923e9, rel=0.01)
    assert estimate.parts["optimizer state"] == pytest.approx(8 * 1.923e9, rel=0.01)
    assert estimate.parts["gradients, activations and loss"] > 4 * 1.923e9
    smaller = plan_for(config, ROWS, gpu(20))
    assert any("lora={}" in alternative.settings for alternative in smaller.alternatives)


@pytest.mark.parametrize(
    ("optim", "dtype", "bytes_per_weight"),
    [("adamw_8bit", "float32", 2.03), ("adamw_8bit", "bfloat16", 2.03), ("adamw_torch_fused", "bfloat16", 4)],
)
def test_full_fine_tuning_counts_the_optimizer_s_own_state(
    model_folder: Any, optim: str, dtype: str, bytes_per_weight: float
) -> None:
    config = settings(model_folder(**BIG), "lora=null", f"training.optim={optim}", f"model.dtype={dtype}")
    captured = plan_for(config, ROWS, gpu(100)).estimates[0]
    assert captured.path == "captured"
    assert captured.parts["optimizer state"] == pytest.approx(bytes_per_weight * 1.923e9, rel=0.01)
    assert captured.parts["trained weights"] == pytest.approx((2 if dtype == "bfloat16" else 4) * 1.923e9, rel=0.01)


def test_a_run_on_this_machine_is_planned_from_its_data(folder: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"What be {n}?", "completion": f"It be {n}."}) + "\n" for n in range(30))
    )
    config = settings(folder(), data={"source": str(rows), "heldout_rows": 3})
    config.model.device = "cpu"
    before = sorted(tmp_path.rglob("*"))
    planned = parley.plan(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert (planned.rows, planned.steps) == (27, 4)
    assert 27 * 5 < planned.tokens < 32 * planned.longest_row
    assert planned.fits
    assert planned.estimates[0].path == "fused"
    assert "arithmetic" in planned.time_basis
    assert planned.seconds > 0
    assert "weights of the base model, read" not in planned.disk
    assert json.loads(json.dumps(planned.to_json()))["peak_bytes"] == planned.peak_bytes
    on_gpu = parley.plan(config, gpu_memory="24GiB")
    assert "CUDA context" in on_gpu.estimates[0].parts
    assert on_gpu.device_bytes == 24 * GIB


def test_an_adapter_is_planned_on_its_base(folder: Any, tmp_path: Path) -> None:
    base = folder()
    model = attach_lora(
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), LoraSection(r=2, target_modules=["q_proj"]), seed=0
    )
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    planned = plan_for(settings(tmp_path / "adapter"), ROWS, gpu(8))
    assert planned.trained_parameters == 5 * 2 * (64 + 64)
    fresh = plan_for(settings(tmp_path / "adapter", "model.adapter=new"), ROWS, gpu(8))
    assert fresh.trained_parameters > 10 * planned.trained_parameters


def test_time_comes_from_an_earlier_run_of_the_same_kind(folder: Any, tmp_path: Path) -> None:
    config = settings(folder())
    name = gpu(8).name
    earlier = tmp_path / "runs" / "before"
    earlier.mkdir(parents=True)
    (earlier / "run.yaml").write_text(config.to_yaml())
    (earlier / "report.json").write_text(json.dumps({"resources": {"tokens_per_s": 1000.0, "device": name}}))
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "report.json").write_text("[[[")
    planned = plan_for(config, ROWS, gpu(8))
    assert planned.seconds == pytest.approx(planned.tokens / 1000)
    assert planned.time_basis.startswith("from 1,000 tokens/s of the run ")
    other = settings(tmp_path / "model", "training.engine=plain")
    assert earlier_rate(other, name) is None
    assert earlier_rate(config, "another device") is None


def test_padded_rows_are_planned_as_padded_batches() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    batches = Batches(np.array([10, 30, 20, 40]), batch_size=2, accumulation=2, max_length=64)
    with torch.device("meta"):
        packed = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
        padded = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    assert plain_passes(packed, batches) == ([(1, 100)], False)
    assert plain_passes(padded, batches) == ([(2, 40), (2, 20)], True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("24", 24 * GIB), (" 512 MiB ", 2**29), ("1.5g", 3 * 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "24 apples", "0", "1e99GiB", "nan"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="such as 24GiB"):
        parse_memory(text)


def test_what_cannot_be_planned_is_one_line(folder: Any) -> None:
    path = folder()
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="gptq weights cannot be planned"):
        plan_for(settings(path), ROWS, gpu(8))
    (path / "config.json").write_text(json.dumps(values | {"pad_token_id": 5000}))
    with pytest.raises(ModelError, match="cannot be used"):
        plan_for(settings(path), ROWS, gpu(8))
    (path / "model.safetensors").write_bytes(b"no header")
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="damaged"):
        plan_for(settings(path), ROWS, gpu(8))


def test_optimizers_and_devices_by_name() -> None:
    assert state_bytes("adamw_8bit") == pytest.approx(2.03, abs=0.01)
    assert state_bytes("paged_adamw_32bit") == state_bytes("adamw_torch") == 8
    assert state_bytes("adamw_torch", 2) == 4
    assert state_bytes("paged_adamw_32bit", 2) == 8
    assert state_bytes("sgd") == 0
    assert peaks("NVIDIA H200")[0] == peaks("NVIDIA H100 80GB HBM3")[0] == 989e12
    assert peaks("NVIDIA L40S") != peaks("NVIDIA L4")
    assert peaks("x86_64, 2 threads")[0] < 1e12


def test_plans_of_one_model_share_it(model_folder: Any) -> None:
    name = model_folder(**SHAPE)

    def planner(*overrides: str) -> Planner:
        return Planner(settings(name, *overrides), ROWS, gpu(8))

    first = planner()
    assert planner("training.learning_rate=1e-5", "model.max_seq_length=64").model is first.model
    assert planner().taken() == first.taken()
    assert planner("lora.r=4").trained == first.trained / 4
    assert planner("lora=null").trained > first.parameters  # norms are trained, too
    assert planner("model.quantization=nf4").taken().peak_bytes < first.taken().peak_bytes
    assert planner("model.dtype=float32").taken().peak_bytes > first.taken().peak_bytes


def test_a_model_with_attention_dropout_is_planned_on_the_plain_path_as_it_runs(folder: Any) -> None:
    planned = plan_for(settings(folder(attention_dropout=0.1)), ROWS, gpu(8))
    assert planned.not_fused_because == "attention_dropout 0.1"
    assert [estimate.path for estimate in planned.estimates] == ["plain"]
