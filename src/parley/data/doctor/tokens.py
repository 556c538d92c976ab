"""Rows in the model's tokens: their lengths, what is supervised, and what the length limit takes.

The tokenizer takes most of the time, so of many rows a sample is tokenised: the first EXACT_ROWS, one in SAMPLED of the
others, which then counts SAMPLED times, and every row that may have a fault. What is found is exact; totals and
percentiles are estimates from EXACT_ROWS rows on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parley.config import DataSection
from parley.data.doctor.checks import BAD_ROW, OVERLONG, RENDERING, UNSUPERVISED, Check
from parley.data.doctor.histogram import LogHistogram
from parley.data.encoding import MaskedText
from parley.data.example import Example
from parley.data.filtering import has_answer, render_options
from parley.data.pretokenized import as_rendered
from parley.data.render import AS_TEXT, AS_TOKENS, Rendered, encode, pin_date, pin_settings, write_texts
from parley.errors import DataError

EXACT_ROWS = 10_000
SAMPLED = 8
_BATCH = 256
_SURELY_SUPERVISED = 16  # characters of a supervised span: more than one token of any vocabulary has of a text


class TokenCounts:
    """Rows rendered with `tokenizer` in batches. `find` counts a row, by its number, under a check."""

    def __init__(
        self, tokenizer: Any, data: DataSection, max_length: int, find: Callable[[Check, int, str], None]
    ) -> None:
        pin_date(tokenizer, data.date)
        pin_settings(tokenizer, data.template)
        self.tokenizer, self.data, self.max_length, self.find = tokenizer, data, max_length, find
        self.options = render_options(data)
        self.lengths = LogHistogram()
        self.supervised = self.over = self.tokenised = 0
        self._pending: list[tuple[int, Example]] = []
        self._faultless = 0  # rows that were tokenised, or left out, by chance
        self._chance = random.Random(0)

    def add(self, number: int, examples: list[Example]) -> None:
        for example in examples:
            if example.input_ids is not None or has_answer(example, self.data.train_on):
                self._pending.append((number, example))
        if len(self._pending) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        chosen: list[tuple[int, int, MaskedText]] = []  # row, how many rows it counts for, text
        written = iter(write_texts(self.tokenizer, (e for _, e in self._pending if e.input_ids is None), self.options))
        for number, example in self._pending:
            text = next(written) if example.input_ids is None else None
            if text is None:
                self._count_given(number, example)
            elif isinstance(text, DataError):
                self._find_bad(number, example.origin, text)
            else:
                for note in text.notes:
                    self.find(_rendering(note), number, "")
                if weight := self._weight(text):
                    chosen.append((number, weight, text))
        outcomes = encode(self.tokenizer, [text for _, _, text in chosen])
        for (number, weight, _), outcome in zip(chosen, outcomes, strict=True):
            if isinstance(outcome, DataError):
                self._find_bad(number, "", outcome)
            else:
                self._count(number, outcome, weight)
        self._pending = []

    @property
    def is_sample(self) -> bool:
        """Whether rows were left out, so that totals and percentiles are estimates."""
        return self._faultless > EXACT_ROWS

    def _weight(self, text: MaskedText) -> int:
        """How many rows a row counts for; 0 where it need not be tokenised."""
        supervised = sum(end - start for start, end in text.spans)
        # A token has at least one byte of the text.
        may_be_over = len(text.text.encode(errors="replace")) + len(text.head) + len(text.tail) > self.max_length
        if may_be_over or supervised < _SURELY_SUPERVISED or text.excluded or text.plain:
            return 1
        self._faultless += 1
        if self._faultless <= EXACT_ROWS:
            return 1
        return SAMPLED if self._chance.randrange(SAMPLED) == 0 else 0

    def _count_given(self, number: int, example: Example) -> None:
        try:
            self._count(number, as_rendered(example, len(self.tokenizer)), 1)
        except DataError as error:
            self._find_bad(number, example.origin, error)

    def _find_bad(self, number: int, origin: str, error: DataError) -> None:
        self.find(BAD_ROW, number, str(error).removeprefix(f"{origin}: "))

    def _count(self, number: int, rendered: Rendered, weight: int) -> None:
        length = len(rendered.input_ids)
        self.tokenised += 1
        self.lengths.add(length, weight)
        self.supervised += weight * sum(rendered.mask[1:])
        if length > self.max_length:
            self.over += length - self.max_length
            self.find(OVERLONG, number, f"{length:,} tokens")
        if not any(rendered.mask[1:]):  # the first token of a row is never predicted
            self.find(UNSUPERVISED, number, "")

    def overlong_cure(self) -> str:
        """What the length limit takes by `data.overlong`, and the settings that take less."""
        what = {
            "drop": "data.overlong=drop leaves them out",
            "error": "data.overlong=error ends the run at them",
            "split": "data.overlong=split cuts them into rows of their own",
        }.get(self.data.overlong, f"data.overlong={self.data.overlong} cuts them")
        share = self.over / self.lengths.total
        less = "" if self.data.overlong == "split" else ", data.overlong=split loses none of their tokens"
        return (
            f"{what} ({self.over:,} tokens past the limit, {share:.1%} of all); "
            f"model.max_seq_length={self.lengths.largest} takes them whole{less}"
        )


def _rendering(note: str) -> Check:
    """A check for what rendering has to say of a row."""
    cure = "model.chat_template=FILE names a template that does"
    if note in (AS_TEXT, AS_TOKENS):
        cure = "data.control_tokens=text encodes them as plain text, tokens as control tokens"
    return replace(RENDERING, name=note, what=note, cure=cure)
