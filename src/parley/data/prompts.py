"""Rows to prompts that answers are sampled to, for reinforcement learning; all their other columns go to rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from parley.config import DataSection
from parley.data.bad_rows import BadRow, BadRows
from parley.data.columns import Fields, listed
from parley.data.encoding import Rendered
from parley.data.example import Example, Message
from parley.data.files import ERROR, Row
from parley.data.heldout_split import heldout_section, is_heldout, sampled_rows
from parley.data.messages import with_system
from parley.data.packing import ORIGIN
from parley.data.preference_formats import instruction_turns, turns_of
from parley.data.prepare import PREVIEWED, Prepared
from parley.data.render import pin_date, pin_settings, render_prompt
from parley.data.sources import located, read_rows
from parley.data.summary import DataSummary
from parley.data.tool_calls import parse_tools
from parley.errors import DataError, UsageError, one_line

PROMPT = "prompt"
TOOLS = "tools"
_COLUMNS = (("prompt",), ("instruction", "question", "problem", "query"), ("messages", "conversations", "conversation"))
_OPTIONAL = (("input", "context"), ("system", "system_prompt"), ("tools", "functions"))
_ANSWER = ("answer", "output", "response", "solution")
MEDIA = ("image", "images", "audio", "video")
RESERVED = ("prompts", "completions", "completion", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Names under which a reward function gets something else than a column."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt as turns, or as text that an answer continues; the answer that the row has, if any; other columns."""

    origin: str
    prompt: list[Message] | str
    reference: str | None
    tools: list[dict[str, Any]] | None
    columns: dict[str, Any]

    @property
    def example(self) -> Example:
        """With the row's own answer, for the report's questions and for the side that a held-out share is chosen by."""
        if isinstance(self.prompt, str):
            return Example(self.origin, prompt=self.prompt, completion=self.reference or "")
        answer: Message = {"role": "assistant", "content": self.reference}
        return Example(self.origin, prompt=self.prompt, completion=[answer], tools=self.tools)


def prepare_prompts(data: DataSection, tokenizer: Any, max_prompt: int) -> Prepared:
    """`parley.data.prepare.prepare` for prompts. `train` and `heldout` have a column `prompt`, and the rows' own ones.

    Prompts of more than `max_prompt` tokens follow `data.overlong`: they are dropped, or an error.

    Raises DataError and UsageError in one line, as `prepare` does.
    """
    _check_settings(data)
    pin_date(tokenizer, data.date)
    pin_settings(tokenizer, data.template)
    reader = _PromptReader(data, tokenizer, max_prompt, data.source)
    share, rows = data.heldout_share, list(reader.rows())
    sampled = sampled_rows(0 if data.heldout else data.heldout_rows, len(rows))
    train, held = [], []
    for index, (row, rendered) in enumerate(rows):
        if index in sampled if share is None else is_heldout(row.example, share):
            held.append(row)
        else:
            train.append((row, rendered))
            reader.summary.keep(len(rendered.input_ids), 0)
    if data.heldout and share is None:
        other = _PromptReader(heldout_section(data), tokenizer, max_prompt, data.heldout, "held-out")
        held = [row for row, _ in other.rows()]
        reader.summary.heldout_dropped = dict(other.summary.dropped)
    if not train:
        raise DataError(f"{data.source}: nothing left to train on; {reader.summary.nothing_left()}")
    reader.bad_rows.check()
    if data.heldout and not held:
        raise DataError(f"data.heldout {data.heldout}: nothing left to evaluate on")
    reader.summary.heldout, reader.summary.heldout_source = len(held), data.heldout
    preview = train[:PREVIEWED]
    return Prepared(
        _dataset([row for row, _ in train], data.source),
        _dataset(held, data.source) if held else None,
        [row.example for row in held],
        reader.summary,
        reader.bad_rows,
        [rendered for _, rendered in preview],
        [row.origin for row, _ in preview],
    )


class _PromptReader:
    """The prompts of a source, and what became of its rows, in `summary`."""

    def __init__(self, data: DataSection, tokenizer: Any, max_prompt: int, where: str, prefix: str = "") -> None:
        self.data, self.tokenizer, self.max_prompt, self.prefix = data, tokenizer, max_prompt, prefix
        source = read_rows(data.source, data, keep_bad=True)
        assert not isinstance(source, IterableDataset), "streams are refused"
        self.source, self.bad_rows = source, BadRows(data, advise=not prefix)
        self.summary = DataSummary(source=where)
        self.canonical = self.own = ""  # the column that holds prompts in the first row, and its name there

    def rows(self) -> Iterator[tuple[PromptRow, Rendered]]:
        for origin, row in located(self.source, self.prefix):
            self.bad_rows.rows += 1
            self.summary.rows += 1
            try:
                prompt = self._row(origin, row)
                ids = self._ids(prompt)
            except DataError as error:
                self.bad_rows.handle(BadRow(origin, error, row))
                self.summary.skip(origin, str(error))
                continue
            if len(ids) <= self.max_prompt:
                yield prompt, Rendered(ids, [False] * len(ids))
            elif self.data.overlong == "error":
                raise DataError(
                    f"{origin}: a prompt of {len(ids):,} tokens, the longest allowed is {self.max_prompt:,}; raise "
                    "model.max_seq_length, lower training.max_completion_length, or set data.overlong: drop"
                )
            else:
                self.summary.drop(f"prompts longer than {self.max_prompt:,} tokens", origin)
        if not self.summary.rows:
            raise DataError(f"{self.summary.source}: is empty; wanted at least one row")

    def _row(self, origin: str, row: Row) -> PromptRow:
        if ERROR in row:
            raise DataError(row[ERROR])
        fields = Fields(row, origin, (*_COLUMNS, *_OPTIONAL, _ANSWER), self.data)
        canonical = next((names[0] for names in _COLUMNS if names[0] in fields.own), "")
        if not self.canonical:
            if not canonical:
                raise DataError(
                    f"{origin}: got columns {listed(row)}; wanted prompts: prompt / question / instruction (input) / "
                    "messages; name yours in data.columns"
                )
            self._recognise(canonical, fields)
        if canonical != self.canonical:
            raise DataError(f"{origin}: has no {self.own!r}, as the first row has; keep one format in a data set")
        for column in MEDIA:
            if row.get(column):
                raise DataError(f"{origin}: has {column!r}; Parley trains on text alone: remove the column, or the row")
        prompt, reference = self._prompt(canonical, fields)
        tools = parse_tools(fields.value(TOOLS), origin)
        own = fields.own[canonical]
        if taken := [name for name in row if name in RESERVED]:
            raise UsageError(
                f"data: rewards get answers, and more, under the name {taken[0]!r}, which is a column: rename it"
            )
        columns = {name: value for name, value in row.items() if name not in (own, PROMPT, TOOLS)}
        return PromptRow(origin, prompt, reference, tools, columns)

    def _recognise(self, canonical: str, fields: Fields) -> None:
        self.canonical, self.own = canonical, fields.own[canonical]
        text = isinstance(fields.value(canonical), str) and canonical == PROMPT and not _is_json(fields.text(PROMPT))
        kind = "plain text that answers continue (questions of a chat are turns, or a column question)"
        self.summary.prompts_only = True
        self.summary.format = "text prompts" if text else "prompts"
        self.summary.reason = f"{kind if text else 'prompts'} (column {self.own})"

    def _prompt(self, canonical: str, fields: Fields) -> tuple[list[Message] | str, str | None]:
        """The prompt, and the answer behind it where it is a whole conversation."""
        answer = fields.value("answer")
        reference = answer if isinstance(answer, str) else None
        if canonical == PROMPT and self.summary.format == "text prompts":
            value = fields.value(PROMPT)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{fields.origin}: {fields.own[PROMPT]!r} is no text; wanted what an answer continues")
            return value, reference
        messages = instruction_turns(fields) if canonical == "instruction" else turns_of(fields, canonical)
        while messages and messages[-1]["role"] == "assistant":
            reference = messages[-1].get("content")
            messages = messages[:-1]
        if not any(turn["role"] in ("user", "tool") for turn in messages):
            raise DataError(f"{fields.origin}: the prompt has no question; wanted a user's turn")
        return with_system(messages, fields.text("system") or fields.data.system), reference

    def _ids(self, row: PromptRow) -> list[int]:
        if isinstance(row.prompt, str):
            return list(self.tokenizer(row.prompt)["input_ids"])
        try:
            return render_prompt(self.tokenizer, row.prompt, row.tools, self.data.control_tokens)
        except DataError as error:
            raise DataError(f"{row.origin}: {error}") from None


def _check_settings(data: DataSection) -> None:
    """Raises UsageError for settings of supervised data that prompts do not follow."""
    for name, unsupported, instead in (
        ("data.format", data.format != "auto", "prompts are recognised by their columns: leave it out"),
        ("data.streaming", data.streaming, "prompts are rendered before training: set it to false"),
        ("data.overlong", data.overlong not in ("drop", "error"), "a prompt is not cut: set drop or error"),
        ("data.train_on", data.train_on not in ("all",), "sampled answers are learned: leave it out"),
        ("data.drop", bool(data.drop), "its checks are of answers: leave it out"),
    ):
        if unsupported:
            raise UsageError(f"{name} is not followed with prompts; {instead}")


def _dataset(rows: list[PromptRow], where: str) -> Dataset:
    """Raises DataError for a column of several types."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns: dict[str, list[Any]] = {PROMPT: [row.prompt for row in rows], ORIGIN: [row.origin for row in rows]}
    columns |= {name: [row.columns.get(name) for row in rows] for name in names}
    if any(row.tools for row in rows):
        columns[TOOLS] = [json.dumps(row.tools) for row in rows]  # Arrow would give all tools the same keys
    made: dict[str, Any] = {}
    for name, values in columns.items():
        try:
            made[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"{where}: column {name!r}, which rewards get, has several types ({one_line(error, 80)}); give it one"
            ) from None
    return Dataset(pa.table(made))


def _is_json(text: str) -> bool:
    """CSV files hold turns as JSON text."""
    return text.lstrip().startswith("[{")
