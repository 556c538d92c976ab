"""From examples to training rows: rendered, within the maximum length, with at least one supervised token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, TypeAlias, TypeGuard

from parley.config import DataSection
from parley.data.bad_rows import BadRow, BadRows, LeftOut, of_example
from parley.data.example import WEIGHT, WEIGHT_SPANS, Example
from parley.data.pretokenized import as_rendered
from parley.data.render import Rendered, RenderOptions, encode, render_many, write_texts
from parley.data.summary import DataSummary
from parley.data.supervision import TrainOn
from parley.errors import DataError

Candidate: TypeAlias = "Example | BadRow | LeftOut"

BATCH = 256
"""Rows tokenised at once."""
AHEAD = 4
"""Batches that threads tokenise while the template writes the next: also where tokenizers' own threads are off."""

SHORTENED = {
    "truncate": "cut to their first {} tokens",
    "truncate-start": "cut to their last {} tokens",
    "split": "split into parts of at most {} tokens",
    "keep-whole-turns": "cut after their last turn that fits {} tokens",
}
"""Policies that keep a part of a row that is too long, and how the summary reports them."""
NO_ANSWER = "without an assistant turn"
NOTHING_SUPERVISED = "without supervised tokens"


def render_examples(
    examples: Iterable[Candidate],
    tokenizer: Any,
    data: DataSection,
    max_length: int,
    summary: DataSummary,
    batch: int = BATCH,
    ahead: int = AHEAD,
    bad_rows: BadRows | None = None,
) -> Iterator[tuple[Example, Rendered] | None]:
    """For each example itself and its rendering, or None where it is dropped, which `summary` then says.

    A bad row (a BadRow, one that the template refuses, with `overlong: error` one that is too long) goes to `bad_rows`,
    which raises its error or skips it. An example cut by `data.overlong` is yielded as cut. Reads `batch` examples at
    once, and `ahead` more batches before the first is yielded.
    """
    bad_rows = bad_rows or BadRows(data)
    for taken, outcomes in _batches(examples, tokenizer, data, batch, ahead):
        # `outcomes` has an entry only for the examples that the tokenizer renders, in the same order.
        rendered = iter(outcomes)
        for example in taken:
            bad_rows.rows += 1
            outcome = next(rendered) if _is_rendered(example, data) else None
            try:
                yield _outcome(example, outcome, tokenizer, data, max_length, summary)
            except DataError as error:
                assert not isinstance(example, LeftOut)
                bad = example if isinstance(example, BadRow) else of_example(example, error)
                bad_rows.handle(bad)
                summary.skip(bad.origin, str(bad.error))
                yield None


def _outcome(
    example: Candidate,
    rendered: Rendered | DataError | None,
    tokenizer: Any,
    data: DataSection,
    max_length: int,
    summary: DataSummary,
) -> tuple[Example, Rendered] | None:
    """What becomes of an example; `rendered`: its rendering, where it needs one. Raises DataError for a bad row."""
    if isinstance(example, BadRow):
        raise example.error
    if isinstance(example, LeftOut):
        summary.drop(f"by data.drop={example.check}", example.origin)
        return None
    if example.input_ids is not None and example.labels is not None:
        rendered = as_rendered(example, len(tokenizer))
    if rendered is None:
        summary.drop(NO_ANSWER, example.origin)
        return None
    return _fitting(example, _checked(rendered, example), tokenizer, data, max_length, summary)


def _is_rendered(example: Candidate, data: DataSection) -> TypeGuard[Example]:
    """Whether the tokenizer renders the example: not a bad row, not token ids already, and with an answer."""
    return isinstance(example, Example) and example.input_ids is None and has_answer(example, data.train_on)


def _batches(
    examples: Iterable[Candidate], tokenizer: Any, data: DataSection, batch: int, ahead: int
) -> Iterator[tuple[list[Candidate], list[Rendered | DataError]]]:
    """Examples by the batch, with the renderings of those that need one. What is wrong is raised in its turn."""
    examples = iter(examples)
    broken: DataError | None = None
    waiting: deque[tuple[list[Candidate], Future[list[Rendered | DataError]]]] = deque()
    tokenizer([""], add_special_tokens=False)  # sets its padding aside, which no thread can while others use it
    # Threads rather than processes: the fast tokenizer releases the GIL while it encodes.
    with ThreadPoolExecutor(ahead or 1) as threads:
        try:
            while taken := list(islice(examples, batch)):
                texts = write_texts(
                    tokenizer, [example for example in taken if _is_rendered(example, data)], render_options(data)
                )
                waiting.append((taken, threads.submit(encode, tokenizer, texts)))
                if len(waiting) > ahead:
                    taken, outcomes = waiting.popleft()
                    yield taken, outcomes.result()
        except DataError as error:  # of the source; the rows before it come first
            broken = error
        for taken, outcomes in waiting:
            yield taken, outcomes.result()
    if broken is not None:
        raise broken


def _fitting(
    example: Example, rendered: Rendered, tokenizer: Any, data: DataSection, max_length: int, summary: DataSummary
) -> tuple[Example, Rendered] | None:
    if len(rendered.input_ids) > max_length:
        shortened = _shortened(example, rendered, tokenizer, data, max_length)
        if shortened is None:
            summary.drop(f"longer than {max_length:,} tokens", example.origin)
            return None
        summary.shorten(SHORTENED[data.overlong].format(f"{max_length:,}"), example.origin)
        example, rendered = shortened
    if not any(rendered.mask[1:]):  # the first token of a row is never predicted
        summary.drop(NOTHING_SUPERVISED, example.origin)
        return None
    for note in rendered.notes:
        summary.note(note, example.origin)
    return example, rendered


def _shortened(
    example: Example, rendered: Rendered, tokenizer: Any, data: DataSection, max_length: int
) -> tuple[Example, Rendered] | None:
    """An example that is too long, by `data.overlong`: cut, as it is where `split_row` cuts it later, or None."""
    match data.overlong:
        case "keep-whole-turns":
            return _longest_prefix(example, tokenizer, data, max_length)
        case "truncate":
            return example, rendered.part(0, max_length)
        # The end of the row holds the last answer, which is what this policy keeps.
        case "truncate-start":
            return example, rendered.part(len(rendered.input_ids) - max_length, None)
        case "split":
            return example, rendered
        case "error":
            raise DataError(
                f"{example.origin}: {len(rendered.input_ids):,} tokens, the longest allowed is {max_length:,}; raise "
                f"model.max_seq_length, or set data.overlong to drop, {', '.join(SHORTENED)}"
            )
    return None


def split_row(rendered: Rendered, data: DataSection, max_length: int) -> list[Rendered]:
    """`rendered` alone, or with `overlong: split` its parts of at most `max_length` tokens that have a supervised one.

    The first token of a part is never predicted, and no part attends to another.
    """
    if data.overlong != "split" or len(rendered.input_ids) <= max_length:
        return [rendered]
    starts = range(0, len(rendered.input_ids), max_length)
    parts = [rendered.part(start, start + max_length) for start in starts]
    return [part for part in parts if any(part.mask[1:])]


def _longest_prefix(
    example: Example, tokenizer: Any, data: DataSection, max_length: int
) -> tuple[Example, Rendered] | None:
    """The longest run of whole turns from the start that ends with the assistant and fits, found by halving."""
    messages = example.messages or []
    ends = [number for number, message in enumerate(messages, 1) if message["role"] == "assistant"]
    best = None
    low, high = 0, len(ends) - 1  # the whole conversation is known not to fit
    if messages and messages[-1]["role"] != "assistant":
        high = len(ends)
    # Each further turn adds tokens, so bisection finds the longest prefix with log2(turns) renderings.
    while low < high:
        middle = (low + high) // 2
        shorter = replace(example, messages=messages[: ends[middle]])
        rendered = _checked(render_many(tokenizer, [shorter], render_options(data))[0], shorter)
        if len(rendered.input_ids) <= max_length:
            best, low = (shorter, rendered), middle + 1
        else:
            high = middle
    return best


def _checked(outcome: Rendered | DataError, example: Example) -> Rendered:
    if isinstance(outcome, DataError):
        raise DataError(f"{example.origin}: {outcome}")
    return outcome


def has_answer(example: Example, train_on: TrainOn) -> bool:
    """Whether a turn may be supervised: an assistant's, one of the given roles, or one with a weight of its own."""
    turns = example.completion if isinstance(example.completion, list) else example.messages
    if turns is None or train_on == "inputs":
        return True
    roles = {"assistant", *train_on} if isinstance(train_on, list) else {"assistant"}
    return any(turn["role"] in roles or turn.get(WEIGHT) or turn.get(WEIGHT_SPANS) for turn in turns)


def render_options(data: DataSection) -> RenderOptions:
    return RenderOptions(data.train_on, data.end_tokens, data.control_tokens)
