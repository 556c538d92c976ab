"""GRPOTrainer with prompts, rewards and answers as people bring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import parley
from parley.errors import DataError, RewardError, UsageError

from .conftest import demo_adapter, length_reward, user


def trainer(data: Any, options: dict[str, Any], reward: Any = length_reward, **more: Any) -> Any:
    model, tokenizer = demo_adapter()
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, **options, **more.pop("args", {})}
    return parley.GRPOTrainer(model, reward, parley.GRPOConfig(**settings), data, tokenizer=tokenizer, **more)


def single(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"gradient_accumulation_steps": 1}


def test_rewards_get_columns_and_what_trl_gives(prompts: Dataset, options: dict[str, Any]) -> None:
    seen: dict[str, Any] = {}

    def reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
        seen.update(kwargs, answer=answer, completions=completions)
        kwargs["log_metric"]("shout", 3.0)
        kwargs["log_extra"]("note", ["x"] * len(completions))
        print("a reward may print")
        return [1.0] * len(completions)

    made = trainer(prompts, single(options), reward)
    made.train()
    assert len(set(seen["answer"])) == 1
    assert seen["completions"][0][0]["role"] == "assistant"
    assert {"prompts", "completion_ids", "trainer_state"} <= seen.keys()
    log = made.state.log_history[0]
    assert log["shout"] == 3.0
    # Equal rewards: no advantage, and no update.
    assert (log["frac_reward_zero_std"], log["loss"], log["grad_norm"]) == (1.0, 0.0, 0.0)


def test_several_rewards_sync_and_async_are_weighted(prompts: Dataset, options: dict[str, Any]) -> None:
    async def other(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [None if index % 2 else 4.0 for index in range(len(completions))]

    made = trainer(prompts, single(options), [length_reward, other], args={"reward_weights": [0.0, 0.5]})
    made.train()
    log = made.state.log_history[0]
    assert log["rewards/other/mean"] == 4.0
    assert log["reward"] == 1.0  # of 2, 0, 2, 0


@pytest.mark.parametrize("values", [[1.0], ["a", "b", "c", "d"], None])
def test_a_wrong_reward_ends_training_in_one_line(values: Any, prompts: Dataset, options: dict[str, Any]) -> None:
    def reward(**kwargs: Any) -> Any:
        return values

    with pytest.raises(RewardError, match=r"^reward reward: "):
        trainer(prompts, single(options), reward).train()


def test_unscorable_answers_learn_nothing(prompts: Dataset, options: dict[str, Any]) -> None:
    def nothing(completions: list[Any], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    made = trainer(prompts, single(options), nothing)
    made.train()
    assert made.state.log_history[0]["grad_norm"] == 0.0


def test_plain_prompts_are_continued(options: dict[str, Any]) -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    trainer(Dataset.from_dict({"prompt": ["What is", "Name a"] * 2}), single(options), reward).train()
    assert all(isinstance(text, str) for text in seen)


def test_prompts_are_rendered_as_for_chat(options: dict[str, Any]) -> None:
    rows = [
        {"prompt": [{"role": "system", "content": "Be short."}, *user("Hi <|eot_id|> there")], "tools": None},
        {"prompt": user("Hi"), "tools": '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'},
    ]
    made = trainer(Dataset.from_list(rows * 2), single(options))
    made._row_tools = [None, rows[1]["tools"]]
    ids, _, _ = made._tokenize_prompts([row["prompt"] for row in rows])
    tokenizer = made.processing_class
    assert ids[0] == parley.inference.prompts.prompt_ids(
        made.model, tokenizer, [{"role": "system", "content": "Be short."}, *user("Hi <|eot_id|> there")], None
    )
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert ids[0].count(end) == 2, "a control token in a question is text"
    made._row_tools = []
    whole = made._tokenize_prompts([user("Hi")])[0][0]
    assert whole != ids[1], "tools are part of a prompt"
    made.args.max_prompt_length = 3
    assert made._tokenize_prompts([user("Hi")])[0][0] == whole[-3:]


def test_a_prompt_that_fills_the_context_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="tokens and the model's context is 2048"):
        trainer(Dataset.from_list([{"prompt": user("word " * 3000)}] * 2), single(options))


def test_an_answer_is_cut_by_the_context_and_by_stop_strings(options: dict[str, Any]) -> None:
    prompt = Dataset.from_list([{"prompt": user("What is 2 plus 3?")}] * 2)
    sampling = {"stop_strings": ["is"], "top_k": 5, "do_sample": True}
    made = trainer(prompt, single(options), args={"generation_kwargs": sampling})
    found = made.rollouts.sample(made._tokenize_prompts([user("What is 2 plus 3?")] * 3)[0], made.sampling, [1, 2, 3],
                                 made.eos_token_ids)  # fmt: skip
    texts = made.processing_class.batch_decode(found)
    assert all(text.endswith("is") for text in texts), texts


def test_the_same_state_samples_the_same_answers_and_the_live_adapter_answers(
    prompts: Dataset, options: dict[str, Any]
) -> None:
    made = trainer(prompts, single(options))
    made.bind_fused_step()
    ids = made._tokenize_prompts([prompts[0]["prompt"]] * 4)[0]
    torch.manual_seed(1)
    first, _ = made._generate_single_turn(ids, None, {}, 4)
    torch.manual_seed(1)
    assert made._generate_single_turn(ids, None, {}, 4)[0] == first
    decoder = made.rollouts._decoder
    assert decoder is not None, made.rollouts.plain_because
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3
    torch.manual_seed(1)
    changed, _ = made._generate_single_turn(ids, None, {}, 4)
    assert changed != first
    assert made.rollouts._decoder is decoder, "one decoder, with the adapter as it is now"


def test_the_plain_path_samples_through_transformers(prompts: Dataset, options: dict[str, Any]) -> None:
    made = trainer(prompts, single(options), engine="plain")
    made.train()
    assert made.rollouts.plain_because == "engine: plain"
    assert "reward" in made.state.log_history[0]


def test_dropout_learns_from_answers_that_were_sampled_without_it(prompts: Dataset, options: dict[str, Any]) -> None:
    model, tokenizer = demo_adapter(lora_dropout=0.1)
    args = parley.GRPOConfig(**(single(options) | {"max_steps": 2, "beta": 0.1}))
    made = parley.GRPOTrainer(model, length_reward, args, prompts, processing_class=tokenizer)
    made.train()
    assert "kl" in made.state.log_history[1]


def test_arguments_are_not_changed(prompts: Dataset, options: dict[str, Any]) -> None:
    args = parley.GRPOConfig(**(options | {"beta": 0.3}))
    before = args.to_dict()
    model, tokenizer = demo_adapter()
    rewards = [length_reward]
    parley.GRPOTrainer(model, rewards, args, prompts, processing_class=tokenizer)
    assert args.to_dict() == before
    assert rewards == [length_reward]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_vllm": True}, "use_vllm is not followed: answers are sampled by Parley's own decoder"),
        ({"vllm_gpu_memory_utilization": 0.9}, "vllm_gpu_memory_utilization is not followed"),
        ({"beta": 0.1, "sync_ref_model": True}, "sync_ref_model is not followed"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not followed"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is not followed"),
        ({"generation_kwargs": {"min_new_tokens": 3}}, "generation_kwargs: 'min_new_tokens' is not followed"),
        ({"loss_type": "best"}, "loss_type: got 'best'; wanted one of dapo, grpo"),
    ],
)
def test_what_cannot_have_effect_is_refused_by_name(
    option: dict[str, Any], message: str, prompts: Dataset, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as error:
        trainer(prompts, options, args=option)
    assert message in str(error.value)


def test_an_evaluation_in_groups_that_do_not_divide_is_refused(prompts: Dataset, options: dict[str, Any]) -> None:
    made = trainer(prompts, options, eval_dataset=prompts, args={"num_generations_eval": 3})
    with pytest.raises(UsageError, match="per_device_eval_batch_size: got 8; wanted a multiple of the 3 answers"):
        made.evaluate()


def test_an_evaluation_gives_rewards_and_leaves_training_alone(prompts: Dataset, options: dict[str, Any]) -> None:
    made = trainer(prompts, options, eval_dataset=prompts, args={"num_generations_eval": 1})
    state = torch.get_rng_state()
    found = made.evaluate()
    assert found["eval_reward"] > 0
    assert found["eval_supervised_tokens"] > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tool_is_called_between_two_turns_of_the_model(prompts: Dataset, options: dict[str, Any]) -> None:
    """TRL's tool loop over Parley's decoder: only the model's own tokens are supervised."""
    made = trainer(prompts, single(options))
    batch = {
        "prompt_ids": torch.tensor([[5, 6]]), "prompt_mask": torch.ones(1, 2, dtype=torch.long),
        "completion_ids": torch.tensor([[7, 8, 9, 10]]), "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
    }  # fmt: skip
    from parley.grpo.policy_step import rows_of

    [(document, cells)] = rows_of(batch, 10)
    assert document.ids_L.tolist() == [5, 6, 7, 8, 9]
    assert document.label_L.tolist() == [-100, -100, 7, -100, 9]
    assert cells.tolist() == [10, 12]
    assert made.tools is None or made.tools == []


def test_several_processes_are_refused(prompts: Dataset, options: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(parley.GRPOConfig, "world_size", 2)
    with pytest.raises(UsageError, match="GRPO trains in one process, and here are 2"):
        trainer(prompts, options)


def test_a_step_that_is_not_finite_is_not_applied(prompts: Dataset, options: dict[str, Any]) -> None:
    made = trainer(prompts, single(options), nonfinite="skip", args={"max_steps": 2})
    original = made._compute_loss
    made._compute_loss = lambda model, inputs: original(model, inputs) * float("nan")
    before = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
    made.train()
    assert made.monitor.skipped == 2
    for name, parameter in made.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


def test_buffers_are_for_the_prompts_and_not_for_the_context(prompts: Dataset, options: dict[str, Any]) -> None:
    made = trainer(prompts, single(options))
    lengths = [len(ids) for ids in made._tokenize_prompts(prompts["prompt"])[0]]
    assert made.row_lengths().tolist() == [length + 12 for length in lengths]
    assert made.longest_row == max(lengths) + 12
    made.train()
    assert made.fused_step is not None
    assert made.fused_step.plan.positions < 200


def test_a_later_epoch_is_resumed_in_its_order(options: dict[str, Any], tmp_path: Path) -> None:
    """TRL's sampler shuffles with a generator that only iterating moves on."""
    rows = Dataset.from_list([{"prompt": user(f"Say {number}")} for number in range(5)])

    def asked(folder: str, steps: int, *, resume: bool = False) -> list[str]:
        seen: list[str] = []

        def reward(prompts: list[Any], **kwargs: Any) -> list[float]:
            seen.append(prompts[0][0]["content"])
            return [0.0] * len(prompts)

        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "constant"}
        changed = {"output_dir": str(tmp_path / folder), "max_completion_length": 2}
        trainer(rows, single(options), reward, args=settings | changed).train(resume_from_checkpoint=resume)
        return seen

    whole = asked("whole", 12)
    assert whole[:5] != whole[5:10], "each epoch has its own order"
    assert asked("part", 7) + asked("part", 12, resume=True) == whole
