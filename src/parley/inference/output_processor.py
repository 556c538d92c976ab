"""An answer's tokens to its text, as they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from parley.inference.interface import Token

UNFINISHED = "\ufffd"  # what decoding writes for a character whose bytes are not all there
BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's byte tokens: one wrong byte makes its whole run unreadable

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """The next part of an answer: its text, and the tokens drawn since the piece before.

    The last piece says how the answer ended: "stop" at an end-of-turn token or a stop string, "length" where tokens
    or room ran out. `unseen`: how many of the last tokens have no part in the text, being an end or what was cut.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None = None
    unseen: int = 0


class Detokenizer:
    """Ids to text piece by piece; joined, the pieces are `tokenizer.decode(all ids, skip_special_tokens=True)`.

    Each piece is what new ids add to the decoded text of those of the piece before, since a token's text depends on
    what stands before it (leading spaces, the bytes of one character). Spaces are left as the model wrote them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # ids whose text was given
        self._told_text = ""

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain now; less than `ids` say where a character is not whole yet."""
        self._ids += ids
        text = self._decoded(self._ids)
        if len(text) == len(self._told_text) or text.endswith(UNFINISHED) or self._ends_in_byte():
            return ""
        return self._tell(text)

    def flush(self) -> str:
        """What is left at the end: characters that were never finished."""
        return self._tell(self._decoded(self._ids))

    def _tell(self, text: str) -> str:
        new = text[len(self._told_text) :]
        if new:  # ids without text, as control tokens, say nothing of what comes before the next
            self._ids = self._ids[self._told :]
            self._told, self._told_text = len(self._ids), self._decoded(self._ids)
        return new

    def _ends_in_byte(self) -> bool:
        return BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(self._ids[-1]) or "") is not None

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Transcriber:
    """One answer's tokens to its pieces. `ends`: the tokens that end it; `stops`: the texts that do.

    The stop string that is complete first ends the answer, of several at once the longest; its token is the last
    that counts. However the tokens are handed in, the text is the same.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], stops: Sequence[str], most: int) -> None:
        """`most`: tokens after which the answer ends."""
        self._detokenizer = Detokenizer(tokenizer)
        self._ends, self._stops, self._most = ends, [stop for stop in stops if stop], most
        self._held = ""  # may be the beginning of a stop string
        self._untold: list[tuple[Token, int]] = []  # each with where in the answer's text its own begins
        self._length = 0  # of the text so far, held included
        self.drawn = 0

    def add(self, tokens: Sequence[Token]) -> Piece | None:
        """What can be told after these tokens, if anything. Nothing may follow a piece that has `finish`."""
        told = ""
        for some in [[token] for token in tokens] if self._stops else [tokens]:  # a stop is looked for at every token
            finish = self._take(some)
            stop = self._first_stop() if self._stops else None
            if stop is not None:
                return self._last(told + self._held[:stop], "stop", self._length - len(self._held) + stop)
            if finish:
                return self._last(told + self._held, finish)
            certain = len(self._held) - self._doubtful()
            told, self._held = told + self._held[:certain], self._held[certain:]
        if not told:
            return None
        known = tuple(token for token, _ in self._untold)
        self._untold.clear()
        return Piece(told, known)

    def _take(self, tokens: Sequence[Token]) -> Finish | None:
        self.drawn += len(tokens)
        self._untold += [(token, self._length) for token in tokens]
        text = self._detokenizer.add([token.id for token in tokens])
        finish: Finish | None = "stop" if tokens[-1].id in self._ends else None
        if finish is None and self.drawn >= self._most:
            finish = "length"
        if finish:
            text += self._detokenizer.flush()
        self._held += text
        self._length += len(text)
        return finish

    def _last(self, text: str, finish: Finish, cut: int | None = None) -> Piece:
        tokens = tuple(token for token, _ in self._untold)
        if cut is None:
            return Piece(text, tokens, finish, unseen=int(tokens[-1].id in self._ends))
        return Piece(text, tokens, finish, unseen=sum(start >= cut for _, start in self._untold))

    def _first_stop(self) -> int | None:
        """Where the stop string begins that is complete first, the longest of those that are; None without one."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _doubtful(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=0)
        for count in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0
