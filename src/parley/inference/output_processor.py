"""From sampled tokens to text, incrementally: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from parley.errors import DataError
from parley.inference.interface import Token

UNFINISHED = "\ufffd"  # decoding writes it for a character some of whose bytes are missing
BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece byte tokens: one invalid byte makes the whole run unreadable

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class OutputChunk:
    """The next part of an answer: its text, and the tokens sampled since the chunk before.

    The last chunk has a `finish_reason`: "stop" at an end-of-turn token or a stop string, "length" where
    `max_new_tokens` or the context is exhausted. `without_text`: how many of the last tokens contribute no text,
    because they are an end-of-turn token or were cut off with a stop string.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    without_text: int = 0


class Detokenizer:
    """Incremental detokenization; the parts join to `tokenizer.decode(all ids, skip_special_tokens=True)`.

    Each part is what new ids add to the decoded text of those of the part before, since a token's text depends on its
    predecessors (leading spaces, the bytes of one character). Spaces are left as the model wrote them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the window that is decoded again: ids of the last part, and those after it
        self._emitted = 0  # leading ids of the window whose text was returned
        self._emitted_text = ""

    def add(self, ids: Sequence[int]) -> str:
        """The text that is final now; without the last character while some of its bytes are missing."""
        self._ids += ids
        text = self._decode(self._ids)
        if len(text) == len(self._emitted_text) or text.endswith(UNFINISHED) or self._ends_in_byte():
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The rest at the end of the answer: characters that were never completed."""
        return self._emit(self._decode(self._ids))

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted_text) :]
        if new:  # ids without text (control tokens) stay in the window: the next id still needs its predecessors
            self._ids = self._ids[self._emitted :]
            self._emitted, self._emitted_text = len(self._ids), self._decode(self._ids)
        return new

    def _ends_in_byte(self) -> bool:
        return BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(self._ids[-1]) or "") is not None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def control_token_stops(tokenizer: Any, stop_strings: Sequence[str]) -> frozenset[int]:
    """The ids of stop strings that are control tokens: these are no part of an answer's text, so only ids match them.

    Raises DataError for a stop string that contains a control token beside other text, and so would never match.
    """
    if not stop_strings:
        return frozenset()
    control_tokens = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    for stop in stop_strings:
        inside = next((token for token in control_tokens if token in stop and token != stop), None)
        if inside is not None and stop not in control_tokens:
            raise DataError(
                f"stop {stop!r} contains the control token {inside!r}, which is no part of an answer's text, so it "
                "would never match; give the control token alone"
            )
    return frozenset(control_tokens[stop] for stop in stop_strings if stop in control_tokens)


class OutputProcessor:
    """Turns the sampled tokens of one answer into output chunks.

    The stop string that is complete first ends the answer, of several that complete together the longest; the token
    that completes it is the last one counted. How tokens are grouped into calls of `add` does not change the text.

    Args:
        stop_ids: tokens that end the answer.
        stop_strings: texts that end it, and are cut off.
        max_tokens: tokens after which it ends.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], stop_strings: Sequence[str], max_tokens: int) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_ids, self._max_tokens = stop_ids, max_tokens
        self._stop_strings = [stop for stop in stop_strings if stop]
        self._held = ""  # text that may be the beginning of a stop string
        self._pending: list[tuple[Token, int]] = []  # tokens not yet emitted, with the text offset where theirs begins
        self._length = 0  # characters so far, held ones included
        self.num_tokens = 0

    def add(self, tokens: Sequence[Token]) -> OutputChunk | None:
        """The text that is final after these tokens, if any. No call may follow a chunk with a `finish_reason`."""
        emitted = ""
        # With stop strings, tokens are taken one by one: tokens behind the one that completes a stop do not count.
        for group in [[token] for token in tokens] if self._stop_strings else [tokens]:
            finish_reason = self._append(group)
            stop = self._first_stop() if self._stop_strings else None
            if stop is not None:
                return self._last(emitted + self._held[:stop], "stop", self._length - len(self._held) + stop)
            if finish_reason:
                return self._last(emitted + self._held, finish_reason)
            final = len(self._held) - self._undecided()
            emitted, self._held = emitted + self._held[:final], self._held[final:]
        if not emitted:
            return None
        tokens = tuple(token for token, _ in self._pending)
        self._pending.clear()
        return OutputChunk(emitted, tokens)

    def ends_with(self, token: int) -> bool:
        """Whether this next token ends the answer. For callers that want ids: text is decoded for stop strings only."""
        self.num_tokens += 1
        if token in self._stop_ids or self.num_tokens >= self._max_tokens:
            return True
        if not self._stop_strings:
            return False
        self._held += self._detokenizer.add([token])
        return self._first_stop() is not None

    def _append(self, tokens: Sequence[Token]) -> FinishReason | None:
        self.num_tokens += len(tokens)
        self._pending += [(token, self._length) for token in tokens]
        text = self._detokenizer.add([token.id for token in tokens])
        finish_reason: FinishReason | None = "stop" if tokens[-1].id in self._stop_ids else None
        if finish_reason is None and self.num_tokens >= self._max_tokens:
            finish_reason = "length"
        if finish_reason:
            text += self._detokenizer.flush()
        self._held += text
        self._length += len(text)
        return finish_reason

    def _last(self, text: str, finish_reason: FinishReason, cut: int | None = None) -> OutputChunk:
        """The last chunk; `cut`: the text offset of the stop string that ended the answer."""
        tokens = tuple(token for token, _ in self._pending)
        if cut is None:
            return OutputChunk(text, tokens, finish_reason, without_text=int(tokens[-1].id in self._stop_ids))
        return OutputChunk(text, tokens, finish_reason, without_text=sum(start >= cut for _, start in self._pending))

    def _first_stop(self) -> int | None:
        """Where in the held text the stop string begins that ends first, the longest of those; None without one."""
        found = [(at + len(stop), at) for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _undecided(self) -> int:
        """How many of the last held characters may be the beginning of a stop string."""
        longest = max(map(len, self._stop_strings), default=0)
        for count in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stop_strings):
                return count
        return 0
