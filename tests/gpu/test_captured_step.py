"""The captured step on a GPU: replays against passes without a graph, and what a capture forbids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig, get_peft_model
from tests.gpu import models
from tests.gpu.test_fused_step import VOCABULARY, autograd_gradient, documents, exact_gradient
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import activate_neftune
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parley.train_step.captured_step import CapturedStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def adapted(nf4: bool = False, **lora: Any) -> Any:
    model = models.llama(VOCABULARY, torch.bfloat16)
    if nf4:
        model = models.quantised(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM", **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return model


def gradient(step: CapturedStep, seed: int, lengths: tuple[int, ...] = (100, 20, 130)) -> torch.Tensor:
    examples = documents(lengths, seed)
    step.forward_backward(examples, sum(example.supervised_tokens for example in examples))
    return torch.cat([parameter.grad.flatten().float() for parameter in step.trained])


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("nf4", [False, True])
def test_a_replay_reads_new_documents_and_weights(lora: dict[str, Any], nf4: bool) -> None:
    model, fresh = adapted(nf4, **lora), adapted(nf4, **lora)
    graphed = CapturedStep(model, tokens=1000, autocast=torch.bfloat16)
    graphed.threshold.measure = lambda *measured: None  # type: ignore[method-assign]
    eager = CapturedStep(fresh, tokens=1000, autocast=torch.bfloat16, graphs=False)
    for seed, lengths in enumerate([(100, 20, 130), (100, 20, 130), (100, 20, 130), (60, 60, 60, 80), (7, 240)]):
        got, wanted = gradient(graphed, seed, lengths), gradient(eager, seed, lengths)
        assert float((got - wanted).norm() / wanted.norm()) < 0.02
        assert float(graphed.metrics_3[0]) == pytest.approx(float(eager.metrics_3[0]), rel=1e-3)
        for step in (graphed, eager):
            with torch.no_grad():
                for parameter, other in zip(step.trained, eager.trained, strict=True):
                    parameter.sub_(other.grad, alpha=0.1)
    assert 1 <= len(graphed.graphs) <= 2  # of 256 and of 128 supervised rows


def test_the_gradient_is_autograd_s() -> None:
    model = adapted(use_dora=True)
    got = gradient(CapturedStep(model, tokens=1000, autocast=torch.bfloat16), 0)
    model.zero_grad()
    _, wanted = exact_gradient(model, documents((100, 20, 130), 0))
    assert float((got - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
def test_mixtures_of_experts_have_autograd_s_gradient(model_type: str) -> None:
    """In float32, gpt-oss with sinks and windows, experts one by one, since grouped products take 16-bit types."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 50,
    }  # fmt: skip
    config = CONFIG_MAPPING[model_type](**sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    lora = LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM")
    adapted = get_peft_model(model.to("cuda", torch.float32), lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    step = CapturedStep(adapted, tokens=1000, graphs=False)
    step.experts_one_by_one = False
    got = gradient(step, 0)
    adapted.zero_grad()
    _, wanted = autograd_gradient(adapted, documents((100, 20, 130), 0))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_sinks_attends_in_packed_rows_as_alone(dtype: torch.dtype) -> None:
    """gpt-oss's heads, groups, windows and sinks, all trained. A token reaches all experts, so that rounding changes no
    choice: in bfloat16 the packed row is no further from float32 than documents alone through the model's own code."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gpt_oss"](
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=2, head_dim=64, num_local_experts=2, num_experts_per_tok=2, sliding_window=128,
    )  # fmt: skip
    exact = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    for name, parameter in exact.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=1.0 if "sinks" in name else 0.03)
    exact = exact.to("cuda", torch.bfloat16).float()
    examples = documents((1, 300, 20, 130, 37), 0)
    attention = [name for name, _ in exact.named_parameters() if "self_attn" in name]

    def gradients(model: Any, packed: bool) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("self_attn" in name)
        if packed:
            step = CapturedStep(model, tokens=1000, graphs=False)
            step.experts_one_by_one = False
            step.forward_backward(examples, sum(example.supervised_tokens for example in examples))
        else:
            autograd_gradient(model, examples)
        parameters = dict(model.named_parameters())
        return {name: parameters[name].grad.float().clone() for name in attention}

    wanted = gradients(exact, packed=False)
    model = exact.to(dtype)
    alone, got = gradients(model, packed=False), gradients(model, packed=True)
    for name, gradient in wanted.items():
        scale = gradient.norm()
        allowed = 1e-4 if dtype == torch.float32 else 1.3 * float((alone[name] - gradient).norm() / scale) + 1e-3
        assert float((got[name] - gradient).norm() / scale) < allowed, name


def test_replays_have_the_router_s_auxiliary_loss_of_their_tokens_without_padding() -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["qwen3_moe"](
        vocab_size=VOCABULARY, hidden_size=128, moe_intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)
    lora = LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    steps = [
        CapturedStep(model, tokens=1000, autocast=torch.bfloat16, router_loss=0.5, graphs=graphs)
        for graphs in (True, False)
    ]
    steps[0].threshold.measure = lambda *measured: None  # type: ignore[method-assign]
    for seed, lengths in enumerate([(100, 20, 130), (100, 20, 130), (100, 20, 130), (60, 60, 60, 80), (7, 240)]):
        (got, got_total), (wanted, wanted_total) = (
            (gradient(step, seed, lengths), float(step.router.total)) for step in steps if step.router is not None
        )
        assert float((got - wanted).norm() / wanted.norm()) < 0.02
        assert got_total == pytest.approx(wanted_total, rel=1e-3)
    assert steps[0].graphs


@pytest.mark.parametrize("noise", [False, True])
def test_random_numbers_are_sampled_anew_at_every_replay_and_repeat_with_the_seed(noise: bool) -> None:
    """Masks of dropout, or NEFTune's noise on embeddings."""
    model = adapted(lora_dropout=0.0 if noise else 0.5).train()
    if noise:
        activate_neftune(model, 20.0)
    step = CapturedStep(model, tokens=1000, autocast=torch.bfloat16, noise=noise)
    step.threshold.measure = lambda *measured: None  # type: ignore[method-assign]
    gradients = [gradient(step, 0) for _ in range(5)]
    assert len(step.graphs) == 1
    for i in range(5):
        for j in range(i):
            assert not torch.equal(gradients[i], gradients[j])
    repeated = []
    for seed in (7, 8, 7):
        torch.manual_seed(seed)
        repeated.append(gradient(step, 0))
    different, same = ((repeated[i] - repeated[0]).norm() / repeated[0].norm() for i in (1, 2))
    assert float(same) < 0.1 * float(different)


def test_8_bit_products_which_a_capture_forbids_run_without_one(caplog: pytest.LogCaptureFixture) -> None:
    base = models.llama(VOCABULARY, torch.float16)
    for path in [name for name, _ in base.named_modules() if name.endswith("_proj")]:
        linear = base.get_submodule(path)
        packed = Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=6.0)
        packed.load_state_dict(linear.state_dict())
        base.set_submodule(path, packed.to("cuda"))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM"))
    step = CapturedStep(model, tokens=1000, autocast=torch.bfloat16)
    step.threshold.measure = lambda *measured: None  # type: ignore[method-assign]
    gradients = [gradient(step, 0) for _ in range(4)]
    torch.testing.assert_close(gradients[3], gradients[0], rtol=0.05, atol=1e-3)
    assert not step.graphs
    assert "8-bit products look for outliers on the host" in caplog.text


def test_a_capture_that_fails_leaves_random_numbers_and_training_as_they_were(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CapturedStep(adapted(lora_dropout=0.5).train(), tokens=1000, autocast=torch.bfloat16)
    step.threshold.measure = lambda *measured: None  # type: ignore[method-assign]
    loss = step._loss

    def synchronising(batch: Any) -> Any:
        float(batch.scale)
        return loss(batch)

    monkeypatch.setattr(step, "_loss", synchronising)
    gradients = [gradient(step, 0) for _ in range(5)]
    assert not step.graphs
    assert caplog.text.count("passes are not captured") == 1
    assert not torch.equal(gradients[3], gradients[4])
    torch.randn(3, device="cuda")
