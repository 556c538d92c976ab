from __future__ import annotations

import copy
import gc
import itertools
import logging
import threading
import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from parley.config import GenerationSection
from parley.data.render import render_prompt
from parley.errors import DataError, ModelError
from parley.inference.chat import ChatSession
from parley.inference.generate import Generator, end_of_turn_ids, generate, inference_mode_of, make_decoder, stream
from parley.inference.interface import DecodeRequest

GREEDY = GenerationSection(temperature=0, max_new_tokens=12)
QUESTIONS = [
    "Ahoy!",
    "What be the colour of the sea on a clear morning?",
    "How many apples are in the basket? " * 3,
]
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    return tiny_tokenizer


@pytest.fixture
def model(tiny_llama_folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder)


def greedy_ids(model: Any, prompt: list[int], steps: int) -> list[int]:
    """The likeliest tokens, the whole text read anew for each: no cache, no padding, no `generate`."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, ids))


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_greedy_answers_are_the_models_likeliest_tokens_alone_and_in_a_batch(
    model: Any, tokenizer: Any, engine: Any
) -> None:
    ends = end_of_turn_ids(model, tokenizer)
    expected = [
        tokenizer.decode(
            until_end(greedy_ids(model.eval(), render_prompt(tokenizer, messages), 12), ends),
            skip_special_tokens=True,
        )
        for messages in CONVERSATIONS
    ]
    assert len(set(expected)) > 1
    assert generate(model, tokenizer, CONVERSATIONS, GREEDY, engine=engine) == expected
    assert generate(model, tokenizer, CONVERSATIONS, GREEDY, batch_size=2, engine=engine) == expected
    assert [generate(model, tokenizer, [messages], GREEDY, engine=engine)[0] for messages in CONVERSATIONS] == expected
    assert [
        "".join(stream(model, tokenizer, messages, GREEDY, engine=engine)) for messages in CONVERSATIONS
    ] == expected


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3", "phi3", "starcoder2"])
def test_a_batch_answers_as_its_rows_alone_in_other_families(build_family: Any, family: str) -> None:
    folder = build_family(family)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    alone = [generate(model, tokenizer, [messages], GREEDY)[0] for messages in CONVERSATIONS]
    assert generate(model, tokenizer, CONVERSATIONS, GREEDY) == alone


def test_no_conversations_no_answers(model: Any, tokenizer: Any) -> None:
    assert generate(model, tokenizer, [], GREEDY) == []


def test_an_answer_is_generated_with_the_cache(model: Any, tokenizer: Any) -> None:
    widths = []
    model.config.use_cache = False  # as trainers leave it
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    generate(model, tokenizer, CONVERSATIONS[:1], GREEDY, engine="plain")
    assert len(widths) > 1
    assert widths[1:] == [1] * (len(widths) - 1)
    assert model.config.use_cache is False


def test_every_end_of_turn_token_stops(model: Any, tokenizer: Any) -> None:
    ids = greedy_ids(model.eval(), render_prompt(tokenizer, CONVERSATIONS[1]), 12)
    stop = next(token for i, token in enumerate(ids) if i > 2 and token not in ids[:i])
    model.generation_config.eos_token_id = [5, stop]
    expected = tokenizer.decode(ids[: ids.index(stop) + 1], skip_special_tokens=True)
    assert generate(model, tokenizer, [CONVERSATIONS[1]], GREEDY) == [expected]
    assert "".join(stream(model, tokenizer, CONVERSATIONS[1], GREEDY)) == expected


def test_ends_are_the_checkpoints_the_tokenizers_and_the_templates(model: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|end_of_text|>"
    model.generation_config.eos_token_id = 7
    named = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert end_of_turn_ids(model, tokenizer) == sorted({7, *named})


def test_a_checkpoints_sampling_defaults_stay_out(model: Any, tokenizer: Any) -> None:
    plain = generate(model, tokenizer, CONVERSATIONS, GREEDY)
    model.generation_config.update(
        do_sample=True,
        temperature=0.6,
        top_p=0.2,
        top_k=3,
        min_p=0.5,
        repetition_penalty=1.7,
        max_new_tokens=2,
    )
    for engine in ("auto", "plain"):
        assert generate(model, tokenizer, CONVERSATIONS, GREEDY, engine=engine) == plain


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_transformers_has_nothing_to_warn_about(
    model: Any,
    tokenizer: Any,
    temperature: float,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    transformers_logging.warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        generate(model, tokenizer, CONVERSATIONS, GenerationSection(temperature=temperature, max_new_tokens=4))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_seed_repeats_answers_and_leaves_the_random_state_alone(model: Any, tokenizer: Any, engine: Any) -> None:
    settings = GenerationSection(seed=3, max_new_tokens=12)
    state = torch.random.get_rng_state()
    first = generate(model, tokenizer, CONVERSATIONS, settings, engine=engine)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate(model, tokenizer, CONVERSATIONS, settings, engine=engine) == first
    assert (
        generate(model, tokenizer, CONVERSATIONS, GenerationSection(seed=4, max_new_tokens=12), engine=engine) != first
    )
    streamed = "".join(stream(model, tokenizer, CONVERSATIONS[0], settings, engine=engine))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "".join(stream(model, tokenizer, CONVERSATIONS[0], settings, engine=engine)) == streamed
    assert streamed == first[0]


def test_the_model_is_left_as_it_was_found(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[0].eval()  # a part that training keeps frozen
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(module.training))
    generate(model, tokenizer, CONVERSATIONS, GREEDY)
    list(stream(model, tokenizer, CONVERSATIONS[0], GREEDY))
    assert [module.training for module in model.modules()] == modes
    generate(model, tokenizer, CONVERSATIONS, GREEDY, engine="plain")
    list(stream(model, tokenizer, CONVERSATIONS[0], GREEDY, engine="plain"))
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    with pytest.raises(RuntimeError, match="out of the block"), inference_mode_of(model):
        raise RuntimeError("out of the block")
    assert [module.training for module in model.modules()] == modes


def test_answers_end_where_the_context_does(model: Any, tokenizer: Any) -> None:
    lengths = [len(render_prompt(tokenizer, messages)) for messages in CONVERSATIONS]
    whole = generate(model, tokenizer, CONVERSATIONS, GREEDY)
    model.config.max_position_embeddings = lengths[2] + 3
    cut = generate(model, tokenizer, CONVERSATIONS, GREEDY)
    assert cut[:2] == whole[:2]  # the long row's end is not theirs
    assert whole[2].startswith(cut[2].rstrip("\ufffd"))  # half a character
    assert len(cut[2]) < len(whole[2])

    model.config.max_position_embeddings = lengths[2]
    for ask in (
        lambda: generate(model, tokenizer, CONVERSATIONS, GREEDY),
        lambda: stream(model, tokenizer, CONVERSATIONS[2], GREEDY),
    ):
        with pytest.raises(DataError, match=rf"is {lengths[2]} tokens and the model's context is {lengths[2]}"):
            ask()


def test_streamed_pieces_join_to_the_answer(model: Any, tokenizer: Any) -> None:
    for messages in CONVERSATIONS:
        pieces = list(stream(model, tokenizer, messages, GREEDY))
        assert "".join(pieces) == generate(model, tokenizer, [messages], GREEDY)[0]
        assert all(pieces)


def test_an_error_while_streaming_is_raised_where_it_is_read(model: Any, tokenizer: Any) -> None:
    calls = itertools.count()

    def fail(module: Any, args: Any) -> None:
        if next(calls) == 4:
            raise RuntimeError("the device is gone")

    model.register_forward_pre_hook(fail)
    model.train()
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(stream(model, tokenizer, CONVERSATIONS[0], GREEDY, engine="plain"))
    assert model.training
    assert streaming_threads() == []


@pytest.mark.parametrize("answers", [Generator.answers, Generator.answers_or_errors])
def test_a_fault_while_answering_is_raised_and_no_text(model: Any, tokenizer: Any, answers: Any) -> None:
    """Errors that are returned are the user's own, as a prompt that is too long; a fault is not one of them."""
    calls = itertools.count()

    def fail(module: Any, args: Any) -> None:
        if next(calls) == 4:
            raise RuntimeError("the device is gone")

    model.register_forward_pre_hook(fail)
    with (
        Generator(model, tokenizer, engine="plain") as generator,
        pytest.raises(RuntimeError, match="the device is gone"),
    ):
        list(answers(generator, CONVERSATIONS, GREEDY))
    assert streaming_threads() == []


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_an_abandoned_stream_stops_the_model(model: Any, tokenizer: Any, leave: str) -> None:
    steps = []
    model.register_forward_pre_hook(lambda module, args: (steps.append(1), time.sleep(0.005))[0])
    model.generation_config.eos_token_id = None
    pieces = stream(model, tokenizer, CONVERSATIONS[0], GenerationSection(seed=1, max_new_tokens=400), engine="plain")
    next(pieces)
    if leave == "close":
        pieces.close()
    else:
        del pieces
        gc.collect()
    taken = len(steps)
    time.sleep(0.05)
    assert len(steps) == taken < 400
    assert streaming_threads() == []


def streaming_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("parley-scheduler")]


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_an_answer_ends_before_a_stop_string(model: Any, tokenizer: Any, engine: Any) -> None:
    whole = generate(model, tokenizer, CONVERSATIONS[:1], GREEDY)[0]
    stop = whole[4:6]
    settings = GREEDY.model_copy(update={"stop": [stop]})
    assert generate(model, tokenizer, CONVERSATIONS[:1], settings, engine=engine) == [whole[: whole.index(stop)]]
    assert "".join(stream(model, tokenizer, CONVERSATIONS[0], settings, engine=engine)) == whole[: whole.index(stop)]


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_an_answer_ends_at_a_stop_string_that_is_a_control_token(model: Any, tokenizer: Any, engine: Any) -> None:
    """The model writes the control token as its third one; the text never holds it."""
    ids = greedy_ids(model.eval(), render_prompt(tokenizer, CONVERSATIONS[1]), 12)
    control = tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    assert control not in [*ids, *end_of_turn_ids(model, tokenizer)]
    head = model.get_output_embeddings()
    model.config.tie_word_embeddings = False
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    head.weight.data[[control, ids[2]]] = head.weight.data[[ids[2], control]]
    before = tokenizer.decode(ids[:2], skip_special_tokens=True)
    settings = GREEDY.model_copy(update={"stop": ["<|finetune_right_pad_id|>"]})
    assert generate(model, tokenizer, [CONVERSATIONS[1]], settings, engine=engine) == [before]
    assert len(generate(model, tokenizer, [CONVERSATIONS[1]], GREEDY, engine=engine)[0]) > len(before)
    with pytest.raises(DataError, match="would never match"):
        generate(
            model, tokenizer, [CONVERSATIONS[1]], GREEDY.model_copy(update={"stop": ["<|eot_id|>!"]}), engine=engine
        )


def test_more_questions_than_slots_come_back_with_their_numbers(model: Any, tokenizer: Any) -> None:
    asked = CONVERSATIONS * 3
    expected = generate(model, tokenizer, asked, GREEDY)
    with Generator(model, tokenizer, slots=2) as generator:
        finished = list(generator.answers(asked, GREEDY))
        assert generator.plain_because is None
        assert sorted(finished) == list(enumerate(expected))
        again = generator.answers(asked, GREEDY)
        next(again)
        again.close()  # nobody waits for the others
        assert "".join(generator.stream(CONVERSATIONS[1], GREEDY)) == expected[1]
    assert streaming_threads() == []


def test_room_grows_with_the_conversation(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parley.inference.generate.MIN_LENGTH", 32)
    with Generator(model, tokenizer, slots=1) as generator:
        for messages in CONVERSATIONS:
            alone = generate(model, tokenizer, [messages], GREEDY, engine="plain")[0]
            assert "".join(generator.stream(messages, GREEDY)) == alone


def test_base_answers_through_the_same_decoder_and_where_there_is_none_is_said(model: Any, tokenizer: Any) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    of_base = generate(model, tokenizer, CONVERSATIONS, GREEDY)
    for engine in ("auto", "plain"):
        with pytest.raises(ModelError, match="no adapter"):
            generate(model, tokenizer, CONVERSATIONS, GREEDY, base=True, engine=engine)
    tuned = get_peft_model(model, lora)
    assert generate(tuned, tokenizer, CONVERSATIONS, GREEDY) != of_base
    assert generate(tuned, tokenizer, CONVERSATIONS, GREEDY, base=True) == of_base
    assert generate(tuned, tokenizer, CONVERSATIONS, GREEDY, base=True, engine="plain") == of_base
    with tuned.disable_adapter():  # how PEFT switches it off
        assert generate(tuned, tokenizer, CONVERSATIONS, GREEDY) == of_base


def test_families_that_the_fast_decoder_does_not_know_say_why(build_family: Any) -> None:
    folder = build_family("starcoder2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with Generator(model, tokenizer) as generator:
        answers = dict(generator.answers(CONVERSATIONS, GREEDY))
        assert "starcoder2" in str(generator.plain_because)
        assert "".join(generator.stream(CONVERSATIONS[0], GREEDY)) == answers[0]


def test_one_conversation_that_cannot_be_answered_does_not_keep_the_others(model: Any, tokenizer: Any) -> None:
    too_long = [{"role": "user", "content": "What be the sea? " * 2000}]
    conversations = [CONVERSATIONS[0], too_long, CONVERSATIONS[1]]
    expected = generate(model, tokenizer, CONVERSATIONS[:2], GREEDY)
    with Generator(model, tokenizer, slots=2) as generator:
        answers = dict(generator.answers_or_errors(conversations, GREEDY))
        assert [answers[0], answers[2]] == expected
        assert isinstance(answers[1], DataError)
        assert "model's context is" in str(answers[1])
        with pytest.raises(DataError, match="model's context is"):
            generator.answers(conversations, GREEDY)


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(
    "lora",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["norm"]},
        {"trained_norms": True},
    ],
    ids=str,
)
def test_the_base_is_the_untouched_model_or_is_refused(model: Any, tokenizer: Any, lora: Any, engine: Any) -> None:
    lora = dict(lora)
    trained_norms = lora.pop("trained_norms", False)
    untouched = generate(copy.deepcopy(model), tokenizer, CONVERSATIONS, GREEDY)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **lora))
    for name, parameter in tuned.named_parameters():
        if trained_norms and name.endswith("norm.weight"):
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    session = ChatSession(tuned, tokenizer, GREEDY, engine=engine)
    try:
        answers = generate(tuned, tokenizer, CONVERSATIONS, GREEDY, base=True, engine=engine)
        session.use_base = True
        answers[:1] = ["".join(session.say(QUESTIONS[0]))]
    except ModelError:
        with pytest.raises(ModelError, match=r"\Athe base model cannot answer: .*\Z"):
            session.use_base = True
        decoder = make_decoder(tuned.eval(), slots=1, length=64)
        with pytest.raises(ModelError, match="the base model cannot answer"):
            decoder.admit({0: DecodeRequest([5], GREEDY, frozenset(), 0, base=True)})
    else:
        assert answers == untouched
