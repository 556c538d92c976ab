from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from parley.config import GenerationSection
from parley.errors import DataError, ModelError
from parley.inference.chat import ChatSession
from parley.inference.generate import generate

GREEDY = GenerationSection(temperature=0, max_new_tokens=8)


@pytest.fixture
def base(tiny_llama_folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder)


@pytest.fixture
def tuned(tiny_llama_folder: Any) -> Any:
    """A Llama whose adapter changes every answer."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), lora)


def test_turns_are_kept_and_sent_with_the_next_question(base: Any, tiny_tokenizer: Any) -> None:
    session = ChatSession(base, tiny_tokenizer, GREEDY, system="Be brief.")
    first = "".join(session.say("Ahoy!"))
    assert session.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ahoy!"},
        {"role": "assistant", "content": first},
    ]
    sent = [*session.messages, {"role": "user", "content": "And the sea?"}]
    assert "".join(session.say("And the sea?")) == generate(base, tiny_tokenizer, [sent], GREEDY)[0]
    assert len(session.turns) == 4
    assert session.transcript().startswith(f"system: Be brief.\n\nuser: Ahoy!\n\nassistant: {first}")

    session.system = None
    assert session.messages == session.turns
    session.reset()
    assert session.messages == []


def test_base_and_tuned_answer_from_one_model(base: Any, tuned: Any, tiny_tokenizer: Any) -> None:
    question = [{"role": "user", "content": "Ahoy!"}]
    of_base = generate(base, tiny_tokenizer, [question], GREEDY)[0]
    of_tuned = generate(tuned, tiny_tokenizer, [question], GREEDY)[0]
    assert of_base != of_tuned

    session = ChatSession(tuned, tiny_tokenizer, GREEDY)
    answers = []
    for use_base in (False, True, False):
        session.reset()
        session.use_base = use_base
        answers.append("".join(session.say("Ahoy!")))
    assert answers == [of_tuned, of_base, of_tuned]


def test_a_stopped_answer_is_kept_as_far_as_it_went(tuned: Any, tiny_tokenizer: Any) -> None:
    session = ChatSession(tuned, tiny_tokenizer, GenerationSection(seed=0, max_new_tokens=300))
    session.use_base = True
    answer = session.say("Ahoy!")
    first = next(answer)
    answer.close()
    assert session.turns[1] == {"role": "assistant", "content": first}
    assert tuned.get_model_status().enabled is True


def test_the_model_is_at_rest_after_an_answer_was_stopped(tuned: Any, tiny_tokenizer: Any) -> None:
    """No thread decodes any more, the adapter is enabled, and what was trainable or not is so again."""
    tuned.train()
    frozen = next(parameter for name, parameter in tuned.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in tuned.named_parameters()}
    session = ChatSession(tuned, tiny_tokenizer, GenerationSection(seed=0, max_new_tokens=300), engine="plain")
    session.use_base = True
    answer = session.say("Ahoy!")
    next(answer)
    answer.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("parley-scheduler")] == []
    assert tuned.get_model_status().enabled is True
    assert tuned.training
    assert {name: parameter.requires_grad for name, parameter in tuned.named_parameters()} == before


def test_of_an_answer_that_fails_at_once_nothing_is_kept(base: Any, tiny_tokenizer: Any) -> None:
    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("no memory")

    hook = base.register_forward_pre_hook(fail)
    session = ChatSession(base, tiny_tokenizer, GREEDY, engine="plain")
    with pytest.raises(RuntimeError, match="no memory"):
        list(session.say("Ahoy!"))
    assert session.turns == []
    with pytest.raises(DataError, match="model's context is"):
        session.say("What be the sea? " * 2000)
    hook.remove()
    assert "".join(session.say("Ahoy!"))


def test_a_model_without_an_adapter_has_no_base(base: Any, tiny_tokenizer: Any) -> None:
    session = ChatSession(base, tiny_tokenizer, GREEDY)
    with pytest.raises(ModelError, match="no adapter"):
        session.use_base = True
    session.use_base = False


def test_the_last_exchange_is_undone(base: Any, tiny_tokenizer: Any) -> None:
    session = ChatSession(base, tiny_tokenizer, GREEDY)
    assert session.undo() is None
    first = "".join(session.say("Ahoy!"))
    "".join(session.say("And the sea?"))
    assert session.undo() == "And the sea?"
    assert session.turns == [{"role": "user", "content": "Ahoy!"}, {"role": "assistant", "content": first}]
    session.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("parley-scheduler")] == []
    assert "".join(session.say("And the sea?"))
    session.close()
