"""A tokenizer in GGUF: tokens with their types, merges or scores, special tokens and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from parley.data.render import render_prompt
from parley.errors import ModelError
from parley.exporting.gguf.pretokenizers import pretokenizer_name

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNUSED_SCORE = -10_000.0
"""Of tokens that are never made by a merge. llama.cpp's merges take the pair with the highest score."""
PHI3_TOKENS = {"<s>", "</s>", "<unk>", "<|endoftext|>"}
"""Which llama.cpp does not load a model without whose name says Phi-3."""
MORE_ENDS = ("eot", "eom")
"""Kinds of tokens that end answers beside the tokenizer's end token."""
QUESTION = {"role": "user", "content": "a"}
NO_DATE = "{%- set date_string = no_date_string %}"
"""Makes `date_string` undefined again, as it was in training, so that the template takes its own (pinned) date."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer. `tokens` and `types` have one entry a row of the embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] | None
    scores: list[float] | None
    add_space_prefix: bool | None
    special_ids: dict[str, int]
    add_bos: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        for kind, token in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int], name: str) -> Vocabulary:
    """The vocabulary of `tokenizer` for an embedding of `rows` rows.

    `ends` are the tokens that end an answer, those that matter most first. Raises ModelError for a tokenizer that
    llama.cpp has no counterpart of; `name` is its model's.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer has no tokenizer.json form; save it with transformers' fast tokenizer")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{name}: a {model['type']} tokenizer is not exported to GGUF, only BPE and SentencePiece BPE")
    tokens, types = _tokens(backend, rows, name)
    byte_level = "ByteLevel" in json.dumps([backend.get("pre_tokenizer"), backend.get("decoder")])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if byte_level:
        pre, merges, scores, prefix = pretokenizer_name(tokenizer, backend, name), pairs, None, None
    elif model.get("byte_fallback"):
        pre, merges, scores, prefix = "default", None, _scores(tokens, types, pairs), _has_space_prefix(backend)
    else:
        raise ModelError(
            f"{name}: its BPE is neither on bytes nor falls back to them, which llama.cpp wants; use --to merged"
        )
    return Vocabulary(
        "gpt2" if byte_level else "llama",
        pre,
        tokens,
        types,
        None if merges is None else [" ".join(pair) for pair in merges],
        scores,
        prefix,
        _special_ids(tokenizer, ends),
        _adds_bos(tokenizer),
        _template(tokenizer),
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template. llama.cpp gives templates today's date as `date_string`: one that reads it is kept from it."""
    template = tokenizer.chat_template or None
    if template is None:
        return None
    names = {text for _, kind, text in jinja2.Environment().lex(template) if kind == "name"}
    return NO_DATE + template if "date_string" in names else template


def _tokens(backend: dict[str, Any], rows: int, name: str) -> tuple[list[str], list[TokenType]]:
    vocabulary = {token: TokenType.NORMAL for token in backend["model"]["vocab"]}
    ids = dict(backend["model"]["vocab"])
    for token in vocabulary:
        if BYTE_TOKEN.fullmatch(token) and backend["model"].get("byte_fallback"):
            vocabulary[token] = TokenType.BYTE
    unknown = backend["model"].get("unk_token")
    if unknown is not None:
        vocabulary[unknown] = TokenType.UNKNOWN
    for added in backend["added_tokens"]:
        ids[added["content"]] = added["id"]
        if vocabulary.get(added["content"]) is not TokenType.UNKNOWN:
            vocabulary[added["content"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(ids.values()) >= rows:
        raise ModelError(f"{name}: the tokenizer has the id {max(ids.values()):,} and the embedding {rows:,} rows")
    # Embeddings are often padded to a round size; their further rows are never generated.
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [TokenType.UNUSED] * rows
    for token, index in ids.items():
        tokens[index], types[index] = token, vocabulary[token]
    return tokens, types


def _scores(tokens: list[str], types: list[TokenType], pairs: list[list[str]]) -> list[float]:
    """Scores by which llama.cpp merges in the order of `pairs`: minus the rank of the first merge to make a token."""
    ranks: dict[str, int] = {}
    for left, right in pairs:
        ranks.setdefault(left + right, len(ranks))
    return [
        -float(ranks[token]) if kind is TokenType.NORMAL and token in ranks else UNUSED_SCORE
        for token, kind in zip(tokens, types, strict=True)
    ]


def _has_space_prefix(backend: dict[str, Any]) -> bool:
    """Whether text is encoded as if a space stood before it, as Llama 2 does and Gemma does not."""
    written = json.dumps([backend.get("normalizer"), backend.get("pre_tokenizer")])
    if '"Prepend"' in written:
        return True
    return '"Metaspace"' in written and '"prepend_scheme": "never"' not in written


def _special_ids(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        # llama.cpp ends an answer at each of these, and at others that it knows by their text.
        **dict(zip(MORE_ENDS, (end for end in ends if end != tokenizer.eos_token_id), strict=False)),
    }
    return {kind: token for kind, token in found.items() if token is not None}


def model_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`name` for general.name: llama.cpp lets control tokens take the white space behind them where it says Phi-3."""
    strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    strips = strips and tokenizer.get_vocab().keys() >= PHI3_TOKENS
    other = re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)
    return f"{other} (phi-3)" if strips else other


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a prompt begins with the beginning of text, as it did in training: by the template, where there is one.

    llama.cpp puts one before every prompt if the metadata says so, also where the template of a chat writes none.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    ids = render_prompt(tokenizer, [QUESTION]) if tokenizer.chat_template else tokenizer("a").input_ids
    return bool(ids[:1] == [bos])
