"""llama.cpp's name of a pre-tokenizer, and its token ids on hard strings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from parley.errors import ModelError
from parley.exporting.gguf.pretokenizers import GPT4O, INEXACT, LLAMA3, QWEN2, QWEN35, TEKKEN, pretokenizer_name

COMBINING = "e\u0301 a\u0308\u0323 \u0301 क\u093c नि กำ"
HARD_STRINGS = json.loads((Path(__file__).parent / "hard_strings.json").read_text(encoding="utf-8"))


def byte_level(pattern: str | None, *, ignore_merges: bool = False, digits: bool = False) -> Any:
    """A small byte-level BPE tokenizer that splits by `pattern`, or as GPT-2 does."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    core.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(HARD_STRINGS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[1])


def name_of(tokenizer: Any) -> str:
    return pretokenizer_name(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()), "model")


CASES: dict[str, dict[str, Any]] = {
    "gpt-2": {"pattern": None},
    "smollm": {"pattern": None, "digits": True},
    "llama-bpe": {"pattern": LLAMA3, "ignore_merges": True},
    "dbrx": {"pattern": LLAMA3},
    "qwen2": {"pattern": QWEN2},
    "qwen35": {"pattern": QWEN35},
    "tekken": {"pattern": TEKKEN, "ignore_merges": True},
    "gpt-4o": {"pattern": GPT4O},
}


@pytest.mark.parametrize("name", CASES)
def test_a_pre_tokenizer_is_recognised_and_llama_cpp_s_ids_are_the_tokenizer_s(
    name: str, gguf_ids: Callable[..., list[list[int]]]
) -> None:
    tokenizer = byte_level(**CASES[name])
    assert name_of(tokenizer) == name
    texts = [text for text in HARD_STRINGS if text != COMBINING or name not in INEXACT]
    for special in (False, True):
        wanted = [
            tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids for text in texts
        ]
        assert gguf_ids(tokenizer, texts, parse_special=special) == wanted


@pytest.mark.parametrize("name", sorted(INEXACT & CASES.keys()))
def test_combining_marks_are_the_known_difference(name: str, gguf_ids: Callable[..., list[list[int]]]) -> None:
    tokenizer = byte_level(**CASES[name])
    wanted = tokenizer(COMBINING, add_special_tokens=False).input_ids
    assert gguf_ids(tokenizer, [COMBINING], parse_special=True) != [wanted]  # else INEXACT says what is no longer so


def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="its pre-tokenizer is not one that"):
        name_of(byte_level(r"\p{L}+|\s+|."))
