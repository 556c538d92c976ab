"""Tokens, types, special tokens and templates in GGUF, as llama.cpp reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from parley.data.date import pin_date
from parley.data.render import render_prompt
from parley.errors import ModelError
from parley.exporting.gguf.vocabulary import model_name, read_vocabulary
from parley.exporting.llama_cpp import LlamaCppReader
from parley.exporting.samples import Prompt
from parley.library_compat.xllamacpp import LlamaModel

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
TEXTS = ["Hello there, matey!", "  two spaces", "a\n\nb\tc", "naïve 日本 🚀 \x07", "", "ab<extra>cd", "12 345"]


def sentencepiece(*, prefix: bool) -> Any:
    """A BPE tokenizer that falls back to bytes, as converted from SentencePiece; with Llama 2's prefix or without."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefix else replaced
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=8)
    core.train_from_iterator([text.replace(" ", "▁") for text in TEXTS[:3]] * 9 + ["▁matey▁there▁hello"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_the_tokenizer_s(prefix: bool, gguf_ids: Callable[..., list[list[int]]]) -> None:
    tokenizer = sentencepiece(prefix=prefix)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), [], "model")
    assert (vocabulary.model, vocabulary.add_space_prefix) == ("llama", prefix)
    assert vocabulary.types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    texts = [text for text in TEXTS if "<extra>" not in text]
    assert gguf_ids(tokenizer, texts, parse_special=True) == tokenizer(texts, add_special_tokens=False).input_ids


def test_tokens_have_their_types_and_the_embedding_s_further_rows_are_unused(tiny_tokenizer: Any) -> None:
    vocabulary = read_vocabulary(tiny_tokenizer, 400, [3, 2], "model")
    assert vocabulary.types[tiny_tokenizer.bos_token_id] is TokenType.CONTROL
    assert vocabulary.types[200] is TokenType.NORMAL
    assert vocabulary.types[384:] == [TokenType.UNUSED] * 16
    assert len(set(vocabulary.tokens)) == 400
    assert (vocabulary.special_ids["eot"], vocabulary.special_ids["eom"]) == (3, 2)
    assert vocabulary.add_bos


def test_a_user_s_token_is_matched_in_plain_text(tiny_tokenizer: Any, gguf_ids: Callable[..., list[list[int]]]) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    assert gguf_ids(tokenizer, ["ab<extra>cd"], parse_special=False) == [
        tokenizer("ab<extra>cd", add_special_tokens=False).input_ids
    ]


@pytest.mark.parametrize(("run_name", "strips"), [("mine", True), ("my Phi3 run", False), ("phi-3", True)])
def test_white_space_behind_control_tokens_is_taken_as_the_tokenizer_takes_it(
    run_name: str, strips: bool, tiny_tokenizer: Any, gguf_model: Callable[..., Path]
) -> None:
    """Phi-3's control tokens take it, and llama.cpp knows that by the model's name alone."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    stripping, plain = ("<|user|>", "<|end|>", "</s>"), ("<s>", "<unk>", "<|endoftext|>")
    tokens = [AddedToken(text, rstrip=strips, special=True, normalized=False) for text in stripping]
    tokenizer.add_tokens([*tokens, *(AddedToken(text, special=True, normalized=False) for text in plain)])
    text = "<|user|>\n naïve<|end|>  \n<|user|>x"
    wanted = tokenizer(text, add_special_tokens=False).input_ids
    model = LlamaModel(gguf_model(tokenizer, {"name": model_name(run_name, tokenizer)}), length=64, threads=1)
    try:
        assert model.tokenize(text, add_special=False, parse_special=True) == wanted
    finally:
        model.close()


def test_an_embedding_with_fewer_rows_than_tokens_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="the tokenizer has the id 383 and the embedding 300 rows"):
        read_vocabulary(tiny_tokenizer, 300, [], "model")


def test_a_tokenizer_without_merges_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match="a WordLevel tokenizer is not exported to GGUF"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), 2, [], "model")


def test_a_bpe_on_characters_is_refused() -> None:
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="neither on bytes nor falls back to them"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), 3, [], "model")


@pytest.mark.parametrize("template", ["llama3", "chatml", "qwen3"])
def test_llama_cpp_renders_the_template_as_in_training(
    template: str, tiny_tokenizer: Any, gguf_model: Callable[[Any], Path]
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    pin_date(tokenizer, date(2024, 7, 26))
    conversations = [
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": " spaces \n\n"},
            {"role": "assistant", "content": "Aye."},
            {"role": "user", "content": "naïve 🚀"},
        ],
    ]
    with LlamaCppReader(gguf_model(tokenizer), 512, threads=1) as reader:
        for messages in conversations:
            assert reader.prompt_ids(Prompt(messages)) == render_prompt(tokenizer, messages)
