"""DoRA and LoRA dropout on the fused step against transformers, PEFT and autograd, in float32.

For dropout both paths are given the same masks: those of the reference operations, by packed row.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from parley.data.packing import Document
from parley.train_step import reference_ops
from parley.train_step.bind import Unsupported, bind, read_weights
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import SAVED_POLICIES, MemoryPlan

TOLERANCE = 1e-5
SEED = 12345
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2"]


def worst(model: Any, wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error among the gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == wanted.keys()
    errors = [(p.grad - wanted[name]).norm() / (wanted[name].norm() + 1e-12) for name, p in trained.items()]
    return float(torch.stack(errors).max())


def check(step: FusedStep, model: Any, documents: list[Document], loss: float, wanted: dict[str, torch.Tensor]) -> None:
    for _ in range(2):  # a second step starts from nothing
        step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
    step.bound.flat.expose_gradients()
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=TOLERANCE)
    assert worst(model, wanted) < TOLERANCE


def plans() -> list[MemoryPlan]:
    return [
        *(MemoryPlan(saved=saved, cache_matrices=cache) for saved in SAVED_POLICIES for cache in (True, False)),
        MemoryPlan(saved="attention", mlp_rows=16, logits_rows=7),
    ]


# ---- DoRA ----


def dora(build_adapted: Any, name: str, targets: Any = None, **options: Any) -> Any:
    """Magnitudes off their start, which is the norm of the untrained weight."""
    if targets is None and name == "phi3":
        targets = "all-linear"
    model = build_adapted(name, targets, use_dora=True, **options)
    for parameter_name, parameter in model.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize(
    ("name", "targets"),
    [*((name, None) for name in FAMILIES), ("llama", ["q_proj", "v_proj", "down_proj"]), ("qwen2", ["k_proj"])],
)
def test_dora(build_adapted: Any, make_examples: Any, plain_gradient: Any, name: str, targets: Any) -> None:
    model, documents = dora(build_adapted, name, targets), make_examples()
    loss, wanted = plain_gradient(model, documents)
    assert any("magnitude" in name for name in wanted)
    check(FusedStep(bind(model), MemoryPlan()), model, documents, loss, wanted)


PATTERNS = {
    "use_rslora": True, "rank_pattern": {"q_proj": 3, "down_proj": 7, "v_proj": 6}, "alpha_pattern": {"k_proj": 13}
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_dora_with_rslora_and_patterns_of_ranks_and_scales(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, name: str
) -> None:
    model, documents = dora(build_adapted, name, **PATTERNS), make_examples()
    loss, wanted = plain_gradient(model, documents)
    assert len({p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}) == 4
    check(FusedStep(bind(model), MemoryPlan()), model, documents, loss, wanted)


@pytest.mark.parametrize("plan", plans())
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_plan_changes_no_gradient_of_dora(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, name: str, plan: MemoryPlan
) -> None:
    model, documents = dora(build_adapted, name, layers=4), make_examples((3, 17, 5, 29, 1))
    check(FusedStep(bind(model), plan), model, documents, *plain_gradient(model, documents))


@pytest.mark.parametrize("cache_matrices", [True, False])
def test_dora_on_an_nf4_base_follows_the_weights(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, cache_matrices: bool
) -> None:
    model, documents = dora(build_adapted, "llama", nf4="double"), make_examples()
    step = FusedStep(bind(model), MemoryPlan(cache_matrices=cache_matrices))
    optimizer = torch.optim.SGD([step.bound.flat.weight_Z], lr=0.5)
    for _ in range(2):
        loss, wanted = plain_gradient(model, documents)
        check(step, model, documents, loss, wanted)
        model.zero_grad()
        optimizer.step()


def test_the_decoder_does_not_read_dora(build_adapted: Any) -> None:
    with pytest.raises(Unsupported, match="DoRA"):
        read_weights(dora(build_adapted, "llama"))


# ---- Dropout ----


class GivenMask(nn.Module):
    """In place of a projection's dropout: the rows of a document in the reference operations' mask."""

    def __init__(self, stream: int, p: float, starts: list[int], tokens: int) -> None:
        super().__init__()
        self.stream, self.p, self.starts, self.tokens, self.calls = stream, p, starts, tokens, 0

    def forward(self, x_1LK: torch.Tensor) -> torch.Tensor:
        factor_TK = torch.empty(self.tokens, x_1LK.shape[2])
        reference_ops.dropout(torch.ones_like(factor_TK), factor_TK, torch.tensor(SEED), self.stream, self.p)
        start = self.starts[self.calls % len(self.starts)]
        self.calls += 1
        return x_1LK * factor_TK[start : start + x_1LK.shape[1]]


def give_masks(model: Any, step: FusedStep, documents: list[Document]) -> None:
    """Let `model` drop what `step` does, for the documents one after the other."""
    lengths = [len(document.ids_L) for document in documents]
    starts = [0, *itertools.accumulate(lengths)][:-1]
    by_a = {p.data_ptr(): m for m in model.modules() if hasattr(m, "lora_A") for p in m.lora_A.parameters()}
    for linear in step.bound.linears:
        for i, item in enumerate(linear.adapter_slices):
            module = by_a[item.adapter.a_RK.data_ptr()]
            mask = GivenMask(linear.stream + i, item.adapter.dropout, starts, sum(lengths))
            module.lora_dropout["default"] = mask


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda *given: torch.tensor(SEED))


def whole_documents(make_examples: Any, lengths: tuple[int, ...]) -> list[Document]:
    """Whose last token is supervised, so that a packed row has all rows but their last."""
    documents = make_examples(lengths)
    for document in documents:
        document.label_L[-1] = document.ids_L[-1]
    return documents


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("name", "plan"),
    [*((name, MemoryPlan()) for name in FAMILIES), *(("llama", plan) for plan in plans())],
)
def test_dropout(
    build_adapted: Any, make_examples: Any, plain_gradient: Any, monkeypatch: pytest.MonkeyPatch, name: str,
    plan: MemoryPlan,
) -> None:  # fmt: skip
    targets = "all-linear" if name == "phi3" else None
    model = build_adapted(name, targets, lora_dropout=0.4).train()
    # One document: its rows are those of the mask, and its trimmed last row has no loss.
    documents = whole_documents(make_examples, (33,))
    step = FusedStep(bind(model), plan)
    step.skip_unsupervised = False  # masks go by row, and the last layer would have fewer
    give_masks(model, step, documents)
    check(step, model, documents, *plain_gradient(model, documents))


@pytest.mark.usefixtures("seed")
def test_dropout_with_rslora_and_patterns(build_adapted: Any, make_examples: Any, plain_gradient: Any) -> None:
    model = build_adapted("llama", lora_dropout=0.4, **PATTERNS).train()
    documents = whole_documents(make_examples, (33,))
    step = FusedStep(bind(model), MemoryPlan())
    step.skip_unsupervised = False
    give_masks(model, step, documents)
    check(step, model, documents, *plain_gradient(model, documents))


@pytest.mark.usefixtures("seed")
def test_dropout_where_supervised_rows_alone_go_on(build_adapted: Any, make_examples: Any) -> None:
    """The gradient is that of the masks of the forward pass: a finite difference of the loss in each direction."""
    model = build_adapted("llama", lora_dropout=0.4)
    documents = make_examples((1, 17, 5, 29))
    step = FusedStep(bind(model), MemoryPlan())
    assert step.skip_unsupervised
    flat, losses = step.bound.flat, []
    step.forward_backward(documents, 1)
    gradient_Z = flat.grad_Z.clone()
    direction_Z = gradient_Z / gradient_Z.norm()
    for sign in (1, -1):
        with torch.no_grad():
            flat.weight_Z.add_(direction_Z, alpha=sign * 1e-2)
        step.forward_backward(documents, 1)
        losses.append(float(step.metrics_3[0]))
        with torch.no_grad():
            flat.weight_Z.sub_(direction_Z, alpha=sign * 1e-2)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(gradient_Z.norm()), rel=2e-3)


def test_masks_are_sampled_anew_at_every_pass_and_repeat_with_the_seed(build_adapted: Any, make_examples: Any) -> None:
    step, documents = FusedStep(bind(build_adapted("llama", lora_dropout=0.4)), MemoryPlan()), make_examples()
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        step.forward_backward(documents, 1)
        losses.append(float(step.metrics_3[0]))
        step.forward_backward(documents, 1)
        losses.append(float(step.metrics_3[0]))
    assert losses[:2] == losses[4:]
    assert len(set(losses)) == 4


def test_evaluation_has_no_dropout_and_samples_nothing(build_adapted: Any, make_examples: Any) -> None:
    documents = make_examples()
    plain = FusedStep(bind(build_adapted("llama")), MemoryPlan()).forward_only(documents)
    step, state = FusedStep(bind(build_adapted("llama", lora_dropout=0.4)), MemoryPlan()), torch.get_rng_state()
    torch.testing.assert_close(step.forward_only(documents), plain)
    assert torch.equal(torch.get_rng_state(), state)
    FusedStep(bind(build_adapted("llama")), MemoryPlan()).forward_backward(documents, 1)


def test_the_mean_over_masks_is_the_pass_without_dropout() -> None:
    x_TK, total_TK = torch.ones(40, 50), torch.zeros(40, 50)
    for seed in range(400):
        reference_ops.dropout(x_TK, total_TK, torch.tensor(seed), 7, 0.25, add=True)
    assert float((total_TK / 400).mean()) == pytest.approx(1, abs=0.005)
    assert float((total_TK / 400 - 1).abs().max()) < 0.15  # no element is dropped more often than others
