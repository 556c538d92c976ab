"""The text and bytes of single tokens, as log-probabilities report them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from parley.inference.output_processor import BYTE, UNFINISHED


class TokenTexts:
    """The bytes of each token of a vocabulary, leading space included. A character may span several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A prefix token, because decoders strip the space before the first token.
        self._prefix = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._prefix_text = tokenizer.decode(self._prefix)
        self.bytes_of = lru_cache(maxsize=None)(self._bytes_of)

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # padding of the embedding
            return b""
        if token in self._tokenizer.added_tokens_decoder:
            return name.encode()
        if BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        text = self._tokenizer.decode([*self._prefix, token])[len(self._prefix_text) :]
        if UNFINISHED in text and all(char in _BYTE_OF_CHAR for char in name):
            return bytes(_BYTE_OF_CHAR[char] for char in name)
        return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's mapping of printable characters to bytes: printable bytes map to themselves, the rest to 256 and up.

    Byte-level BPE of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + offset): byte for offset, byte in enumerate(unprintable)
    }


_BYTE_OF_CHAR = _byte_level_alphabet()
