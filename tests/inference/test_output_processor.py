from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from parley.errors import DataError
from parley.inference.interface import Token
from parley.inference.output_processor import Detokenizer, OutputChunk, OutputProcessor, control_token_stops
from parley.models.demo import demo_model_path

SAID = "Ahoy, naïve café – 42 °C ☕ 👩‍👩‍👧!\n\n  Two  spaces \ufffd and 漢字."


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def metaspace() -> Any:
    """As Llama 2 writes: a leading space is part of the word and dropped at the beginning; unknown bytes are tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ahoyte.", "▁a", "ho", "▁ho"]
    core = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("h", "o"), ("▁", "ho")], byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def splits(ids: list[int], seed: int) -> Iterator[list[int]]:
    rng, at = random.Random(seed), 0
    while at < len(ids):
        size = rng.choice([1, 1, 2, 5])
        yield ids[at : at + size]
        at += size


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_pieces_joined_are_the_whole_decoded(request: pytest.FixtureRequest, kind: str, seed: int) -> None:
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(seed)
    ids = tokenizer(SAID, add_special_tokens=False)["input_ids"]
    for _ in range(12):  # control tokens and broken characters anywhere
        ids.insert(rng.randrange(len(ids)), rng.choice([*tokenizer.all_special_ids, rng.randrange(len(tokenizer))]))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(some) for some in splits(ids, seed)]
    assert "".join([*pieces, detokenizer.flush()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_no_piece_holds_half_a_character(byte_level: Any) -> None:
    said = "☕👩‍👩‍👧漢字é"
    ids = byte_level(said, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(said)
    detokenizer = Detokenizer(byte_level)
    pieces = [detokenizer.add([token]) for token in ids]
    assert "".join(pieces) == said
    assert all("\ufffd" not in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) == len(said)


def processed(tokenizer: Any, text: str, stops: list[str], seed: int, most: int = 10_000) -> list[OutputChunk]:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    processor = OutputProcessor(tokenizer, frozenset({tokenizer.eos_token_id}), stops, most)
    pieces = []
    for some in splits(ids, seed):
        piece = processor.add([Token(token) for token in some])
        if piece is not None:
            pieces.append(piece)
            if piece.finish_reason:
                break
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert sum(len(piece.tokens) for piece in pieces) == processor.num_tokens
    return pieces


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (["matey"], "Ahoy there, "),
        (["zzz", "the sea"], "Ahoy there, matey! What be "),
        (["re, m", "re, matey!"], "Ahoy the"),  # complete first
        (["matey", "ere, matey"], "Ahoy th"),  # complete at once: the longest
        (["☕"], "Ahoy there, matey! What be the sea? "),
        (["Ahoy"], ""),
        (["", "\n\n\n", "blue!"], "Ahoy there, matey! What be the sea? ☕ Blue"),  # none occurs
        (["Blue."], "Ahoy there, matey! What be the sea? ☕ Blue"),  # begun and not completed
    ],
)
def test_a_stop_string_ends_the_text_before_it(byte_level: Any, stops: list[str], left: str, seed: int) -> None:
    pieces = processed(byte_level, "Ahoy there, matey! What be the sea? ☕ Blue", stops, seed)
    assert "".join(piece.text for piece in pieces) == left
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("stops", [[], ["matey"], ["zzz"]])
def test_how_tokens_are_handed_in_changes_nothing(byte_level: Any, stops: list[str]) -> None:
    def told(seed: int) -> tuple[str, list[Token], int]:
        pieces = processed(byte_level, "Ahoy there, matey! What be the sea?", stops, seed)
        tokens = [token for piece in pieces for token in piece.tokens]
        return "".join(piece.text for piece in pieces), tokens, pieces[-1].without_text

    assert [told(seed) for seed in range(1, 8)] == [told(0)] * 7


def test_tokens_after_a_stop_are_not_counted_and_those_cut_are_unseen(byte_level: Any) -> None:
    pieces = processed(byte_level, "One two three four", [" two"], seed=0)
    tokens = [token.id for piece in pieces for token in piece.tokens]
    seen = tokens[: len(tokens) - pieces[-1].without_text]
    assert byte_level.decode(tokens) == "One two"
    assert byte_level.decode(seen) == "One"


def test_length_ends_an_answer_and_brings_what_was_held(byte_level: Any) -> None:
    ids = byte_level("☕ tea", add_special_tokens=False)["input_ids"]
    processor = OutputProcessor(byte_level, frozenset(), ["☕ teapot"], 2)
    first = processor.add([Token(ids[0])])
    last = processor.add([Token(ids[1])])
    assert first is None
    assert last is not None
    assert (last.text, last.finish_reason) == (byte_level.decode(ids[:2]), "length")
    assert (len(last.tokens), last.without_text) == (2, 0)


def test_ends_are_counted_and_unseen(byte_level: Any) -> None:
    last = processed(byte_level, "Aye.", [], seed=3)[-1]
    assert last.tokens[-1].id == byte_level.eos_token_id
    assert last.without_text == 1


@pytest.mark.parametrize("stop", ["matey", "ab"])
def test_no_character_of_a_stop_string_is_emitted_before_it_is_complete(byte_level: Any, stop: str) -> None:
    """Character by character: all but the last of the stop string are held back, and let go where it is not one."""
    begun = stop[:-1]
    ids = [byte_level(char, add_special_tokens=False)["input_ids"] for char in f"Oh {begun}! {stop}"]
    assert all(len(each) == 1 for each in ids)
    processor = OutputProcessor(byte_level, frozenset(), [stop], 100)
    emitted = []
    for (token,) in ids:
        chunk = processor.add([Token(token)])
        emitted.append("" if chunk is None else chunk.text)
    assert emitted == ["O", "h", " ", *[""] * len(begun), f"{begun}!", " ", *[""] * len(stop)]
    assert chunk is not None
    assert chunk.finish_reason == "stop"


def test_stop_strings_that_are_control_tokens_become_ids(byte_level: Any) -> None:
    eot = byte_level.convert_tokens_to_ids("<|eot_id|>")
    assert control_token_stops(byte_level, ["matey", "<|eot_id|>", ""]) == {eot}
    assert control_token_stops(byte_level, []) == frozenset()
    with pytest.raises(DataError, match=r"contains the control token '<\|eot_id\|>', .* give the control token alone"):
        control_token_stops(byte_level, ["\n<|eot_id|>"])
