"""Answers of models with longrope, whose frequencies change where a text becomes long."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Phi3Config

from parley.config import GenerationSection
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.generate import Generator, make_decoder
from parley.inference.hf import TransformersDecoder
from parley.inference.interface import DecodeRequest

SWITCH = 40


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, original_max_position_embeddings=SWITCH, rope_parameters=rope,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.generation_config.eos_token_id = None
    return model


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0, len(prompt) :
    ].tolist()


@pytest.mark.parametrize("length", [10, SWITCH - 10, SWITCH, SWITCH + 20])
def test_an_answer_that_becomes_long_is_read_anew_as_transformers_does(model: Any, length: int) -> None:
    prompt, tokens = [(7 * i) % 120 + 3 for i in range(length)], 25
    decoder = TransformersDecoder(model, slots=2, length=128)
    settings = GenerationSection(temperature=0, max_new_tokens=tokens)
    # A short answer beside it, whose frequencies stay as they are.
    prompts = {0: prompt, 1: prompt[:5]}
    decoder.admit({slot: DecodeRequest(ids, settings, frozenset(), 0) for slot, ids in prompts.items()})
    answers: dict[int, list[int]] = {0: [], 1: []}
    while emitted := decoder.decode():
        for slot, new in emitted.items():
            answers[slot] += [token.id for token in new]
    assert answers == {slot: greedy(model, ids, tokens) for slot, ids in prompts.items()}


def test_texts_that_may_become_long_are_answered_through_transformers(
    model: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    conversation = [{"role": "user", "content": "Ahoy"}]
    with caplog.at_level(logging.INFO, "parley"), Generator(model, tiny_tokenizer) as generator:
        prompt = generator.prompt_ids(conversation)
        for tokens, passes in ((SWITCH - len(prompt), False), (SWITCH - len(prompt) + 1, True), (60, True)):
            caplog.clear()
            settings = GenerationSection(temperature=0, max_new_tokens=tokens)
            ((_, answer),) = generator.answers([conversation], settings)
            assert answer == tiny_tokenizer.decode(
                [token for token in greedy(model, prompt, tokens)], skip_special_tokens=True
            )
            said = "longrope has other frequencies for texts of more than 40 tokens"
            assert (said in caplog.text) == passes


def test_a_server_says_what_a_request_holds(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    decoder = make_decoder(model, slots=1, length=128)
    assert isinstance(decoder, StaticCacheDecoder)
    assert decoder.length == SWITCH
    assert "a request holds at most 40 tokens, its answer included" in caplog.text
    caplog.clear()
    make_decoder(model, slots=1, length=30)
    assert not caplog.text
