"""Loss, gradient and figures of a GRPO step equal TRL's for the same completions, on the fused and the plain path."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import trl
from datasets import Dataset

import parley

from .conftest import demo_adapter, length_reward, shake

Engine = Literal["auto", "plain"]
BOUND = {"rtol": 1e-5, "atol": 1e-5}
END = 1278


def completions(count: int, seed: int = 0) -> list[list[int]]:
    """Of odd lengths; every third has no end."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(1, 12, (1,), generator=generator))
        made.append(torch.randint(0, 1200, (length,), generator=generator).tolist() + [END] * (index % 3 > 0))
    return made


def with_fixed_completions(trainer: Any) -> Any:
    trainer._generate_single_turn = lambda prompt_ids, *_, **__: (completions(len(prompt_ids)), None)
    return trainer


def number_reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
    return [None if index % 4 == 1 else 0.5 * index for index in range(len(completions))]


def trainers(prompts: Dataset, options: dict[str, Any], engine: Engine) -> tuple[Any, Any]:
    """Parley's and TRL's."""
    made = []
    rewards = [length_reward, number_reward]
    for make, config, extra in (
        (parley.GRPOTrainer, parley.GRPOConfig, {"engine": engine}),
        (trl.GRPOTrainer, trl.GRPOConfig, {}),
    ):
        model, tokenizer = demo_adapter()
        args = config(reward_weights=[1.0, 0.3], **options)
        trainer = make(model, list(rewards), args, prompts, processing_class=tokenizer, **extra)
        made.append(with_fixed_completions(trainer))
    return made[0], made[1]


def one_step(trainer: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Summed loss, gradients and figures of the next optimizer step."""
    if isinstance(trainer, parley.GRPOTrainer):
        trainer.bind_fused_step()
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    count = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = count
    batch = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(5)  # TRL shuffles completions
    total = 0.0
    for index in range(count):
        trainer.accelerator.gradient_state._set_sync_gradients(index == count - 1)
        total += float(trainer.training_step(trainer.model, batch, None))
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None and ".ref." not in name
    }
    figures = {name: sum(map(float, values)) / len(values) for name, values in trainer._metrics["train"].items()}
    return total, gradients, figures


def compare(ours: Any, theirs: Any) -> None:
    loss, gradient, figures = one_step(ours)
    expected_loss, expected, expected_figures = one_step(theirs)
    torch.testing.assert_close(loss, expected_loss, **BOUND)
    assert gradient.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-4
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, **BOUND, msg=lambda text, name=name: f"{name}: {text}")
    own = {"num_tokens", "step_time"}
    if ours.fused_step is not None and ours.args.gradient_accumulation_steps > 1:
        own.add("entropy")  # a mean over the step's tokens, where TRL's is a mean of means
    assert expected_figures.keys() - own == figures.keys() - own - {"sampling/seconds", "sampling/tokens_per_s"}
    for name in expected_figures.keys() - own:
        torch.testing.assert_close(figures[name], expected_figures[name], rtol=1e-4, atol=1e-5, msg=name)


def test_figures_of_a_single_micro_batch_are_all_trls(prompts: Dataset, options: dict[str, Any]) -> None:
    compare(*trainers(prompts, options | {"gradient_accumulation_steps": 1, "beta": 0.1}, "auto"))


LOSSES = ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_of_the_fused_step_is_trls(loss: str, prompts: Dataset, options: dict[str, Any]) -> None:
    ours, theirs = trainers(prompts, options | {"loss_type": loss}, "auto")
    shake(ours.model)
    shake(theirs.model)
    compare(ours, theirs)
    assert ours.fused_step is not None, ours.plain_because


OPTIONS: dict[str, dict[str, Any]] = {
    "divergence": {"beta": 0.2},
    "temperature": {"temperature": 0.7},
    "truncated": {"mask_truncated_completions": True},
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "batch": {"scale_rewards": "batch"},
    "unscaled": {"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"},
}


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_means_what_it_means_in_trl(
    option: str, engine: Engine, prompts: Dataset, options: dict[str, Any]
) -> None:
    ours, theirs = trainers(prompts, options | OPTIONS[option], engine)
    shake(ours.model)  # away from the reference
    shake(theirs.model)
    compare(ours, theirs)
    assert (ours.fused_step is not None) is (engine == "auto"), ours.plain_because


@pytest.mark.parametrize(
    "option",
    [
        {"entropy_coef": 0.1},
        {"top_entropy_quantile": 0.5},
        {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 9.0},
    ],
)
def test_what_the_fused_step_has_not_takes_the_plain_path(
    option: dict[str, Any], prompts: Dataset, options: dict[str, Any]
) -> None:
    ours, theirs = trainers(prompts, options | option, "auto")
    compare(ours, theirs)
    assert ours.fused_step is None
    assert ours.plain_because is not None


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_second_iteration_is_clipped_against_the_policy_that_sampled(
    engine: Engine, prompts: Dataset, options: dict[str, Any]
) -> None:
    settings = {"num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.15, "delta": 1.5}
    ours, theirs = trainers(prompts, options | settings, engine)
    compare(ours, theirs)
    shake(ours.model, size=0.01)
    shake(theirs.model, size=0.01)
    if ours.fused_step is not None:
        shaken = ours.fused_step.bound.flat.weight_Z.abs().sum()
        assert float(shaken) > 0, "adapters are views of the flat weights"
    loss, gradient, figures = one_step(ours)
    expected_loss, expected, expected_figures = one_step(theirs)
    assert expected_figures["clip_ratio/region_mean"] > 0
    torch.testing.assert_close(figures["clip_ratio/region_mean"], expected_figures["clip_ratio/region_mean"])
    torch.testing.assert_close(loss, expected_loss, **BOUND)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, **BOUND)


def test_passes_of_few_tokens_sum_up_to_the_step(prompts: Dataset, options: dict[str, Any]) -> None:
    """Where a step does not fit into one pass, log-probabilities come from a pass before."""
    ours, theirs = trainers(prompts, options, "auto")
    ours.bind_fused_step()
    ours.fused_step.limit_pass(64)
    compare(ours, theirs)


def test_full_fine_tuning_needs_no_second_model(prompts: Dataset, options: dict[str, Any]) -> None:
    made = []
    for make, config in ((parley.GRPOTrainer, parley.GRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)):
        adapted, tokenizer = demo_adapter()
        model = adapted.unload()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        trainer = make(model, length_reward, config(beta=0.1, **options), prompts, processing_class=tokenizer)
        shake(trainer.model, size=0.002)
        made.append(with_fixed_completions(trainer))
    compare(*made)
