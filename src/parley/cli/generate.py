"""`parley generate`: the answers to a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parley.cli.loading import TrustRemoteCode, open_model
from parley.cli.terminal import Stopped, err, importing, quiet_libraries, renamed_option
from parley.errors import DataError, ParleyError, UsageError
from parley.text import one_line, print_text
from parley.units import counted

if TYPE_CHECKING:
    from parley.inference.generate import Engine
    from parley.inference.prompt_file import PromptRow

Answer = str | ParleyError


def generate(
    prompts: Annotated[Path, typer.Argument(help=".txt with a prompt a line, or .jsonl/.json of prompt or messages.")],
    output: Annotated[Path, typer.Option(help="JSON lines: each row with its answer, in the file's order.")],
    model: Annotated[str | None, typer.Option(metavar="RUN|MODEL", help="A run's folder, or any model.")] = None,
    base: Annotated[bool, typer.Option("--base", help="As the model was before training.")] = False,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 1,
    system: Annotated[str | None, typer.Option(help="System turn of prompts that have none.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="temperature=0.7, seed=1 ... Repeatable.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers generated at a time.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT where it exists.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Through transformers, without Parley's decoder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    slots: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
) -> None:
    """Answer every prompt of a file.

    One that cannot be answered gets an `error` in OUTPUT, and the exit code is 1.

    Example: parley generate questions.txt --model runs/demo --output answers.jsonl
    """
    with importing():
        quiet_libraries()
        from parley.data.messages import with_system
        from parley.inference.generate import Generator
        from parley.inference.prompt_file import read_prompts

    # Options are checked before the model is loaded, which may take minutes.
    max_num_seqs = renamed_option("--slots", slots, "--max-num-seqs", max_num_seqs)
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists; choose another --output, or add --overwrite")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder; make it, or choose another --output")
    rows = read_prompts(prompts)
    loaded = open_model(model, system, settings or [], trust_remote_code=trust_remote_code)
    # The n answers of a prompt are neighbours, so that rows are complete in the file's order.
    conversations = [messages for row in rows for messages in [with_system(row.messages, loaded.system)] * n]
    engine: Engine = "plain" if plain else "auto"
    with (
        Generator(
            loaded.model,
            loaded.tokenizer,
            slots=max_num_seqs,
            engine=engine,
            control_tokens=loaded.control_tokens,
        ) as generator,
        closing(generator.answers_or_errors(conversations, loaded.settings, base=base)) as answers,
    ):
        failed = _write(output, rows, n, answers)
    if failed:
        index, error = failed[0]
        count = f"{len(failed)} of {len(rows)} prompts were not answered"
        raise DataError(f"{count}, the first at {rows[index].origin}: {error}; each has its error in {output}")


def _write(
    output: Path, prompts: list[PromptRow], n: int, answers: Iterator[tuple[int, Answer]]
) -> list[tuple[int, str]]:
    """Write rows, in order, to a file beside `output` as answers come, and rename it at the end.

    Returns the index and the error of each prompt that was not answered. Ctrl-C keeps every row that was answered,
    later ones too, and raises Stopped.
    """
    partial = output.with_name(f"{output.name}.partial")
    rows = _Rows(prompts, n)
    try:
        with partial.open("w", encoding="utf-8") as file:
            try:
                for index, answer in _with_progress(answers, len(prompts) * n):
                    rows.add(index, answer)
                    rows.write_next(file)
            except KeyboardInterrupt:
                rows.write_all(file)
                raise Stopped(f"{rows.answered} of {len(prompts)} prompts are answered in {partial}") from None
        partial.replace(output)
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}; choose another --output") from None
    verb = "is" if rows.answered == 1 else "are"
    print_text(err, f"{counted(rows.answered, 'prompt')} {verb} answered in {output}", wrap=False)
    return rows.failed


class _Rows:
    """The answers so far, `n` for each prompt, and the rows that are complete."""

    def __init__(self, prompts: list[PromptRow], n: int) -> None:
        self.prompts, self.n = prompts, n
        self.answers: dict[int, Answer] = {}  # by index among all answers
        self.next = self.answered = 0
        self.failed: list[tuple[int, str]] = []

    def add(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer

    def write_next(self, file: TextIO) -> None:
        """Write the rows that follow on those written, as far as they are complete."""
        while self.next < len(self.prompts) and self._write(file, self.next):
            self.next += 1
        file.flush()

    def write_all(self, file: TextIO) -> None:
        """Write every further row that is complete, with gaps."""
        for row in range(self.next, len(self.prompts)):
            self._write(file, row)

    def _write(self, file: TextIO, row: int) -> bool:
        indices = range(row * self.n, (row + 1) * self.n)
        if not all(index in self.answers for index in indices):
            return False
        answers = [self.answers.pop(index) for index in indices]
        error = next((answer for answer in answers if isinstance(answer, ParleyError)), None)
        if error is not None:  # all n answers have the same prompt, and so the same error
            self.failed.append((row, one_line(error)))
            columns: dict[str, Any] = {"error": str(error)}
        else:
            self.answered += 1
            columns = {"answer": answers[0]} if self.n == 1 else {"answers": answers}
        file.write(_json_line({**self.prompts[row].row, **columns}))
        return True


def _json_line(columns: dict[str, Any]) -> str:
    """One row of JSON lines; escaped where a column of the file holds a lone surrogate, which UTF-8 cannot."""
    line = json.dumps(columns, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in line):
        line = json.dumps(columns)
    return line + "\n"


def _with_progress(answers: Iterator[tuple[int, Answer]], count: int) -> Iterator[tuple[int, Answer]]:
    bar = Progress(
        TextColumn("answering"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        yield from bar.track(answers, total=count)
