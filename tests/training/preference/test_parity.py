"""Losses, log-probabilities and gradients of preference steps equal TRL's, on the fused step and on the plain path."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset

import parley
from parley.training.preference.documents import PreferenceDocument, slots_of
from parley.training.preference.losses import DPO, DPO_LOSSES, ORPO, SimPO
from parley.training.preference.preference_trainer import PreferenceTrainer, preference_documents

from .conftest import PAIRS, TOOLS, demo_adapter, gradients, shake

Engine = Literal["auto", "plain"]
BOUND = {"rtol": 1e-5, "atol": 1e-5}


def micro_batches(trainer: Any) -> list[dict[str, Any]]:
    """Rows 0, 1 and rows 2, 3."""
    rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    size = trainer.args.per_device_train_batch_size
    return [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]


def trl_step(trainer: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Mean loss of the micro-batches, its gradients, and the mean of each logged figure."""
    trainer.model.train()
    trainer.model.zero_grad()
    batches = micro_batches(trainer)
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    figures = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return float(torch.stack(losses).mean()), gradients(trainer.model), figures


def parley_step(trainer: PreferenceTrainer) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    trainer.bind_fused_step()
    trainer.model.zero_grad()
    batches = micro_batches(trainer)
    for index, batch in enumerate(batches):
        trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
        loss = trainer.training_step(trainer.model, batch)
    figures = {name: float(sum(values) / len(values)) for name, values in trainer._metrics["train"].items()}
    return float(loss), gradients(trainer.model), figures


def compare(ours: PreferenceTrainer, theirs: Any, *, fused: bool) -> None:
    """One step of both, away from the reference."""
    shake(ours.model)
    shake(theirs.model)
    loss, gradient, figures = parley_step(ours)
    assert (ours.fused_step is not None) is fused, ours.plain_because
    expected_loss, expected, expected_figures = trl_step(theirs)
    torch.testing.assert_close(loss, expected_loss, **BOUND)
    assert gradient.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, **BOUND, msg=lambda text, name=name: f"{name}: {text}")
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "num_tokens",
    ):
        if name in figures:
            torch.testing.assert_close(figures[name], float(expected_figures[name]), rtol=1e-5, atol=1e-4)


MIXED = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge"]},
        MIXED,
        {"ld_alpha": 0.3},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=["sigmoid", "ipo", "hinge", "mixed", "ld_alpha", "js"],
)
def test_dpo_step_equals_trls(loss: dict[str, Any], engine: Engine, pairs: Dataset, options: dict[str, Any]) -> None:
    model, tokenizer = demo_adapter()
    other, _ = demo_adapter()
    ours = parley.DPOTrainer(
        model, args=parley.DPOConfig(**loss, **options), train_dataset=pairs, processing_class=tokenizer, engine=engine
    )
    theirs = trl.DPOTrainer(
        other, args=trl.DPOConfig(**loss, **options), train_dataset=pairs, processing_class=tokenizer
    )
    compare(ours, theirs, fused=engine == "auto")


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_kto_step_equals_trls(engine: Engine, labelled: Dataset, options: dict[str, Any]) -> None:
    model, tokenizer = demo_adapter()
    other, _ = demo_adapter()
    settings = options | {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    ours = parley.KTOTrainer(
        model, args=parley.KTOConfig(**settings), train_dataset=labelled, processing_class=tokenizer, engine=engine
    )
    theirs = trl.KTOTrainer(other, args=trl.KTOConfig(**settings), train_dataset=labelled, processing_class=tokenizer)
    compare(ours, theirs, fused=engine == "auto")


def experimental(method: str, beta: float) -> Any:
    """TRL's ORPOTrainer or CPOTrainer with what its loss reads, and no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    trainer = object.__new__(ORPOTrainer if method == "orpo" else CPOTrainer)
    vars(trainer).update(
        beta=beta, is_encoder_decoder=False, aux_loss_enabled=False, padding_value=0, pad_token_id=0,
        label_smoothing=0.1,
        loss_type="simpo", simpo_gamma=0.7, cpo_alpha=0.3, alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
    )  # fmt: skip
    return trainer


def padded_pairs(documents: list[Any]) -> dict[str, torch.Tensor]:
    """The collated batch of TRL's experimental trainers; labels are of the answers alone."""
    batch = {}
    for side, rows in (("chosen", documents[0::2]), ("rejected", documents[1::2])):
        labels = [
            np.where(row.prompt_L, -100, row.label_L) if row.prompt_L is not None else row.label_L for row in rows
        ]
        for name, values, padding in (
            ("input_ids", [row.ids_L for row in rows], 0),
            ("labels", labels, -100),
            ("attention_mask", [np.ones_like(row.ids_L) for row in rows], 0),
        ):
            batch[f"{side}_{name}"] = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(value).long() for value in values], batch_first=True, padding_value=padding
            )
    return batch


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("objective", [ORPO(0.3), SimPO(2.0, 0.7, 0.3, 0.1)])
def test_losses_without_a_reference_equal_trls(
    objective: ORPO | SimPO, engine: Engine, pairs: Dataset, options: dict[str, Any]
) -> None:
    model, tokenizer = demo_adapter()
    other, _ = demo_adapter()
    ours = parley.DPOTrainer(
        model, args=parley.DPOConfig(**options), train_dataset=pairs, processing_class=tokenizer, engine=engine,
        objective=objective,
    )  # fmt: skip
    shake(ours.model)
    shake(other)
    loss, gradient, figures = parley_step(ours)
    theirs = experimental("orpo" if isinstance(objective, ORPO) else "simpo", objective.beta)
    losses, logged = [], []
    for batch in micro_batches(ours):
        value, metrics = theirs.get_batch_loss_metrics(other, padded_pairs(batch["documents"]))
        (value / 2).backward()
        losses.append(value.detach())
        logged.append(metrics)
    torch.testing.assert_close(loss, float(torch.stack(losses).mean()), **BOUND)
    expected = gradients(other)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, **BOUND)
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        torch.testing.assert_close(figures[name], sum(float(metrics[name]) for metrics in logged) / 2, **BOUND)


DIVERGENCES = {"forward_kl": 0.5, "js_divergence": 0.5, "alpha_divergence": 0.3}
LOSSES_AND_DIVERGENCES = [(loss, "reverse_kl", 0.5) for loss in sorted(DPO_LOSSES)] + [
    (loss, divergence, alpha)
    for loss in ("sigmoid", "ipo")
    for divergence, alpha in [*DIVERGENCES.items(), ("alpha_divergence", 1.0)]
]


@pytest.mark.parametrize(("loss", "divergence", "alpha"), LOSSES_AND_DIVERGENCES)
def test_every_dpo_loss_and_its_derivative_equal_trls(loss: str, divergence: str, alpha: float) -> None:
    """TRL's own compute_loss on made-up log-probabilities of answers of 3, 5, 4 and 2 tokens."""
    lengths = [3, 5, 4, 2]
    generator = torch.Generator().manual_seed(0)
    per_token = -2 * torch.rand(4, 6, generator=generator)
    for row, length in enumerate(lengths):
        per_token[row, length:] = 0
    per_token.requires_grad_()
    reference = -4 * torch.rand(4, generator=generator)
    mask = torch.tensor([[0] + [1] * length + [0] * (6 - length) for length in lengths])
    theirs = object.__new__(trl.DPOTrainer)
    args = trl.DPOConfig("out", loss_type=[loss], label_smoothing=0.1, use_cpu=True, bf16=False)
    nothing = torch.zeros(4, 6)
    outputs = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    vars(theirs).update(
        args=args, model=SimpleNamespace(training=True), beta=0.4, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type=divergence, f_alpha_divergence_coef=alpha,
        loss_types=[loss], loss_weights=[0.5], label_smoothing=0.1, use_weighting=False,
        aux_loss_enabled=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
    )  # fmt: skip
    inputs = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": reference[:2], "ref_rejected_logps": reference[2:],
    }  # fmt: skip
    expected = trl.DPOTrainer._compute_loss(theirs, lambda **kwargs: outputs, inputs, False)
    (expected_gradient,) = torch.autograd.grad(expected, per_token)

    def document(length: int) -> PreferenceDocument:
        ids = np.ones(length + 1, dtype=np.int32)
        return PreferenceDocument(ids, np.where(np.arange(length + 1) > 0, ids, -100))

    order = [0, 2, 1, 3]  # TRL has chosen answers first, Parley the two of a pair
    answer = per_token.detach().sum(1)[order].requires_grad_()
    objective = DPO([loss], [0.5], 0.4, 0.1, divergence=divergence, alpha=alpha)
    ours, _ = objective([document(lengths[row]) for row in order], answer, torch.zeros(4), reference[order])
    (gradient,) = torch.autograd.grad(ours, answer)
    torch.testing.assert_close(ours.detach(), expected.detach(), **BOUND)
    torch.testing.assert_close(gradient, expected_gradient[order, 0], **BOUND)


def test_log_probabilities_are_of_the_answers_alone(pairs: Dataset, options: dict[str, Any]) -> None:
    """Prompts do not count, documents of a row do not see each other, and tools are part of the prompt."""
    with_tools = Dataset.from_list([row | {"tools": TOOLS} for row in PAIRS])
    model, tokenizer = demo_adapter()
    shake(model)
    for rows in (pairs, with_tools):
        trainer = parley.DPOTrainer(
            model, args=parley.DPOConfig(**options), train_dataset=rows, processing_class=tokenizer
        )
        trainer.bind_fused_step()
        assert trainer.fused_step is not None
        documents = preference_documents(micro_batches(trainer)[0]["documents"])
        sums = trainer.policy_sums(documents, slots_of(documents))
        for index, document in enumerate(documents):
            ids_1L = torch.tensor(document.ids_L).long()[None]
            with torch.no_grad():
                logp_LV = torch.log_softmax(model(ids_1L).logits[0, :-1].float(), -1)
            answer = [place for place in range(1, len(document.ids_L)) if document.label_L[place] != -100]
            expected = sum(float(logp_LV[place - 1, document.ids_L[place]]) for place in answer)
            assert float(sums[index]) == pytest.approx(expected, abs=2e-4, rel=1e-5)


@pytest.mark.parametrize("disabled", [True, False])
def test_dropout_takes_the_plain_path(disabled: bool, pairs: Dataset, options: dict[str, Any]) -> None:
    """The fused step's sums would be of other masks than their gradient, where they take a pass of their own.

    TRL switches dropout off unless asked not to.
    """
    options = options | {"disable_dropout": disabled}
    model, tokenizer = demo_adapter(dropout=0.1)
    trainer = parley.DPOTrainer(
        model, args=parley.DPOConfig(**options), train_dataset=pairs, processing_class=tokenizer
    )
    trainer.bind_fused_step()
    assert (trainer.fused_step is not None) == disabled
    assert disabled or trainer.plain_because == "LoRA dropout"


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_step_in_several_passes_is_the_same(engine: Engine, pairs: Dataset, options: dict[str, Any]) -> None:
    """KTO's, ORPO's and DPO's losses need all sums of a micro-batch: they are computed before the passes."""
    results = []
    for split in (False, True):
        model, tokenizer = demo_adapter()
        trainer = parley.DPOTrainer(
            model, args=parley.DPOConfig(**options), train_dataset=pairs, processing_class=tokenizer, engine=engine
        )
        shake(trainer.model)
        trainer.bind_fused_step()
        if split and trainer.fused_step is not None:
            trainer.fused_step.limit_pass(70)
        elif split:
            trainer._packed_tokens = 70
        results.append(parley_step(trainer))
    torch.testing.assert_close(results[0][0], results[1][0], **BOUND)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, **BOUND)


def test_references_of_later_steps_are_of_the_first_weights(pairs: Dataset, options: dict[str, Any]) -> None:
    """The first measurement swaps parameters, later ones the buffer that they are views of."""
    model, tokenizer = demo_adapter()
    trainer = parley.DPOTrainer(
        model, args=parley.DPOConfig(**options), train_dataset=pairs, processing_class=tokenizer
    )
    trainer.bind_fused_step()
    documents = preference_documents(micro_batches(trainer)[0]["documents"])
    unchanged = trainer.objective.answers(trainer.policy_sums(documents, slots_of(documents)))
    shake(trainer.model)
    trained = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    policy = trainer.objective.answers(trainer.policy_sums(documents, slots_of(documents)))
    for _ in range(3):
        torch.testing.assert_close(trainer._measure_reference(documents), unchanged)
        assert (policy - unchanged).abs().max() > 0.1
        for name, value in trainer.model.named_parameters():
            assert torch.equal(value, trained[name]), name


def test_a_reference_is_measured_once_a_row(pairs: Dataset, options: dict[str, Any]) -> None:
    model, tokenizer = demo_adapter()
    trainer = parley.DPOTrainer(
        model, args=parley.DPOConfig(**options), train_dataset=pairs, processing_class=tokenizer
    )
    trainer.bind_fused_step()
    documents = preference_documents(micro_batches(trainer)[0]["documents"])
    first = trainer.reference_logps(documents)
    shake(trainer.model)  # the reference stays
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.reference is not None
    trainer.reference._slots.clear()
    trainer.reference._values = torch.zeros(0)
    torch.testing.assert_close(trainer.reference_logps(documents), first)
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
    trainer._measure_reference = None  # type: ignore[method-assign,assignment]
    torch.testing.assert_close(trainer.reference_logps(documents[::-1]), first.flip(0))
    assert list(trainer.model.peft_config) == ["default"]


def test_arguments_of_older_releases_are_taken(
    pairs: Dataset, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = demo_adapter()
    args = parley.DPOConfig(**options)
    trainer = parley.DPOTrainer(
        model, None, args, train_dataset=pairs, tokenizer=tokenizer, beta=0.3, max_length=300, max_prompt_length=100
    )
    assert (trainer.args.beta, trainer.objective.beta, trainer.max_tokens) == (0.3, 0.3, 300)
    assert (args.beta, args.max_length) == (0.1, 512)
    assert "max_prompt_length has no effect" in caplog.text
