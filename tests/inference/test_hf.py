from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from parley.config import GenerationSection
from parley.data.render import render_prompt
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.generate import make_decoder
from parley.inference.hf import CACHE_NAMES, TransformersDecoder, is_attention_cache, logits_processors
from parley.inference.interface import DecodeRequest, Token

PROMPTS = ["Ahoy!", "What be the colour of the sea on a clear morning?", "How many apples are in the basket? " * 3]
GREEDY = GenerationSection(temperature=0, max_new_tokens=12)


def asked(tokenizer: Any, question: str, settings: GenerationSection = GREEDY, **more: Any) -> DecodeRequest:
    prompt = render_prompt(tokenizer, [{"role": "user", "content": question}])
    return DecodeRequest(prompt, settings, frozenset({tokenizer.eos_token_id}), more.pop("seed", 0), **more)


def answer(decoder: TransformersDecoder, *questions: DecodeRequest) -> list[list[Token]]:
    """All at once, each until it draws no more."""
    decoder.admit(dict(enumerate(questions)))
    answers: list[list[Token]] = [[] for _ in questions]
    while drawn := decoder.decode():
        for slot, tokens in drawn.items():
            answers[slot] += tokens
    for slot in range(len(questions)):
        decoder.release(slot)
    return answers


def test_greedy_answers_are_those_of_generate_in_every_family(family_folder: Path, tiny_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(family_folder).eval()
    questions = [asked(tiny_tokenizer, text, GREEDY.model_copy(update={"repetition_penalty": 1.2})) for text in PROMPTS]
    expected = []
    for each in questions:
        ids = torch.tensor([each.prompt_ids])
        out = model.generate(ids, do_sample=False, max_new_tokens=12, repetition_penalty=1.2, attention_mask=ids > -1)
        expected.append(out[0, len(each.prompt_ids) :].tolist())
    drawn = answer(TransformersDecoder(model, slots=3, length=256), *questions)
    assert [[token.id for token in tokens] for tokens in drawn] == expected
    assert len({tuple(ids) for ids in expected}) > 1


@pytest.fixture
def model(tiny_llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


def test_draws_are_decided_by_the_seed_whoever_else_is_there(model: Any, tiny_tokenizer: Any) -> None:
    settings = GenerationSection(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, max_new_tokens=16)
    questions = [asked(tiny_tokenizer, text, settings, seed=seed) for seed, text in enumerate(PROMPTS)]
    decoder = TransformersDecoder(model, slots=3, length=256)
    together = answer(decoder, *questions)
    assert [answer(decoder, each)[0] for each in questions] == together
    assert answer(decoder, asked(tiny_tokenizer, PROMPTS[0], settings, seed=9))[0] != together[0]


def test_draws_follow_the_processed_distribution(model: Any, tiny_tokenizer: Any) -> None:
    """First tokens over many seeds, against softmax of the logits after temperature and top_k."""
    settings = GenerationSection(temperature=0.7, top_k=4, min_p=0, max_new_tokens=1)
    question = asked(tiny_tokenizer, PROMPTS[1], settings)
    with torch.no_grad():
        logits_V = model(torch.tensor([question.prompt_ids])).logits[0, -1]
    best = logits_V.topk(4)
    expected = dict(zip(best.indices.tolist(), (best.values / 0.7).softmax(-1).tolist(), strict=True))
    decoder = TransformersDecoder(model, slots=400, length=256)
    drawn = [
        tokens[0].id
        for tokens in answer(decoder, *(asked(tiny_tokenizer, PROMPTS[1], settings, seed=seed) for seed in range(400)))
    ]
    assert set(drawn) <= set(expected)
    for token, share in expected.items():
        assert abs(drawn.count(token) / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 1e-6


def test_logprobs_are_the_models_own(model: Any, tiny_tokenizer: Any) -> None:
    settings = GenerationSection(temperature=1.5, top_k=2, max_new_tokens=3, repetition_penalty=1.5)
    question = asked(tiny_tokenizer, PROMPTS[0], settings, logprobs=3)
    tokens = answer(TransformersDecoder(model, slots=1, length=256), question)[0]
    ids = torch.tensor([[*question.prompt_ids, *(token.id for token in tokens)]])
    with torch.no_grad():
        logprobs_TV = model(ids).logits[0].log_softmax(-1)[len(question.prompt_ids) - 1 :]
    for token, logprobs_V in zip(tokens, logprobs_TV, strict=False):
        assert token.logprob == pytest.approx(float(logprobs_V[token.id]), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(logprobs_V.topk(3).values.tolist(), abs=1e-4)


def test_an_answer_ends_with_its_room(model: Any, tiny_tokenizer: Any) -> None:
    question = asked(tiny_tokenizer, PROMPTS[0], GREEDY.model_copy(update={"max_new_tokens": 99}))
    question = DecodeRequest(question.prompt_ids, question.settings, frozenset(), 0)
    drawn = answer(TransformersDecoder(model, slots=1, length=len(question.prompt_ids) + 5), question)[0]
    assert len(drawn) == 5


def test_the_adapter_is_switched_off_for_those_who_ask_for_the_base(model: Any, tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = answer(TransformersDecoder(model, slots=1, length=256), asked(tiny_tokenizer, PROMPTS[1]))[0]
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    decoder = TransformersDecoder(tuned.eval(), slots=2, length=256)
    with_adapter, without = answer(
        decoder, asked(tiny_tokenizer, PROMPTS[1]), asked(tiny_tokenizer, PROMPTS[1], base=True)
    )
    assert without == plain
    assert with_adapter != plain


def test_families_that_the_fast_decoder_does_not_know_are_answered_by_this_one(build_family: Any) -> None:
    fast = make_decoder(AutoModelForCausalLM.from_pretrained(build_family("llama")).eval(), slots=2, length=4096)
    plain = make_decoder(AutoModelForCausalLM.from_pretrained(build_family("starcoder2")).eval(), slots=2, length=64)
    assert isinstance(fast, StaticCacheDecoder)
    assert isinstance(plain, TransformersDecoder)
    assert (fast.slots, fast.length) == (2, 2048)  # the model's positions
    assert (plain.slots, plain.length) == (2, 64)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv", "recurrent_gemma", "bloom"])
def test_models_with_another_kind_of_cache(kind: str) -> None:
    """State-space and recurrent models among them: greedy answers, two at a time, are those of the whole text read
    anew for each token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
    extra: dict[str, Any] = {
        "mamba": {"state_size": 4},
        "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
        "rwkv": {"context_length": 64},
        "recurrent_gemma": {"intermediate_size": 16, "num_attention_heads": 2, "lru_width": 16, "num_hidden_layers": 3},
        "bloom": {"n_head": 2},
    }[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | extra)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # logits further apart than rounding
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    requests = [DecodeRequest(p, GREEDY.model_copy(update={"max_new_tokens": 6}), frozenset(), 0) for p in prompts]
    answers = answer(TransformersDecoder(model, slots=2, length=64), *requests)
    assert [[token.id for token in tokens] for tokens in answers] == expected


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0, "min_p": 0.1, "top_k": 3}, []),
        ({"temperature": 1}, []),
        ({"temperature": 0.5}, ["Temperature"]),
        ({"temperature": 1, "min_p": 0.1}, ["MinP"]),
        ({"temperature": 1, "top_k": 1}, ["TopK"]),
        ({"temperature": 1, "top_p": 0.99}, ["TopP"]),
        ({"temperature": 0, "repetition_penalty": 0.9}, ["RepetitionPenalty"]),
    ],
)
def test_each_setting_has_its_processor(settings: Any, processors: list[str]) -> None:
    made = logits_processors(GenerationSection(**{"min_p": 0} | settings))
    assert [type(each).__name__ for each in made] == [
        f"{name}{'LogitsProcessor' if name == 'RepetitionPenalty' else 'LogitsWarper'}" for name in processors
    ]


def attention_model(kind: str, **more: Any) -> Any:
    """Random weights, far enough apart that rounding changes no greedy token; windows shorter than the prompts."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
        "initializer_range": 0.4,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | more)).eval()


def count_rows(model: Any) -> list[int]:
    """Rows of each forward pass from now on."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    return rows


WINDOW = {"sliding_window": 6}
BATCHED: dict[str, dict[str, Any]] = {
    "llama": {}, "gpt2": {}, "gemma2": WINDOW, "gemma3_text": WINDOW, "mistral": WINDOW, "phi3": WINDOW, "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},  # as after training with TRL
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(4, 12, 9, 6), (12, 3, 9, 6)], ids=["the longest stays", "the longest leaves"])
@pytest.mark.parametrize("kind", BATCHED)
def test_answers_that_come_and_go_are_decoded_in_one_batch(kind: str, lengths: tuple[int, ...]) -> None:
    """Each is the one that the model gives alone, whoever is beside it, and running answers share a forward pass."""
    model = attention_model(kind, **BATCHED[kind])
    prompts = [[5, 6, 7], list(range(9, 29)), [40, 8], [33, 21, 12, 50, 2, 9, 10, 11]]
    requests = [
        DecodeRequest(prompt, GREEDY.model_copy(update={"max_new_tokens": length}), frozenset(), 0)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    expected = [answer(TransformersDecoder(model, slots=1, length=64), request)[0] for request in requests]
    decoder = TransformersDecoder(model, slots=3, length=64)
    answers: dict[int, list[Token]] = {index: [] for index in range(4)}
    running, waiting = dict[int, int](), [0, 1, 2, 3]  # slot to request
    rows = count_rows(model)
    for step in range(40):
        free = [slot for slot in range(3) if slot not in running]
        if waiting and free and step % 2 == 0:  # one at a time, so that each joins those that run
            running[free[0]] = waiting.pop(0)
            decoder.admit({free[0]: requests[running[free[0]]]})
        sampled = decoder.decode()
        for slot, index in list(running.items()):
            answers[index] += sampled[slot]
            if len(answers[index]) == lengths[index]:
                decoder.release(slot)
                del running[slot]
        if not running and not waiting:
            break
    assert [answers[index] for index in range(4)] == expected
    assert len({tuple(token.id for token in tokens) for tokens in expected}) == 4
    assert max(rows) > 1
    assert len(rows) < sum(lengths) - 6  # 4 prefills, and decode steps for two and three at once


def test_a_batch_has_the_adapter_or_has_it_not() -> None:
    from peft import LoraConfig, get_peft_model

    model = attention_model("llama")
    tuned = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    settings = GREEDY.model_copy(update={"max_new_tokens": 6})
    requests = [
        DecodeRequest(prompt, settings, frozenset(), 0, base=base)
        for prompt in ([5, 6, 7], [9, 8, 7, 6, 5])
        for base in (True, False)
    ]
    expected = [answer(TransformersDecoder(tuned.eval(), slots=1, length=64), request)[0] for request in requests]
    rows = count_rows(model)
    assert answer(TransformersDecoder(tuned, slots=4, length=64), *requests) == expected
    assert rows == [1] * 4 + [2, 2] * 5
    assert expected[0] != expected[1]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mamba", {"state_size": 4}),
        ("bloom", {"n_head": 2}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4}, "max_position_embeddings": 8},
        ),
    ],
)
def test_what_padding_could_change_is_decoded_one_by_one(kind: str, more: dict[str, Any]) -> None:
    model = attention_model(kind, **more)
    settings = GREEDY.model_copy(update={"max_new_tokens": 5})
    requests = [DecodeRequest(prompt, settings, frozenset(), 0) for prompt in ([5, 6, 7], [9, 8, 7, 6, 5, 4])]
    expected = [answer(TransformersDecoder(model, slots=1, length=64), request)[0] for request in requests]
    rows = count_rows(model)
    assert answer(TransformersDecoder(model, slots=2, length=64), *requests) == expected
    assert set(rows) == {1}


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("llama", {}, True),
        ("gemma2", WINDOW, True),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
        ("mamba", {"state_size": 4}, False),
    ],
)
def test_only_keys_and_values_by_position_can_be_padded(kind: str, more: dict[str, Any], expected: bool) -> None:
    output = attention_model(kind, **more)(torch.tensor([[5, 6, 7]]), use_cache=True)
    cache = next(output[name] for name in CACHE_NAMES if name in output)
    assert is_attention_cache(cache) is expected
