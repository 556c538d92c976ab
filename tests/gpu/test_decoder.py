"""The decoder on a GPU: graphs against the plain path, 4-bit weights, adapters by row, slots filled again."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.gpu import models
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from parley.config import GenerationSection
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.interface import DecodeRequest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="features a CUDA device")]
VOCABULARY = 5000
LENGTHS = (1, 40, 7, 150, 300, 2, 33, 90, 64)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    model = models.llama(VOCABULARY, dtype)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # logits further apart than rounding
    return model.eval()


def adapted(model: Any) -> Any:
    return models.adapted(model, 0.1).eval()


def questions(settings: GenerationSection, lengths: Sequence[int] = LENGTHS, **more: Any) -> list[DecodeRequest]:
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCABULARY, (length,), generator=rng).tolist() for length in lengths]
    return [
        DecodeRequest(prompt, settings, frozenset(), seed, base=seed % 2 == 1, **more)
        for seed, prompt in enumerate(prompts)
    ]


def answers(decoder: StaticCacheDecoder, every: Sequence[DecodeRequest]) -> list[list[int]]:
    """All answers' ids; slots are filled again as they come free."""
    ids: list[list[int]] = [[] for _ in every]
    waiting, running = list(range(len(every))), dict[int, int]()
    while waiting or running:
        free = [slot for slot in range(decoder.slots) if slot not in running]
        fresh = {slot: waiting.pop(0) for slot in free[: len(waiting)]}
        running |= fresh
        if fresh:
            decoder.admit({slot: every[index] for slot, index in fresh.items()})
        for slot, tokens in decoder.decode().items():
            ids[running[slot]] += [token.id for token in tokens]
        for slot, index in list(running.items()):
            if len(ids[index]) == every[index].settings.max_new_tokens:
                decoder.release(slot)
                del running[slot]
    return ids


GREEDY = GenerationSection(temperature=0, max_new_tokens=21)


@pytest.mark.parametrize("slots", [1, 3, 9])
def test_graphs_say_what_the_plain_path_and_transformers_say(slots: int) -> None:
    """In float32, base and tuned rows side by side, several rounds through the same graphs."""
    model = adapted(llama())
    every = questions(GREEDY)
    got = answers(StaticCacheDecoder.of(model, slots=slots, length=400), every)
    assert got == answers(StaticCacheDecoder.of(model, slots=slots, length=400, eager=True), every)
    for one, answer in list(zip(every, got, strict=True))[:4]:
        ids = torch.tensor([one.prompt_ids], device="cuda")
        arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 21}
        if one.base:
            with model.disable_adapter():
                wanted = model.generate(input_ids=ids, pad_token_id=0, **arguments)
        else:
            wanted = model.generate(input_ids=ids, pad_token_id=0, **arguments)
        assert answer == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_logprobs_in_bfloat16_and_nf4(slots: int, packed: bool, copies: bool, tmp_path: Any) -> None:
    """Each drawn token's log-probability against transformers' forward pass over the whole text, to rounding."""
    model: Any = llama(torch.bfloat16)
    if packed:
        model.save_pretrained(tmp_path)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    model = adapted(model)
    decoder = StaticCacheDecoder.of(model, slots=slots, length=400, fuse=copies)
    every = questions(GenerationSection(max_new_tokens=10), lengths=LENGTHS[:slots], logprobs=1)
    decoder.admit(dict(enumerate(every)))
    told: dict[int, list[Any]] = {slot: [] for slot in range(slots)}
    while new := decoder.decode():
        for slot, tokens in new.items():
            told[slot] += tokens
    for slot, one in enumerate(every):
        ids = torch.tensor([[*one.prompt_ids, *(token.id for token in told[slot])]], device="cuda")
        with torch.no_grad():
            if one.base:
                with model.disable_adapter():
                    logits = model(ids).logits
            else:
                logits = model(ids).logits
        log_p = logits[0].float().log_softmax(-1)
        wanted = log_p[len(one.prompt_ids) - 1 : -1].gather(1, ids[0, len(one.prompt_ids) :, None])[:, 0]
        got = torch.tensor([token.logprob for token in told[slot]], device="cuda")
        assert len(got) == 10
        assert float((got - wanted).abs().mean()) < 0.1


def test_sampled_answers_are_those_of_the_plain_path() -> None:
    """Same seeds, same draws: in float32 the two differ only where a draw falls within rounding of a border."""
    model = llama()
    settings = GenerationSection(temperature=0.8, min_p=0.02, repetition_penalty=1.1, max_new_tokens=30)
    cut = settings.model_copy(update={"top_k": 50, "top_p": 0.9})
    for chosen in (settings, cut):
        every = questions(chosen)
        graphed, eager = (
            answers(StaticCacheDecoder.of(model, slots=5, length=400, eager=eager), every) for eager in (0, 1)
        )
        assert sum(a == b for a, b in zip(graphed, eager, strict=True)) >= len(every) - 1


def test_released_slots_and_long_cached_texts() -> None:
    """A slot is given away while a burst is under way; texts are longer than one program's share of positions."""
    model = llama()
    every = questions(GREEDY, lengths=(2500, 900, 1300, 5))
    wanted = answers(StaticCacheDecoder.of(model, slots=4, length=3000, eager=True), every)
    decoder = StaticCacheDecoder.of(model, slots=4, length=3000)
    decoder.admit({0: every[3], 1: every[0], 2: every[1]})
    decoder.decode()
    decoder.decode()
    decoder.release(0)
    decoder.admit({0: every[2], 3: every[3]})
    ids: dict[int, list[int]] = {0: [], 3: []}
    while told := decoder.decode():
        for slot in ids:
            ids[slot] += [token.id for token in told.get(slot, [])]
    assert ids == {0: wanted[2], 3: wanted[3]}


def test_dropping_a_decoder_gives_its_memory_back() -> None:
    model = adapted(llama(torch.bfloat16))
    answers(
        StaticCacheDecoder.of(model, slots=4, length=4000), questions(GREEDY)
    )  # libraries keep workspaces of their own
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    decoder = StaticCacheDecoder.of(model, slots=4, length=4000)
    decoder.warm_up()
    answers(decoder, questions(GREEDY))
    assert torch.cuda.memory_allocated() > before
    del decoder
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
