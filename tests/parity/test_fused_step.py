"""The fast step against transformers, PEFT and autograd, in float32."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import parley.train_step.fused_step as step_module
from parley.data.packing import loss_weight
from parley.train_step.bind import Unsupported, bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.lm_head import loss_and_gradient
from parley.train_step.memory_plan import SAVED_POLICIES, MemoryPlan
from parley.train_step.reference_attention import MAX_FULL_SCORES

TOLERANCE = 1e-5


def worst(model: Any, wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error among the adapters' gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == wanted.keys()
    errors = [(p.grad - wanted[name]).norm() / (wanted[name].norm() + 1e-12) for name, p in trained.items()]
    return float(torch.stack(errors).max())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *itertools.product(["llama", "mistral", "qwen2", "qwen3"], [None, ["q_proj", "v_proj", "down_proj"]]),
        ("llama", ["gate_proj"]),
        *itertools.product(["gemma2", "gemma3_text", "granite", "smollm3", "olmo2"], [None, ["v_proj", "up_proj"]]),
        *itertools.product(["phi3", "phi3_longrope"], ["all-linear", ["qkv_proj"]]),
    ],
)
def test_every_family_and_choice_of_projections(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, name: str, targets: list[str] | str | None
) -> None:
    model, documents = build_adapted(name, targets), make_examples()
    loss, wanted = plain_gradient(model, documents)
    step = FusedStep(bind(model), MemoryPlan())
    step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
    step.bound.flat.expose_gradients()
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=TOLERANCE)
    assert worst(model, wanted) < TOLERANCE


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(tokens=20), MemoryPlan(logits_rows=4)])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_loss_weights(build_adapted: Any, make_examples: Any, plain_gradient: Any, name: str, plan: MemoryPlan) -> None:
    model, documents = build_adapted(name), make_examples()
    for index in (1, 3):  # the others have none
        weight_L = np.linspace(0.1, 1, len(documents[index].ids_L), dtype=np.float32)
        documents[index] = replace(documents[index], weight_L=weight_L)
    loss, wanted = plain_gradient(model, documents)
    step = FusedStep(bind(model), plan)
    step.forward_backward(documents, loss_weight(documents))
    step.bound.flat.expose_gradients()
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=TOLERANCE)
    assert worst(model, wanted) < TOLERANCE
    grad_Z = step.bound.flat.grad_Z.clone()
    assert float(step.forward_only(documents)[0]) == pytest.approx(loss, rel=TOLERANCE)
    assert torch.equal(step.bound.flat.grad_Z, grad_Z)


@pytest.mark.parametrize("nf4", ["single", "double"])
@pytest.mark.parametrize("cache_matrices", [True, False])
def test_an_nf4_base_has_the_loss_and_gradients_of_bitsandbytes(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, nf4: str, cache_matrices: bool
) -> None:
    model, documents = build_adapted("llama", nf4=nf4), make_examples()
    loss, wanted = plain_gradient(model, documents)
    step = FusedStep(bind(model), MemoryPlan(cache_matrices=cache_matrices))
    step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
    step.bound.flat.expose_gradients()
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=TOLERANCE)
    assert worst(model, wanted) < TOLERANCE


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_frozen_adapter_weights_keep_their_values(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, optimizer: Any
) -> None:
    """All A and the first layer frozen, as on the plain path: the same gradients elsewhere, and no weight decay."""
    model, documents = build_adapted("llama", layers=3), make_examples()
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "layers.0." in name:
            parameter.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, wanted = plain_gradient(model, documents)
    step = FusedStep(bind(model), MemoryPlan())
    step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
    step.bound.flat.expose_gradients()
    assert worst(model, wanted) < TOLERANCE
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert float(step.bound.flat.grad_Z.norm()) == pytest.approx(float(norm), rel=TOLERANCE)
    optimizer([step.bound.flat.weight_Z], lr=0.1, weight_decay=0.1).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == wanted.keys() == {name for name in before if "lora_B" in name and "layers.0." not in name}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_long_documents_take_another_attention(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, name: str
) -> None:
    model, documents = build_adapted(name), make_examples((3, MAX_FULL_SCORES + 22, 40))
    loss, wanted = plain_gradient(model, documents)
    step = FusedStep(bind(model), MemoryPlan())
    step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
    step.bound.flat.expose_gradients()
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=TOLERANCE)
    assert worst(model, wanted) < TOLERANCE


@pytest.mark.parametrize("saved", SAVED_POLICIES)
@pytest.mark.parametrize("cache_matrices", [True, False])
@pytest.mark.parametrize(("tokens", "mlp_rows"), [(30, 0), (1000, 0), (1000, 16)])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_plan_changes_no_gradient(
    build_adapted: Any,
    make_examples: Any,
    plain_gradient: Any,
    saved: str,
    cache_matrices: bool,
    tokens: int,
    mlp_rows: int,
    name: str,
) -> None:
    if mlp_rows and saved in ("all", "linear"):
        pytest.skip("whole products are kept whole")
    model, documents = build_adapted(name, layers=5), make_examples((3, 17, 5, 29, 1))
    _, wanted = plain_gradient(model, documents)
    plan = MemoryPlan(
        saved=saved, cache_matrices=cache_matrices, tokens=tokens, mlp_rows=mlp_rows, logits_rows=7, pad_multiple=8
    )
    step = FusedStep(bind(model), plan)
    for _ in range(2):  # a second step starts from nothing
        step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
    step.bound.flat.expose_gradients()
    assert worst(model, wanted) < TOLERANCE


def test_figures_are_loss_hits_and_entropy(build_adapted: Any, make_examples: Any) -> None:
    model, documents = build_adapted("llama"), make_examples((40,))
    with torch.no_grad():
        logits_LV = model(torch.tensor(documents[0].ids_L).long()[None]).logits[0, :-1]
    target_L = torch.tensor(documents[0].label_L[1:]).long()
    real_L = target_L != -100
    p_LV = logits_LV.softmax(-1)
    step = FusedStep(bind(model), MemoryPlan())
    step.forward_backward(documents, 1)
    _, hits, entropy = step.metrics_3.tolist()
    assert hits == int(((logits_LV.argmax(-1) == target_L) & real_L).sum())
    assert entropy == pytest.approx(float(-(p_LV * p_LV.log()).sum(-1)[real_L].sum()), rel=1e-4)


def test_training_moves_peft_s_own_parameters(build_adapted: Any, make_examples: Any, plain_gradient: Any) -> None:
    model, documents = build_adapted("llama"), make_examples()
    bound = bind(model)
    step, count = FusedStep(bound, MemoryPlan()), sum(document.supervised_tokens for document in documents)
    optimizer = torch.optim.SGD([bound.flat.weight_Z], lr=0.1)
    step.forward_backward(documents, count)
    first = float(step.metrics_3[0])
    optimizer.step()
    loss_sum, _ = plain_gradient(model, documents)
    step.forward_backward(documents, count)
    assert float(step.metrics_3[0]) == pytest.approx(loss_sum, rel=TOLERANCE)
    assert loss_sum < first


def test_a_step_without_supervised_tokens_has_no_gradient(build_adapted: Any, make_examples: Any) -> None:
    step = FusedStep(bind(build_adapted("llama")), MemoryPlan())
    step.bound.flat.grad_Z.fill_(1.0)
    step.forward_backward(make_examples((1,)), 1)
    assert not step.bound.flat.grad_Z.any()


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_dropout": 0.1, "use_dora": True}, "DoRA with LoRA dropout"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"lora_bias": True}, "bias"),
    ],
)
def test_options_it_does_not_know_are_refused_by_name(build_adapted: Any, lora: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=f"(?i){reason}"):
        bind(build_adapted("llama", **lora))


def test_a_model_without_adapters_is_refused(build_adapted: Any) -> None:
    with pytest.raises(Unsupported, match="no PEFT adapters"):
        bind(build_adapted("llama").get_base_model())


@pytest.mark.parametrize("lengths", [(1, 17, 5, 29), (3, MAX_FULL_SCORES + 22, 40)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_all_rows_may_go_on_from_the_last_attention_or_the_supervised_ones_alone(
    build_adapted: Any, make_examples: Any, monkeypatch: pytest.MonkeyPatch, name: str, lengths: tuple[int, ...]
) -> None:
    documents = [replace(e, label_L=np.where(e.ids_L % 3, -100, e.label_L)) for e in make_examples(lengths)]
    documents[1].label_L[-1] = documents[1].ids_L[-1]  # so that few rows are supervised, and many needed
    gone_on: list[int] = []

    def recorded(*given: Any, **named: Any) -> None:
        gone_on.append(len(given[4]))
        loss_and_gradient(*given, **named)

    monkeypatch.setattr(step_module, "loss_and_gradient", recorded)
    gradients = []
    for narrow in (False, True):
        step = FusedStep(bind(build_adapted(name)), MemoryPlan())
        step.skip_unsupervised = step.skip_unsupervised and narrow
        step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
        gradients.append((float(step.metrics_3[0]), step.bound.flat.grad_Z))
    assert gone_on[1] < gone_on[0]
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=1e-6)
    torch.testing.assert_close(gradients[1][1], gradients[0][1], rtol=1e-4, atol=1e-7)
