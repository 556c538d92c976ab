"""Sampling against transformers' own logits processors, and the draws against the probabilities."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parley.config import GenerationSection
from parley.inference.interface import DecodeRequest
from parley.inference.sampling import (
    SamplingFeatures,
    advance,
    apply_repetition_penalty,
    inverse_transform,
    output_columns,
    probabilities,
    sample,
    uniform,
    write_logprobs,
)
from parley.inference.slot_state import NUM_SAMPLED, POSITION, RUNNING, SlotState, hash32

CPU = torch.device("cpu")
VOCABULARY = 503
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 0.5},
    {"temperature": 0.9, "top_p": 0.3},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 2.0, "repetition_penalty": 0.8},
    {"temperature": 1.0, "top_p": 1e-4},
]


def asked(seed: int = 0, prompt: tuple[int, ...] = (3, 1, 4, 1, 5), **settings: float) -> DecodeRequest:
    return DecodeRequest(prompt, GenerationSection(**{"min_p": 0.0} | settings), frozenset({9}), seed)


def state_of(every: list[DecodeRequest], tokens: int = 8) -> SlotState:
    state = SlotState.zeros(len(every), VOCABULARY, tokens, CPU)
    state.admit(0, every, 10**6)
    return state


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def processors(one: DecodeRequest) -> LogitsProcessorList:
    """As transformers' generate builds them, in its order (GenerationMixin._get_logits_processor)."""
    settings = one.settings
    made = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature not in (0, 1.0):
        made.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        made.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        made.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        made.append(MinPLogitsWarper(settings.min_p))
    return made


@pytest.mark.parametrize("together", [True, False])
def test_probabilities_are_those_of_transformers(together: bool) -> None:
    """Row by row, whatever the rows beside it ask for."""
    every = [asked(**one) for one in SETTINGS]
    logits = logits_of(len(every))
    for rows in [list(range(len(every)))] if together else [[i] for i in range(len(every))]:
        some = [every[i] for i in rows]
        state = state_of(some)
        p = probabilities(apply_repetition_penalty(logits[rows], state), state, SamplingFeatures.of(some))
        for i, row in enumerate(rows):
            prompt = torch.tensor([every[row].prompt_ids])
            wanted = processors(every[row])(prompt, logits[row : row + 1].clone()).softmax(-1)[0]
            got = p[i] / p[i].sum()
            assert torch.equal(got > 0, wanted > 0), SETTINGS[row]
            torch.testing.assert_close(got, wanted)


def test_order_is_the_one_generate_builds() -> None:
    """The list above is in the order of transformers' own generate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    one = asked(**SETTINGS[5])
    config = GenerationConfig(do_sample=True, **one.settings.model_dump(exclude={"max_new_tokens", "seed"}))
    built = model._get_logits_processor(config, input_ids_seq_length=5)
    assert [type(processor) for processor in built] == [type(processor) for processor in processors(one)]


def test_greedy_rows_take_the_likeliest_token_after_the_penalty() -> None:
    every = [asked(temperature=0, repetition_penalty=2.0), asked(temperature=0), asked(temperature=1.0, top_k=3)]
    logits = logits_of(3)
    logits[:2, 4] = logits.max() + 1  # said before: loses its lead in the first row
    state = state_of(every)
    got = sample(logits, state, SamplingFeatures.of(every))
    assert got[0] == processors(every[0])(torch.tensor([every[0].prompt_ids]), logits[:1].clone()).argmax()
    assert got[0] != 4
    assert got[1] == 4
    assert got[2] in logits[2].topk(3).indices


def test_draws_follow_the_probabilities() -> None:
    """Chi-squared over 20,000 draws of rows that differ in seed and in place."""
    p = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.0999, 0.0001, 0.0])
    state = state_of([asked(seed) for seed in range(200)])
    counts = torch.zeros(len(p))
    for place in range(100):
        state.ints(NUM_SAMPLED).fill_(place)
        counts += torch.bincount(inverse_transform(p.repeat(200, 1), uniform(state)), minlength=len(p))
    assert counts[[1, 6]].sum() == 0
    merged = torch.tensor([*counts[[0, 2, 3]], counts[4] + counts[5]])
    wanted = torch.tensor([0.4, 0.3, 0.2, 0.1]) * 20_000
    assert float(((merged - wanted) ** 2 / wanted).sum()) < 16.3  # p = 0.001 with 3 degrees of freedom


def test_draws_are_even_and_independent_over_seeds_and_places() -> None:
    seeds = 400
    state = state_of([asked(seed) for seed in range(seeds)])
    drawn = []
    for place in range(100):
        state.ints(NUM_SAMPLED).fill_(place)
        drawn.append(uniform(state))
    u = torch.stack(drawn, dim=1)  # (seeds, places)
    assert ((u >= 0) & (u < 1)).all()
    even = (torch.arange(u.numel()) + 0.5) / u.numel()
    assert float((u.flatten().sort().values - even).abs().max()) < 1.95 / u.numel() ** 0.5  # Kolmogorov, p = 0.001
    for first, second in [(u[:, :-1], u[:, 1:]), (u[:-1], u[1:]), (u[:-1, :-1], u[1:, 1:])]:
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 4 / first.numel() ** 0.5


def test_a_draw_never_takes_what_has_no_probability() -> None:
    p = torch.tensor([[0.0, 0.0, 1e-3, 0.0, 1e-30, 0.0]])
    for u in (0.0, 0.5, 1 - 2.0**-23):
        assert p[0, inverse_transform(p, torch.tensor([u]))] > 0


def test_large_seeds_count_to_their_last_bit() -> None:
    state = state_of([asked(seed) for seed in (1, 1 + 2**40, 2**63 + 1, 0, 2**32)])
    assert len(set(uniform(state).tolist())) == 5


def test_rows_stop_at_an_end_or_their_limit_and_dead_rows_stay() -> None:
    every = [asked(temperature=0, max_new_tokens=3), asked(temperature=0), asked(temperature=0, max_new_tokens=3)]
    state = state_of(every, tokens=2)
    features = SamplingFeatures.of(every)
    for tokens in ([5, 5, 6], [6, 9, 7], [7, 1, 8], [8, 2, 2]):
        advance(torch.tensor(tokens), state, features)
    assert state.ints(NUM_SAMPLED).tolist() == [3, 2, 3]
    assert state.ints(RUNNING).tolist() == [0, 0, 0]
    assert state.ints(POSITION).tolist() == [4 + 3, 4 + 2, 4 + 3]
    assert state.token_BU[2].tolist()[0] == 8


def test_logprobs_are_the_models_own() -> None:
    every = [asked(temperature=0.3, top_k=2)]
    state, logits = state_of(every), logits_of(1)
    token = sample(logits, state, SamplingFeatures.of(every))
    write_logprobs(logits, token, output_columns(state), state)
    wanted = logits.log_softmax(-1)[0]
    assert state.logprob_BU[0, 0] == pytest.approx(float(wanted[token]))
    assert state.top_BUA[0, 0, :3].tolist() == wanted.topk(3).indices.tolist()
    assert state.top_logprob_BUA[0, 0, 0] == pytest.approx(float(wanted.max()))


def test_the_hash_of_a_seed_is_a_bijection_that_the_samples_share() -> None:
    numbers = [*range(2**14), *range(2**32 - 2**14, 2**32)]
    assert len({hash32(number) for number in numbers}) == len(numbers)
    state = state_of([asked(0)])
    state.fields_BX[0, 6] = 12345  # the field SEED
    state.ints(NUM_SAMPLED).fill_(7)
    assert float(uniform(state)[0]) == (hash32(12352) >> 9) / 2**23
