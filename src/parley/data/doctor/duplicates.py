"""Rows that repeat others, exactly or nearly, from hashes of fixed size.

A row has a 64-bit hash of all it says, and two MinHash signatures (Broder 1997) of its word trigrams: of its prompt and
of its answers. One byte is kept of each of the 128 values of a signature (b-bit minwise hashing, arXiv 0910.3349), so a
row takes 264 bytes whatever its length. Candidates share a band (locality-sensitive hashing): four bytes of the prompt
and four of the answers, one 64-bit number. A candidate is near where both signatures agree in NEAR of their bytes.
Prompt and answers count apart, so that rows about one long passage with different answers are not near.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator

import numpy as np
from rensa import RMinHash

from parley.data.doctor.conversation import Conversation

NEAR = 0.8
"""Jaccard similarity of word trigrams from which on two texts are near duplicates."""
_PERMUTATIONS, _SEED = 128, 1
_BAND_BYTES = 4  # of each signature; 32 bands of 4 + 4 find 99.7% of the pairs of similarity 0.8, all but a few at 0.9
_BATCH = 512
_CHUNK = 1 << 14
# Characters of scripts without spaces are words of their own.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")


class Fingerprints:
    """Hashes of rows in their order."""

    def __init__(self) -> None:
        self._exact = array("Q")
        self._signatures: list[np.ndarray] = []
        self._pending: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._exact)

    def add(self, conversation: Conversation) -> None:
        self._exact.append(_hash(conversation))
        self._pending += [_trigrams(conversation.prompt), _trigrams(conversation.answer)]
        if len(self._pending) >= 2 * _BATCH:
            self._sign()

    def extend(self, others: Fingerprints) -> Fingerprints:
        """A new object with these rows, then those of `others`."""
        both = Fingerprints()
        both._exact = self._exact + others._exact
        both._signatures = [self.signatures(), others.signatures()]
        return both

    def select(self, chosen: np.ndarray) -> Fingerprints:
        """A new object with the rows where `chosen`, a mask, is true."""
        part = Fingerprints()
        part._exact = array("Q", self.exact()[chosen].tobytes())
        part._signatures = [self.signatures()[chosen]]
        return part

    def exact(self) -> np.ndarray:
        return np.frombuffer(self._exact, dtype=np.uint64) if self._exact else np.empty(0, np.uint64)

    def signatures(self) -> np.ndarray:
        """(rows, 2, 128) uint8: of the prompt, of the answers."""
        self._sign()
        if len(self._signatures) != 1:
            empty = np.empty((0, 2, _PERMUTATIONS), np.uint8)
            self._signatures = [np.concatenate([empty, *self._signatures])]
        return self._signatures[0]

    def _sign(self) -> None:
        if self._pending:
            matrix = RMinHash.digest_matrix_from_token_sets(self._pending, _PERMUTATIONS, _SEED)
            values = np.array(matrix.to_rows(), dtype=np.uint32)
            self._signatures.append(values.astype(np.uint8).reshape(-1, 2, _PERMUTATIONS))
            self._pending = []


def repeats(exact: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> dict[int, int]:
    """For each row of `targets` (a mask) that is equal to an earlier one of `sources`: the first such row."""
    found: dict[int, int] = {}
    for target, first, _ in _grouped(exact, sources, targets):
        found.update(zip(target.tolist(), first.tolist(), strict=True))
    return found


def near_repeats(signatures: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> dict[int, int]:
    """For each row of `targets` (a mask) that is near to an earlier one of `sources`: such a row."""
    found: dict[int, int] = {}
    open_targets = targets.copy()
    for start in range(0, _PERMUTATIONS, _BAND_BYTES):
        band = np.ascontiguousarray(signatures[:, :, start : start + _BAND_BYTES])
        bands = band.reshape(len(signatures), 2 * _BAND_BYTES)  # no -1, which no rows at all leave open
        for target, first, previous in _grouped(bands.view(np.uint64).ravel(), sources, open_targets):
            for source in (first, previous):
                for chunk in range(0, len(target), _CHUNK):
                    these, those = target[chunk : chunk + _CHUNK], source[chunk : chunk + _CHUNK]
                    agreement = (signatures[these] == signatures[those]).mean(axis=2)
                    near = (agreement >= NEAR).all(axis=1) & open_targets[these]
                    found.update(zip(these[near].tolist(), those[near].tolist(), strict=True))
                    open_targets[these[near]] = False
    return found


def _grouped(
    keys: np.ndarray, sources: np.ndarray, targets: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Targets with an earlier source of the same key: (target, its group's first source, the last source before it).

    Only these two sources of a group are compared: all pairs would be quadratic in the rows of a template.
    """
    used = np.flatnonzero(sources | targets)
    if not targets.any():
        return
    order = used[np.argsort(keys[used], kind="stable")]  # stable: rows of a group stay in their order
    sorted_keys, positions = keys[order], np.arange(len(order))
    begins = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])
    group_start = np.maximum.accumulate(np.where(begins, positions, 0))
    is_source = sources[order]
    last_source = np.maximum.accumulate(np.where(is_source, positions, -1))
    before = np.concatenate([[-1], last_source[:-1]])  # a row is not a source of itself
    next_source = np.minimum.accumulate(np.where(is_source, positions, len(order))[::-1])[::-1]
    wanted = targets[order] & (before >= group_start)
    if wanted.any():
        first = next_source[group_start[wanted]]
        yield order[wanted], order[first], order[before[wanted]]


def _hash(conversation: Conversation) -> int:
    parts = [text for turn in conversation.turns for text in (turn.role, turn.content, *turn.other, "\x1e")]
    text = "\x1f".join((*parts, *conversation.tools))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _trigrams(text: str) -> list[str]:
    words = _WORDS.findall(text.casefold())
    return list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) if len(words) > 2 else [" ".join(words)]
