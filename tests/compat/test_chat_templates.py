"""get_chat_template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from jinja2 import TemplateError

from parley.compat.unsloth import get_chat_template
from parley.compat.unsloth.families import FAMILIES, NAMES
from parley.compat.unsloth.tokenizer import as_notebooks_expect
from parley.data.render import render
from parley.errors import ModelError, UsageError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


def text(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1", "llama3"])
def test_own_template_of_the_family_is_kept(tokenizer: Any, name: str) -> None:
    own = tokenizer.chat_template
    assert get_chat_template(tokenizer, chat_template=name) is tokenizer
    assert tokenizer.chat_template == own


def test_a_base_tokenizer_gets_llama_3s_template(tokenizer: Any) -> None:
    asked = text(tokenizer, TURNS[:1], add_generation_prompt=True)
    own = text(tokenizer, TURNS)
    tokenizer.chat_template, tokenizer.eos_token = None, "<|end_of_text|>"
    get_chat_template(tokenizer, "llama-3.1")
    assert text(tokenizer, TURNS) == own
    assert text(tokenizer, TURNS[:1], add_generation_prompt=True) == asked
    assert tokenizer.eos_token == "<|eot_id|>"


def test_chatml_without_its_tokens_ends_turns_with_the_end_of_text(tokenizer: Any) -> None:
    get_chat_template(tokenizer, "chatml")
    assert text(tokenizer, TURNS) == (
        "<|begin_of_text|><|im_start|>user\nHi<|eot_id|>\n<|im_start|>assistant\nAhoy<|eot_id|>\n"
    )
    rendered = render(tokenizer, TURNS)
    learned = [token for token, mask in zip(rendered.input_ids, rendered.mask, strict=True) if mask]
    assert tokenizer.decode(learned) == "Ahoy<|eot_id|>"
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no token <\|im_start\|>"):
        get_chat_template(tokenizer, "chatml", map_eos_token=False)


def test_chatml_with_its_tokens(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    get_chat_template(tokenizer, "qwen-2.5")
    assert text(tokenizer, TURNS, add_generation_prompt=True).endswith(
        "<|im_start|>assistant\nAhoy<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"


def test_mapping_reads_sharegpt_turns_and_standard_ones_alike(tokenizer: Any) -> None:
    own, own_mask = text(tokenizer, TURNS), render(tokenizer, TURNS)
    get_chat_template(tokenizer, "llama-3.1", mapping=SHAREGPT)
    assert text(tokenizer, [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}]) == own
    assert render(tokenizer, TURNS) == own_mask


def test_system_message_opens_conversations_that_have_none(tokenizer: Any) -> None:
    system = 'Say "arr" \\ naïve ☠️ 🏴\n{{ twice }}'
    turn = {"role": "system", "content": system}
    own = text(tokenizer, [turn, *TURNS])
    get_chat_template(tokenizer, "llama-3.1", system_message=system)
    assert text(tokenizer, TURNS) == own
    assert text(tokenizer, [turn, *TURNS]) == own


def test_unknown_names_and_missing_families_say_what_there_is(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'llama-3\.1'"):
        get_chat_template(tokenizer, "lama-3.1")
    with pytest.raises(ModelError, match=r"no token <\|im_start\|>, which phi-4 needs"):
        get_chat_template(tokenizer, "phi-4")
    with pytest.raises(UsageError, match="did you mean 'mapping'"):
        get_chat_template(tokenizer, "llama-3", maping={})


EXCHANGE = [
    {"role": "system", "content": "Be brief."},
    *TURNS,
    {"role": "user", "content": "Where to?"},
    {"role": "assistant", "content": "Tortuga"},
]


@pytest.mark.parametrize("name", sorted(name for name in NAMES if FAMILIES[NAMES[name]].turns))
def test_a_tokenizer_without_a_template_gets_one_of_each_name(tokenizer: Any, name: str) -> None:
    family = FAMILIES[NAMES[name]]
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tokenizer.chat_template, tokenizer.eos_token = None, "<|end_of_text|>"
    get_chat_template(tokenizer, name)
    assert tokenizer.eos_token == (family.end or "<|end_of_text|>")
    written = text(tokenizer, EXCHANGE)
    for turn in EXCHANGE:
        assert written.count(turn["content"]) == 1
    assert written.count(family.instruction.strip()) == written.count(family.response.strip()) == 2
    prompt = text(tokenizer, EXCHANGE[:-1], add_generation_prompt=True)
    assert written.startswith(prompt.rstrip())
    # The answers are supervised, each with what ends it, and the model's words stand where the prompt stops.
    rendered = render(tokenizer, EXCHANGE)
    supervised = tokenizer.decode([t for t, kept in zip(rendered.input_ids, rendered.mask, strict=True) if kept])
    if NAMES[name] == "gpt-oss":
        supervised = supervised.replace("<|channel|>final<|message|>", "")
        assert supervised == "Ahoy<|end|>Tortuga<|return|>"
    else:
        assert "".join(supervised.split()) == "".join(f"{word}{tokenizer.eos_token}" for word in ("Ahoy", "Tortuga"))
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]]
    assert text(tokenizer, parts) == text(tokenizer, TURNS)


def test_roles_that_a_template_does_not_write_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    get_chat_template(tokenizer, "alpaca")
    with pytest.raises(TemplateError, match="writes no turns of tool"):
        text(tokenizer, [*TURNS, {"role": "tool", "content": "4"}])


def test_a_template_of_the_notebook_s_own_comes_with_its_end_token(tokenizer: Any, caplog: Any) -> None:
    own = "{% for message in messages %}{{ message['content'] + '<|stop|>' }}{% endfor %}"
    get_chat_template(tokenizer, (own.replace("'<|stop|>'", "eos_token"), "eos_token"))
    assert text(tokenizer, TURNS) == "Hi<|eot_id|>Ahoy<|eot_id|>"
    get_chat_template(tokenizer, (own, "<|stop|>"))
    assert text(tokenizer, TURNS) == "Hi<|eot_id|>Ahoy<|eot_id|>"
    assert "no token <|stop|>; turns end with <|eot_id|>" in caplog.text
    with pytest.raises(ModelError, match=r"has no token <\|stop\|>"):
        get_chat_template(tokenizer, (own, "<|stop|>"), map_eos_token=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    get_chat_template(tokenizer, (own, "<|stop|>"))
    assert (text(tokenizer, TURNS), tokenizer.eos_token) == ("Hi<|stop|>Ahoy<|stop|>", "<|stop|>")


def test_a_hostile_template_is_stopped_in_notebooks_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parley.data.template_trace.MAX_STEPS", 20_000)
    tokenizer = as_notebooks_expect(tokenizer)
    written = text(tokenizer, TURNS)
    assert text(tokenizer, [TURNS, TURNS]) == [written, written]  # type: ignore[arg-type, comparison-overlap]
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="the chat template was stopped: it takes more than 20,000 steps"):
        text(tokenizer, TURNS)
