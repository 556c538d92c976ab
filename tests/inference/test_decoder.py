"""The decoder's plain path against transformers' own generate, and what slots promise each other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from parley.config import GenerationSection
from parley.data.render import render_prompt
from parley.errors import DataError, UsageError
from parley.evaluation.demo_scoring import heldout_questions
from parley.inference.cpu.runner import EagerRunner
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.generate import end_of_turn_ids
from parley.inference.interface import Decoder, DecodeRequest, Token
from parley.inference.slot_state import RunningRequest
from parley.inference.step_runner import InFlightSteps, StepOutputs
from parley.models.demo import demo_model_path
from parley.train_step.bind import Unsupported

KNOWN = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "smollm3", "olmo2"]
PROMPTS = [[5], [9, 8, 7, 6], list(range(10, 60)), [3] * 20, [200, 100, 300, 50, 25]]


def adapted(model: Any, seed: int = 0, **lora: Any) -> PeftModel:
    """With an adapter that says something."""
    torch.manual_seed(seed)
    targets = lora.pop("target_modules", "all-linear")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return model.eval()


def load(folder: Path, family: str = "llama") -> Any:
    settings: dict[str, Any] = {}
    if family in ("mistral", "gemma2", "gemma3"):
        settings["sliding_window"] = 16  # shorter than the prompts
    if family == "gemma2":  # transformers 5.17 would take an attention without soft caps
        settings["attn_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def llama(build_family: Callable[[str], Path]) -> Any:
    return load(build_family("llama"))


def ask(
    prompt: Sequence[int], *, ends: Sequence[int] = (), seed: int = 0, base: bool = False, **settings: Any
) -> DecodeRequest:
    chosen: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12} | settings
    logprobs = chosen.pop("logprobs", None)
    return DecodeRequest(prompt, GenerationSection(**chosen), frozenset(ends), seed, base, logprobs)


def collect(decoder: Decoder) -> dict[int, list[Token]]:
    """All tokens of each slot until none is drawing."""
    tokens: dict[int, list[Token]] = {}
    while told := decoder.decode():
        for slot, new in told.items():
            tokens.setdefault(slot, []).extend(new)
    return tokens


def answers(decoder: Decoder, every: Sequence[DecodeRequest]) -> list[list[int]]:
    """The answers' ids, in order, with finished slots filled again as they come free."""
    waiting, slot_of, ids = list(enumerate(every)), {}, [[] for _ in every]  # type: ignore[var-annotated]
    free = list(range(decoder.slots))
    while waiting or slot_of:
        fresh = [waiting.pop(0) for _ in range(min(len(free), len(waiting)))]
        if fresh:
            placed = {free.pop(0): one for one in fresh}
            slot_of |= {slot: index for slot, (index, _) in placed.items()}
            decoder.admit({slot: one for slot, (_, one) in placed.items()})
        told = decoder.decode()
        for slot, new in told.items():
            ids[slot_of[slot]] += [token.id for token in new]
        for slot, index in list(slot_of.items()):
            one, got = every[index], ids[index]
            if slot not in told or got[-1] in one.stop_ids or len(got) == one.settings.max_new_tokens:
                decoder.release(slot)
                free.append(slot)
                del slot_of[slot]
    return ids


def transformers_greedy(model: Any, prompt: Sequence[int], ends: Sequence[int] = (), tokens: int = 12) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=list(ends) or None, pad_token_id=0)
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", KNOWN)
def test_greedy_is_transformers_greedy_for_every_family(family: str, build_family: Callable[[str], Path]) -> None:
    """Alone and five at a time, base and tuned rows side by side, without reloading."""
    base = load(build_family(family), family)
    wanted_base = [transformers_greedy(base, prompt) for prompt in PROMPTS]
    model = adapted(base)
    wanted = [transformers_greedy(model, prompt) for prompt in PROMPTS]
    assert wanted != wanted_base
    decoder = StaticCacheDecoder.of(model, slots=10, length=100)
    decoder.warm_up()
    assert answers(decoder, [ask(prompt) for prompt in PROMPTS]) == wanted
    both = [ask(prompt, base=base) for prompt in PROMPTS for base in (False, True)]
    got = answers(decoder, both)
    assert got[::2] == wanted
    assert got[1::2] == wanted_base
    alone = StaticCacheDecoder.of(model, slots=1, length=100)
    assert answers(alone, [ask(prompt) for prompt in PROMPTS]) == wanted
    assert answers(alone, [ask(prompt, base=True) for prompt in PROMPTS]) == wanted_base


def test_greedy_over_the_embedded_model_s_questions() -> None:
    """Real answers with real ends, alone and in a batch whose slots are filled again."""
    folder = demo_model_path()
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    ends = end_of_turn_ids(model, tokenizer)
    prompts = [render_prompt(tokenizer, question.messages) for question in heldout_questions()[:40]]
    wanted = [transformers_greedy(model, prompt, ends, 60) for prompt in prompts]
    assert sum(answer[-1] in ends for answer in wanted) > 30
    for slots in (1, 7):
        decoder = StaticCacheDecoder.of(model, slots=slots, length=400)
        assert answers(decoder, [ask(prompt, ends=ends, max_new_tokens=60) for prompt in prompts]) == wanted


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["gate_proj"]])
def test_adapters_on_some_projections(build_family: Callable[[str], Path], targets: list[str]) -> None:
    model = adapted(load(build_family("llama")), target_modules=targets, lora_dropout=0.5, use_rslora=True)
    decoder = StaticCacheDecoder.of(model, slots=4, length=100, fuse=False)
    wanted = [transformers_greedy(model, prompt) for prompt in PROMPTS]
    assert answers(decoder, [ask(prompt) for prompt in PROMPTS]) == wanted


def test_nf4_weights_answer_as_their_unpacked_values_do(build_family: Callable[[str], Path], tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    shape = AutoConfig.from_pretrained(build_family("llama"), intermediate_size=128)  # rows of whole blocks
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    plain = load(tmp_path)
    for name, parameter in packed.named_parameters():
        if parameter.dtype == torch.uint8:
            plain.get_parameter(name).data = dequantize_4bit(parameter.data, parameter.quant_state)
    wanted = [transformers_greedy(plain, prompt) for prompt in PROMPTS]
    assert wanted != [transformers_greedy(load(tmp_path), prompt) for prompt in PROMPTS]
    for copies in (True, False):
        decoder = StaticCacheDecoder.of(packed, slots=2, length=100, fuse=copies)
        assert answers(decoder, [ask(prompt) for prompt in PROMPTS]) == wanted


@pytest.mark.parametrize("fuse", [True, False])
def test_weights_are_copied_where_asked_and_where_memory_allows(
    llama: Any, fuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies() -> set[tuple[bool, bool]]:
        model = StaticCacheDecoder.of(llama, slots=1, length=20, fuse=fuse).model
        fused = all(x.weight_NK is not None for layer in model.linears for x in layer.all)
        return {(fused, x.packed is not None) for x in (model.head, *(x for layer in model.linears for x in layer.all))}

    onednn = torch.backends.mkldnn.is_available()
    assert copies() == {(fuse, fuse and onednn)}
    fused_bytes = sum(
        x.weight_bytes
        for layer in StaticCacheDecoder.of(llama, slots=1, length=20, fuse=False).model.linears
        for x in layer.all
        if x.weight_NK is None
    )
    for free, allowed in ((1000, False), (2 * fused_bytes, False), (2 * fused_bytes + 2, True)):
        monkeypatch.setattr("parley.inference.linear._free_bytes", lambda device, free=free: free)
        assert copies() == {(fuse and allowed, False)}  # the packed copies, of all weights, take more


def test_a_seeded_answer_does_not_depend_on_its_neighbours(llama: Any) -> None:
    settings = {"temperature": 1.0, "max_new_tokens": 20}
    every = [ask(prompt, seed=seed, **settings) for seed, prompt in enumerate(PROMPTS)]
    alone = [answers(StaticCacheDecoder.of(llama, slots=1, length=100), [one])[0] for one in every]
    crowd = [*every, ask([7, 7], temperature=0.5, top_k=3, max_new_tokens=30), ask([1, 2], repetition_penalty=1.5)]
    assert answers(StaticCacheDecoder.of(llama, slots=3, length=100), crowd)[:5] == alone
    assert len({tuple(answer) for answer in alone}) == 5
    again = [ask(PROMPTS[0], seed=seed, **settings) for seed in (0, 1)]
    assert answers(StaticCacheDecoder.of(llama, slots=2, length=100), again)[0] == alone[0]
    assert answers(StaticCacheDecoder.of(llama, slots=2, length=100), again)[1] != alone[0]


def test_repetition_penalty_counts_prompt_and_answer_as_transformers_does(llama: Any) -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=25, repetition_penalty=1.6, pad_token_id=0)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        wanted = llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        decoder = StaticCacheDecoder.of(llama, slots=2, length=100)
        got = answers(decoder, [ask(PROMPTS[3]), ask(prompt, max_new_tokens=25, repetition_penalty=1.6)])
        assert got[1] == wanted[0, len(prompt) :].tolist()


def test_an_answer_stops_at_an_end_its_limit_or_where_its_room_is_full(llama: Any) -> None:
    likeliest = transformers_greedy(llama, PROMPTS[1], tokens=12)
    end = likeliest[4]
    stop = likeliest.index(end) + 1
    decoder = StaticCacheDecoder.of(llama, slots=4, length=len(PROMPTS[1]) + 9)
    got = answers(decoder, [ask(PROMPTS[1], ends=[end]), ask(PROMPTS[1], max_new_tokens=3), ask(PROMPTS[1])])
    assert got == [likeliest[:stop], likeliest[:3], likeliest[:9]]


def test_released_slots_say_no_more_and_their_neighbours_go_on(llama: Any) -> None:
    wanted = [transformers_greedy(llama, prompt) for prompt in PROMPTS]
    decoder = StaticCacheDecoder.of(llama, slots=5, length=100)
    decoder.admit({slot: ask(prompt) for slot, prompt in enumerate(PROMPTS)})
    first = decoder.decode()
    decoder.release(0)
    decoder.release(3)
    decoder.admit({3: ask(PROMPTS[0])})
    rest = collect(decoder)
    assert 0 not in rest
    for slot in (1, 2, 4):
        assert [token.id for token in [*first[slot], *rest[slot]]] == wanted[slot]
    assert [token.id for token in rest[3]] == wanted[0]
    decoder.release(3)  # over already
    assert decoder.decode() == {}


@pytest.mark.parametrize("family", KNOWN)
def test_what_stands_in_the_cache_is_not_read_again(
    family: str, build_family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next turn of a chat, another chat that begins alike, and the other voice, which shares nothing."""
    model = adapted(load(build_family(family), family))
    decoder = StaticCacheDecoder.of(model, slots=3, length=200)
    known: list[list[int]] = []
    prefill: Any = decoder.runner._prefill
    forward = prefill._forward
    monkeypatch.setattr(prefill, "_forward", lambda *arguments: known.append(arguments[-1]) or forward(*arguments))
    turn = list(range(10, 60))
    decoder.admit({0: ask(turn)})
    said = [token.id for token in collect(decoder)[0]]
    later = [ask([*turn, *said, 3, 4, 5]), ask([*turn, 99]), ask([*turn, *said, 3, 4, 5], base=True)]
    for slot, asked in enumerate(later):
        decoder.admit({slot: asked})
    assert known == [[0], [len(turn) + len(said) - 1], [len(turn)], [0]]
    wanted = [answers(StaticCacheDecoder.of(model, slots=1, length=200), [asked])[0] for asked in later]
    told = collect(decoder)
    assert [[token.id for token in told[slot]] for slot in range(3)] == wanted


class Ahead(EagerRunner):
    """Works as graphs do, on a CPU: eight steps per launch, one launch in flight while another is read."""

    max_steps, launches_ahead = 8, 1

    def launch(self, running: list[RunningRequest], steps: int) -> InFlightSteps:
        outputs = super().launch(running, steps).outputs
        copies = [tensor.clone() for tensor in vars(outputs).values() if tensor is not None]
        return InFlightSteps(running, StepOutputs(*copies))


class FirstTokenLater(Ahead):
    """Leaves a prompt's last token to the first step, and keeps no prefixes, as graphs do."""

    def __init__(self, decoder: StaticCacheDecoder) -> None:
        super().__init__(decoder.model, decoder.cache, decoder.state)
        self.launched: list[int] = []

    def prefill(self, requests: Sequence[DecodeRequest], start: int) -> int:
        for row, request in enumerate(requests, start):
            if len(request.prompt_ids) > 1:
                self.prefixes.clear()
                self._prefill([replace(request, prompt_ids=request.prompt_ids[:-1])], row)
        return 0

    def launch(self, running: list[RunningRequest], steps: int) -> InFlightSteps:
        self.launched.append(steps)
        return super().launch(running, steps)

    def emitted(self, row: int, ids: Sequence[int]) -> None:
        pass


def ahead(decoder: StaticCacheDecoder, *, first_token_later: bool = False) -> StaticCacheDecoder:
    if first_token_later:
        decoder.runner = FirstTokenLater(decoder)
    else:
        decoder.runner = Ahead(decoder.model, decoder.cache, decoder.state)
    return decoder


@pytest.mark.parametrize("first_token_later", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_steps_in_flight_change_no_answer(llama: Any, slots: int, first_token_later: bool) -> None:
    """Answers of different lengths, so that rows move while steps in flight still know them elsewhere."""
    lengths = (1, 30, 9, 8, 17, 25, 3, 11, 2, 40, 16, 5, 7, 6, 10)
    every = [
        ask(prompt, max_new_tokens=tokens, seed=tokens, temperature=temperature)
        for prompt, tokens, temperature in zip(PROMPTS * 3, lengths, [0, 1.0, 0] * 5, strict=True)
    ]
    wanted = answers(StaticCacheDecoder.of(llama, slots=1, length=100), every)
    decoder = ahead(StaticCacheDecoder.of(llama, slots=slots, length=100), first_token_later=first_token_later)
    assert answers(decoder, every) == wanted


def test_a_first_token_does_not_wait_for_several_steps(llama: Any) -> None:
    decoder = ahead(StaticCacheDecoder.of(llama, slots=2, length=100), first_token_later=True)
    decoder.admit({0: ask(PROMPTS[1], max_new_tokens=30)})
    assert len(decoder.decode()[0]) == 1
    assert len(decoder.decode()[0]) == 8
    decoder.admit({1: ask(PROMPTS[2], max_new_tokens=30)})
    decoder.decode()
    assert decoder.runner.launched[:2] == [1, 8]  # type: ignore[attr-defined]
    assert decoder.runner.launched[3] == 1  # type: ignore[attr-defined]


def test_a_slot_given_away_hears_nothing_of_its_last_answer(llama: Any) -> None:
    wanted = [transformers_greedy(llama, prompt, tokens=30) for prompt in PROMPTS]
    decoder = ahead(StaticCacheDecoder.of(llama, slots=3, length=100))
    decoder.admit({slot: ask(PROMPTS[slot], max_new_tokens=30) for slot in range(3)})
    first = decoder.decode()
    decoder.release(0)
    decoder.admit({0: ask(PROMPTS[3], max_new_tokens=30)})
    rest = collect(decoder)
    assert [token.id for token in rest[0]] == wanted[3]
    for slot in (1, 2):
        assert [token.id for token in [*first[slot], *rest[slot]]] == wanted[slot]


def test_logprobs_are_the_models_own_whatever_is_drawn(llama: Any) -> None:
    decoder = StaticCacheDecoder.of(llama, slots=2, length=100)
    decoder.admit({0: ask(PROMPTS[1], temperature=1.5, top_k=5, logprobs=3), 1: ask(PROMPTS[1])})
    told = collect(decoder)
    ids = [*PROMPTS[1], *(token.id for token in told[0])]
    with torch.no_grad():
        log_p = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, token in enumerate(told[0]):
        row = log_p[len(PROMPTS[1]) - 1 + place]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [id_ for id_, _ in token.top] == row.topk(3).indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert all(token.logprob is None and token.top == () for token in told[1])


def test_what_does_not_fit_is_refused_before_anything_is_admitted(llama: Any) -> None:
    decoder = StaticCacheDecoder.of(llama, slots=2, length=20)
    with pytest.raises(DataError, match="the prompt is 20 tokens and an answer's slot holds 20"):
        decoder.admit({0: ask([1]), 1: ask([1] * 20)})
    with pytest.raises(UsageError, match="17 tokens that end an answer"):
        decoder.admit({0: ask([1], ends=range(17))})
    assert decoder.decode() == {}
    assert answers(decoder, [ask([1] * 19)])[0] == transformers_greedy(llama, [1] * 19, tokens=1)


def test_a_slot_is_no_longer_than_the_models_positions(llama: Any) -> None:
    assert StaticCacheDecoder.of(llama, slots=1, length=10**6).length == llama.config.max_position_embeddings


def test_families_it_does_not_know_are_refused_by_name(build_family: Callable[[str], Path]) -> None:
    with pytest.raises(Unsupported, match="starcoder2"):
        StaticCacheDecoder.of(load(build_family("starcoder2")), slots=1, length=20)
    model = adapted(load(build_family("llama")), modules_to_save=["lm_head"])
    with pytest.raises(Unsupported, match="lm_head"):
        StaticCacheDecoder.of(model, slots=1, length=20)


def test_a_decoder_leaves_the_model_as_it_was_and_goes_when_dropped(build_family: Callable[[str], Path]) -> None:
    """It may be made in the middle of training: gradients and addresses stay."""
    model = adapted(load(build_family("llama"))).train()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    decoder = StaticCacheDecoder.of(model, slots=2, length=100)
    answers(decoder, [ask(PROMPTS[1])])
    gone = weakref.ref(decoder.cache)
    del decoder
    gc.collect()
    assert gone() is None
    assert model.training
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    model(torch.tensor([PROMPTS[1]]), labels=torch.tensor([PROMPTS[1]])).loss.backward()
