"""Rows in the model's tokens: their lengths, what is supervised, and what the length limit takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parley.config import DataSection
from parley.data.doctor.checks import BAD_ROW, OVERLONG, RENDERING, UNSUPERVISED, Check
from parley.data.doctor.histogram import LogHistogram
from parley.data.example import Example
from parley.data.filtering import has_answer, render_options
from parley.data.pretokenized import as_rendered
from parley.data.render import AS_TEXT, AS_TOKENS, Rendered, pin_date, pin_settings, render_many
from parley.errors import DataError

_BATCH = 256


class TokenCounts:
    """Rows rendered with `tokenizer` in batches. `find` counts a row, by its number, under a check."""

    def __init__(
        self, tokenizer: Any, data: DataSection, max_length: int, find: Callable[[Check, int, str], None]
    ) -> None:
        pin_date(tokenizer, data.date)
        pin_settings(tokenizer, data.template)
        self.tokenizer, self.data, self.max_length, self.find = tokenizer, data, max_length, find
        self.lengths = LogHistogram()
        self.supervised = self.over = 0
        self._pending: list[tuple[int, Example]] = []

    def add(self, number: int, examples: list[Example]) -> None:
        for example in examples:
            if example.input_ids is not None or has_answer(example, self.data.train_on):
                self._pending.append((number, example))
        if len(self._pending) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        for (number, example), outcome in zip(self._pending, self._render(), strict=True):
            if isinstance(outcome, DataError):
                self.find(BAD_ROW, number, str(outcome).removeprefix(f"{example.origin}: "))
            else:
                self._count(number, outcome)
        self._pending = []

    def _render(self) -> list[Rendered | DataError]:
        written = [example for _, example in self._pending if example.input_ids is None]
        rendered = iter(render_many(self.tokenizer, written, render_options(self.data)))
        return [next(rendered) if example.input_ids is None else self._given(example) for _, example in self._pending]

    def _given(self, example: Example) -> Rendered | DataError:
        try:
            return as_rendered(example, len(self.tokenizer))
        except DataError as error:
            return error

    def _count(self, number: int, rendered: Rendered) -> None:
        length = len(rendered.input_ids)
        self.lengths.add(length)
        self.supervised += sum(rendered.mask[1:])
        if length > self.max_length:
            self.over += length - self.max_length
            self.find(OVERLONG, number, f"{length:,} tokens")
        if not any(rendered.mask[1:]):  # the first token of a row is never predicted
            self.find(UNSUPERVISED, number, "")
        for note in rendered.notes:
            self.find(_rendering(note), number, "")

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
