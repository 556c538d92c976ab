"""The captured step against transformers, PEFT and autograd, in float32 on a CPU, where passes run without a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import activate_neftune
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document, loss_weight
from parley.models.packing_isolation import why_not_packed
from parley.train_step import packed_attention
from parley.train_step.bind import Unsupported
from parley.train_step.captured_step import CapturedStep, GraphSize, packed_logits
from parley.train_step.packed_batch import StagingBuffer, pack
from parley.train_step.router_loss import router_loss

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 0.7, "head_dim": 16},
    "cohere2": {"sliding_window": 8},
    "starcoder2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "nemotron": {},  # whose attention is handed no arguments of the forward pass
    "deepseek_v3": {  # keys of 24 columns, values of 16
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
}


def build(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**SIZES | FAMILIES[model_type]), attn_implementation="eager", **options
    )
    for name, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=1.0 if "sinks" in name else 0.02)
    return model.eval()


def documents(lengths: tuple[int, ...] = (1, 17, 5, 150, 29)) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(3, 101, (length,), generator=generator).tolist()
        made.append(Document.from_lists(ids, [i if i % 2 else IGNORE_INDEX for i in ids]))
    return made


def wanted_loss(model: Any, examples: list[Document], smoothing: float = 0.0) -> float:
    """Through autograd, one document at a time; the gradients are in `grad`."""
    count = sum(example.loss_weight for example in examples)
    total = 0.0
    for example in examples:
        logits_LV = model(torch.tensor(example.ids_L).long()[None]).logits[0, :-1]
        target_L = torch.tensor(example.label_L[1:]).long()
        loss_L = functional.cross_entropy(
            logits_LV, target_L, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
        )
        loss = loss_L @ torch.tensor(example.with_weights().weight_L[1:])
        (loss / count).backward()
        total += loss.item()
    return total


def check(
    model: Any, examples: list[Document], *, smoothing: float = 0.0, tokens: int = 1000, record_property: Any = None
) -> CapturedStep:
    loss = wanted_loss(model, examples, smoothing)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    step = CapturedStep(model, tokens=tokens, smoothing=smoothing)
    for _ in range(2):  # a second step starts from nothing
        step.forward_backward(examples, loss_weight(examples))
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=1e-5)
    got = dict(model.named_parameters())
    difference = torch.stack([(got[name].grad - gradient).norm() for name, gradient in wanted.items()]).norm()
    error = float(difference / torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    assert error < 1e-5
    if record_property is not None:
        record_property("captured_gradient_error", error)
    for name, gradient in wanted.items():
        if "sinks" in name:  # few, so that the norm of all would not show them
            torch.testing.assert_close(got[name].grad, gradient, rtol=1e-4, atol=1e-6)
    return step


@pytest.mark.parametrize("model_type", FAMILIES)
def test_full_fine_tuning_of_any_family(model_type: str, record_property: Any) -> None:
    model = build(model_type)
    assert why_not_packed(model, 256, packed_logits) is None
    record_property("family", model_type)  # for the table of families, by benchmarks/family_parity.py
    check(model, documents(), record_property=record_property)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_that_run_one_by_one_run_as_grouped_products(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture forbids the question which experts are reached; outside of passes the model is as it was."""
    model = build(model_type, experts_implementation="eager")
    step = check(model, documents())
    assert model.get_experts_implementation() == {"": "eager"}
    seen, loss = [], step._loss
    monkeypatch.setattr(step, "_loss", lambda batch: seen.append(model.get_experts_implementation()) or loss(batch))
    step.forward_backward(documents(), 1)
    step.forward_only(documents())
    assert seen == [{"": "grouped_mm"}] * 2


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral", "olmoe", "granitemoe", "phimoe"])
def test_the_router_s_auxiliary_loss(model_type: str) -> None:
    """Its gradient and value, as the model's own forward pass has them over all tokens, not only up to the last
    supervised one; without the model's own graph, so that a mean over two passes is that over two rows."""
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SIZES | FAMILIES.get(model_type, experts) | {"router_aux_loss_coef": 0.5})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    examples = documents((31, 40))
    loss, router = wanted_loss(model, examples), 0.0
    for example in examples:
        own = model(torch.tensor(example.ids_L).long()[None], output_router_logits=True).aux_loss
        (0.5 * own / 2).backward()
        router += own.item() / 2
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    step = CapturedStep(model, tokens=40, router_loss=0.5)
    for _ in range(2):
        step.forward_backward(examples, loss_weight(examples))
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=1e-5)
    assert step.router is not None
    assert float(step.router.total) == pytest.approx(router, rel=1e-5)
    got = dict(model.named_parameters())
    error = torch.stack([(got[name].grad - gradient).norm() for name, gradient in wanted.items()]).norm()
    assert float(error / torch.stack([gradient.norm() for gradient in wanted.values()]).norm()) < 1e-5
    assert float(step.forward_only(examples)[0]) == pytest.approx(loss, rel=1e-5)


def test_padding_reaches_no_expert_in_the_auxiliary_loss() -> None:
    logits = torch.randn(3, 20, 8)
    wanted = load_balancing_loss_func(tuple(logits), 8, 2, (torch.arange(20) < 13)[None])
    got = router_loss(list(logits), 2, torch.tensor(13, dtype=torch.int32))
    assert float(got) == pytest.approx(float(wanted), rel=1e-6)
    assert float(wanted) != pytest.approx(float(load_balancing_loss_func(tuple(logits), 8, 2)), rel=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router_loss(list(logits), 2, torch.tensor(13, dtype=torch.int32)), got)


def test_the_auxiliary_loss_is_computed_under_the_model_s_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's autocast takes a softmax in fp32, which 16-bit logits have not outside of it."""
    step = CapturedStep(build("qwen3_moe"), tokens=1000, autocast=torch.bfloat16, router_loss=0.5)
    assert step.router is not None
    under, of = [], step.router.of
    monkeypatch.setattr(
        step.router, "of", lambda *args, **kwargs: under.append(torch.is_autocast_enabled("cpu")) or of(*args, **kwargs)
    )
    step.forward_backward(documents(), 1)
    assert under == [True]


def test_another_auxiliary_loss_than_switch_transformer_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_qwen3_moe, "load_balancing_loss_func", lambda *args: torch.tensor(0.1))
    step = CapturedStep(build("qwen3_moe"), tokens=1000, router_loss=0.5)
    with pytest.raises(Unsupported, match=r"a router's auxiliary loss of 0\.1000 where Switch Transformer's is 2\."):
        step.forward_backward(documents(), 1)


def test_heads_of_one_width_are_not_copied_before_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    attend = packed_attention.PackedAttention.apply
    monkeypatch.setattr(packed_attention.PackedAttention, "apply", lambda *args: seen.append(args) or attend(*args))
    batch = StagingBuffer(torch.device("cpu"), 8).upload(pack(documents((8,))), 1.0, (8,))
    query, key, value = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    packed_attention.packed_attention(torch.nn.Module(), query, key, value, None, packed_batch=batch)
    packed_attention.packed_attention(torch.nn.Module(), query, key, value[..., :8], None, packed_batch=batch)
    assert [x.data_ptr() for x in seen[0][:3]] == [x.data_ptr() for x in (query, key, value)]
    assert seen[1][2].shape == value[0].shape
    assert not seen[1][2][..., 8:].any()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_experts(model_type: str) -> None:
    model = get_peft_model(
        build(model_type),
        LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    check(model, documents())


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"lora_bias": True},
    ],
)
@pytest.mark.parametrize("tokens", [1000, 60])
def test_options_of_peft(lora: dict[str, Any], tokens: int) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("starcoder2"), LoraConfig(target_modules="all-linear", r=4, **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    check(model, documents(), tokens=tokens)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 100]},
        {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.1},
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    ],
)
def test_options_of_peft_on_a_family_of_the_fused_step(lora: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=4, **lora)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data.normal_(0, 0.1)
    check(model, documents())


def test_several_adapters_at_once() -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "up_proj"], use_rslora=True))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 16
    check(model, documents())


def test_an_8_bit_base() -> None:
    """Its products round each token by itself, so that a packed row has the values of its documents."""
    base = build("llama")
    for path in [name for name, _ in base.named_modules() if name.endswith("_proj")]:
        linear = base.get_submodule(path)
        packed = Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=6.0)
        packed.load_state_dict(linear.state_dict())
        base.set_submodule(path, packed.to("cpu"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    check(model, documents())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("tokens", [1000, 40])
def test_loss_weights(smoothing: float, tokens: int) -> None:
    examples = documents()
    for index in (1, 3):  # the others have none
        weight_L = np.linspace(0.1, 1, len(examples[index].ids_L), dtype=np.float32)
        examples[index] = replace(examples[index], weight_L=weight_L)
    model = build("llama")
    step = check(model, examples, smoothing=smoothing, tokens=tokens)
    weighted_3 = step.forward_only(examples)
    assert float(weighted_3[0]) == pytest.approx(wanted_loss(model, examples, smoothing), rel=1e-5)


@pytest.mark.parametrize("tokens", [1000, 60])
def test_a_weight_that_the_loss_does_not_depend_on_has_no_gradient(tokens: int) -> None:
    model = build("llama")
    model.unused = torch.nn.Parameter(torch.ones(3))
    step = CapturedStep(model, tokens=tokens)
    for gradient in step.gradients:
        gradient.fill_(7)
    step.forward_backward(documents(), 1)
    assert not model.unused.grad.any()
    assert all(p.grad is gradient for p, gradient in zip(step.trained, step.gradients, strict=True))
    assert not any((gradient == 7).all() for gradient in step.gradients)


def test_dynamic_fine_tuning() -> None:
    """The loss that TRL names dft: a token's loss times its probability, which is a constant of the gradient."""
    model, examples = build("llama"), documents()
    count, total = sum(example.supervised_tokens for example in examples), 0.0
    for example in examples:
        logits_LV = model(torch.tensor(example.ids_L).long()[None]).logits[0, :-1]
        target_L = torch.tensor(example.label_L[1:]).long()
        loss_L = functional.cross_entropy(logits_LV, target_L, ignore_index=IGNORE_INDEX, reduction="none")
        loss = (loss_L * torch.exp(-loss_L.detach())).sum()
        (loss / count).backward()
        total += loss.item()
    wanted = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    step = CapturedStep(model, tokens=60, dft=True)
    step.forward_backward(examples, count)
    assert float(step.metrics_3[0]) == pytest.approx(total, rel=1e-5)
    got = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("tokens", [1000, 40])
def test_noise_of_embeddings_is_that_of_each_document_alone(tokens: int) -> None:
    """NEFTune: uniform up to alpha / sqrt(L D), with L of the whole document, also behind its last supervised token."""
    model, lengths = build("llama").train(), (30, 5, 150)
    activate_neftune(model, 5.0)
    ids = [torch.randint(3, 101, (length,)) for length in lengths]
    examples = [Document.from_lists(i, torch.where(torch.arange(len(i)) < 3, i, IGNORE_INDEX)) for i in ids]
    embedded: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: embedded.append(args[0][0].detach()))
    CapturedStep(model, tokens=tokens, noise=True).forward_backward(examples, 6)
    noise = torch.cat(embedded) - model.model.embed_tokens.weight.detach()[torch.cat(ids)]
    for length, noise_LD in zip(lengths, noise.split(lengths), strict=True):
        largest = 5.0 / (length * 64) ** 0.5
        assert float(noise_LD.abs().max()) == pytest.approx(largest, rel=0.02)
        assert float(noise_LD.std()) == pytest.approx(largest / 3**0.5, rel=0.1)


def test_label_smoothing() -> None:
    check(build("llama"), documents(), smoothing=0.1)


def test_figures_are_loss_hits_and_entropy_and_evaluation_leaves_gradients() -> None:
    model, examples = build("llama"), documents((40, 9))
    step = check(model, examples)
    training_3, gradient = step.metrics_3.clone(), model.lm_head.weight.grad.clone()
    torch.testing.assert_close(step.forward_only(examples), training_3)
    assert torch.equal(model.lm_head.weight.grad, gradient)
    assert model.config._attn_implementation == "eager"


def test_dropout_is_that_of_the_model() -> None:
    """Each pass samples anew, and equal seeds give equal gradients."""
    model = get_peft_model(build("starcoder2"), LoraConfig(target_modules="all-linear", lora_dropout=0.5)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    step, losses = CapturedStep(model, tokens=100), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        step.forward_backward(documents((40,)), 1)
        losses.append(float(step.metrics_3[0]))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("starcoder2", {"attention_dropout": 0.1}, "attention dropout of 0.1"),
        ("falcon_h1", {}, "documents of a packed row see each other"),
        (
            "llama4_text",
            {"num_local_experts": 2, "attention_chunk_size": 8},
            "documents of a packed row see each other",
        ),
    ],
)
def test_models_it_would_compute_differently_are_refused(model_type: str, config: dict[str, Any], reason: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES | config)).train()
    try:
        why = why_not_packed(model, 256, packed_logits)
        if why is None:
            CapturedStep(model, tokens=100).forward_backward(documents((40,)), 1)
    except Unsupported as error:
        why = str(error)
    assert why is not None
    assert reason in why


def test_a_pass_takes_a_captured_size_that_is_not_much_larger() -> None:
    size = GraphSize(1280, 256)
    assert size.holds(GraphSize(1280, 256))
    assert size.holds(GraphSize(1024, 1))
    assert not size.holds(GraphSize(1000, 1))
    assert not size.holds(GraphSize(1281, 1))
    assert not size.holds(GraphSize(1200, 257))
    assert not size.holds(GraphSize(1280, 256, alone=True))  # it adds to the gradient, where the other replaces it


def test_a_captured_size_has_rows_for_the_largest_share_of_supervised_tokens() -> None:
    step = CapturedStep(build("llama"), tokens=2048)
    assert step.captured_size(GraphSize(1000, 100)) == GraphSize(1152, 256)
    step.row_share = 0.5
    assert step.captured_size(GraphSize(1000, 100, alone=True)) == GraphSize(1152, 640, alone=True)
