"""A token by itself, as log-probabilities report it: its text, and the bytes it stands for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from parley.inference.output_processor import BYTE, UNFINISHED


class TokenTexts:
    """The bytes of each token of a vocabulary, leading space included; several may make one character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before_text = tokenizer.decode(self._before)
        self.bytes_of = lru_cache(maxsize=None)(self._bytes_of)

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of the embedding that no token has
            return b""
        if token in self._tokenizer.added_tokens_decoder:
            return name.encode()
        if BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        text = self._tokenizer.decode([*self._before, token])[len(self._before_text) :]
        if UNFINISHED in text and all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name)
        return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's writing of bytes as printable characters: those that are one stand for themselves, the rest from 256 on.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", its byte-level BPE.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
