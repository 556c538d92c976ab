"""`train_on_responses_only` as notebooks call it: supervise what follows a marker, up to the end of the turn.

Parley's own rendering (parley.data.render) needs no markers; this is for rows that a notebook has turned into text.
Markers are searched for in the text, since tokenisation of the same marker differs from row to row. T: tokens of a row.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from parley.compat.unsloth.families import family_of
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.render import render
from parley.errors import DataError, UsageError

logger = logging.getLogger(__name__)

Span = tuple[int, int]
"""Characters [start, end)."""
Batch = dict[str, list[Any]]


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """`trainer`, itself, with `labels` only on what follows a `response_part`.

    A response ends with the tokenizer's end-of-turn token, which is supervised with it, or before the next part where
    there is none. So tool results and system turns are never supervised. Without parts, those of the tokenizer's own
    template are taken; `force_match=False` ignores white space in them. Rows without supervised tokens are left out.
    With `return_function` the function for `dataset.map(..., batched=True)` is returned instead.

    Raises UsageError for parts that are missing, DataError where no row has a response, or rows have no token ids.
    """
    tokenizer = tokenizer if tokenizer is not None else trainer.processing_class
    parts = _parts(tokenizer, instruction_part, response_part, force_match)

    def masked(rows: Batch) -> Batch:
        # The rows are token ids already; the parts are text, so ids are decoded and spans mapped back.
        texts = tokenizer.batch_decode(rows["input_ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        labels = []
        for ids, text in zip(rows["input_ids"], texts, strict=True):
            spans = parts.spans(text)
            labels.append(_labels(tokenizer, ids, len(text), spans[-1:] if last_response_only else spans))
        return {"labels": labels}

    if return_function:
        return masked
    if trainer.train_dataset is not None:
        trainer.train_dataset = _relabelled(trainer.train_dataset, masked, parts, "train_dataset", num_proc)
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {
            name: _relabelled(rows, masked, parts, name, num_proc) for name, rows in trainer.eval_dataset.items()
        }
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = _relabelled(trainer.eval_dataset, masked, parts, "eval_dataset", num_proc)
    return trainer


@dataclass(frozen=True)
class _Parts:
    """The headers before turns, and what ends turns."""

    instruction: str
    response: str
    exact: bool
    ends: re.Pattern[str]

    def spans(self, text: str) -> list[Span]:
        exact = self.exact and self.response in text  # else white space differs: some tokenizers keep none of it
        response, instruction = _pattern(self.response, exact), _pattern(self.instruction, exact)
        found = []
        for header in response.finditer(text):
            start = header.end()
            # A response ends at the next header of either kind: two assistant turns may follow each other.
            following = [
                match.start() for match in (instruction.search(text, start), response.search(text, start)) if match
            ]
            stop = min(following, default=len(text))
            end = self.ends.search(text, start, stop)
            # An empty response would teach the model to end its turn at once.
            if text[start : end.start() if end else stop].strip():
                found.append((start, end.end() if end else stop))
        return found


def _parts(tokenizer: Any, instruction: str | None, response: str | None, exact: bool) -> _Parts:
    if instruction is None or response is None:
        family = family_of(str(tokenizer.chat_template or ""))
        # Both None: with one of them given, the other cannot be guessed from a family.
        if family is None or instruction is not response:
            raise UsageError(
                "train_on_responses_only() got no instruction_part and response_part; give both, as the text has them "
                "before what the user and the assistant say"
            )
        instruction, response = family.instruction, family.response
    if not instruction.strip() or not response.strip():
        raise UsageError(
            "train_on_responses_only() got an empty instruction_part or response_part; wanted a turn's header"
        )
    return _Parts(
        instruction, response, exact, re.compile("|".join(map(re.escape, _ends_of_turn(tokenizer))) or "(?!)")
    )


def _ends_of_turn(tokenizer: Any) -> list[str]:
    """The end-of-text token, and what the tokenizer's own template ends a turn with: the last may differ."""
    ends = {tokenizer.eos_token} - {None}
    if tokenizer.chat_template:
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        turns = render(tokenizer, [*exchange, *exchange])
        for index, (supervised, following) in enumerate(zip(turns.mask, [*turns.mask[1:], False], strict=True)):
            if supervised and not following and turns.input_ids[index] in tokenizer.added_tokens_decoder:
                ends.add(tokenizer.convert_ids_to_tokens(turns.input_ids[index]))
    return sorted(ends)


def _pattern(part: str, exact: bool) -> re.Pattern[str]:
    return re.compile(re.escape(part) if exact else r"\s*".join([*map(re.escape, part.split()), ""]))


def _labels(tokenizer: Any, ids: list[int], characters: int, spans: list[Span]) -> list[int]:
    """`ids` where they overlap a span of their text of so many `characters`, IGNORE_INDEX elsewhere; both (T,)."""

    def length(tokens: int) -> int:
        text = tokenizer.decode(ids[:tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(text)

    labels, stop = [IGNORE_INDEX] * len(ids), 0
    # Bisection over prefix lengths: decoding every prefix would be quadratic in the row.
    counts = range(len(ids) + 1)
    for start, end in spans:
        first = bisect_right(counts, start, lo=stop, key=length) - 1
        stop = len(ids) if end == characters else bisect_left(counts, end, lo=first, key=length)
        labels[first:stop] = ids[first:stop]
    return labels


def _relabelled(
    rows: Dataset | IterableDataset, masked: Callable[[Batch], Batch], parts: _Parts, name: str, num_proc: int | None
) -> Dataset | IterableDataset:
    if "input_ids" not in (rows.column_names or next(iter(rows))):
        raise DataError(f"{name} has no input_ids; make the trainer first, with parley.SFTTrainer")
    if isinstance(rows, IterableDataset):
        return rows.map(masked, batched=True).filter(_learns)
    relabelled = rows.map(masked, batched=True, num_proc=num_proc, desc="labels on responses only")
    kept = relabelled.filter(_learns, num_proc=num_proc)
    if not len(kept):
        raise DataError(
            f"{name}: no row has anything after {parts.response!r}; give response_part as the chat template writes it"
        )
    if len(kept) < len(rows):
        logger.warning(
            "%s: %d of %d rows have nothing to learn and are left out", name, len(rows) - len(kept), len(rows)
        )
    return kept


def _learns(row: dict[str, Any]) -> bool:
    # The first label is never predicted: it does not count.
    return any(label != IGNORE_INDEX for label in row["labels"][1:])
