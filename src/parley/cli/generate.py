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
from parley.cli.terminal import Stopped, err, importing, quiet_libraries
from parley.errors import UsageError
from parley.text import print_text

if TYPE_CHECKING:
    from parley.inference.prompt_file import PromptRow


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
    slots: Annotated[int, typer.Option(min=1, help="Answers written at a time.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT where it is there.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Through transformers, without the fast decoder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer every prompt of a file.

    Example: parley generate questions.txt --model runs/demo --output answers.jsonl
    """
    with importing():
        quiet_libraries()
        from parley.data.messages import with_system
        from parley.inference.generate import Generator
        from parley.inference.prompt_file import read_prompts

    if output.exists() and not overwrite:
        raise UsageError(f"{output}: is there already; choose another --output, or say --overwrite")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder; make it, or choose another --output")
    asked = read_prompts(prompts)
    opened = open_model(model, system, settings or [], trust_remote_code=trust_remote_code)
    conversations = [messages for row in asked for messages in [with_system(row.messages, opened.system)] * n]
    with (
        Generator(opened.model, opened.tokenizer, slots=slots, engine="plain" if plain else "auto") as generator,
        closing(generator.answers(conversations, opened.settings, base=base)) as answers,
    ):
        _write(output, asked, n, answers)


def _write(output: Path, asked: list[PromptRow], n: int, answers: Iterator[tuple[int, str]]) -> None:
    """Write beside `output` as answers come, in order, and move into place at the end.

    Ctrl-C keeps every row that was answered, later ones too, and raises Stopped.
    """
    partial = output.with_name(f"{output.name}.partial")
    rows = _Rows(asked, n)
    try:
        with partial.open("w", encoding="utf-8") as file:
            try:
                for number, text in _with_progress(answers, len(asked) * n):
                    rows.add(number, text)
                    rows.write_next(file)
            except KeyboardInterrupt:
                rows.write_all(file)
                raise Stopped(f"{rows.written} of {len(asked)} prompts are answered in {partial}") from None
        partial.replace(output)
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}; choose another --output") from None
    print_text(err, f"{rows.written} prompts are answered in {output}", wrap=False)


class _Rows:
    """Answers as they come in, and the rows whose answers are all there."""

    def __init__(self, asked: list[PromptRow], n: int) -> None:
        self.asked, self.n = asked, n
        self.texts: dict[int, str] = {}
        self.next = self.written = 0

    def add(self, number: int, text: str) -> None:
        self.texts[number] = text

    def write_next(self, file: TextIO) -> None:
        """The rows that follow on those written, as far as they are answered."""
        while self.next < len(self.asked) and self._write(file, self.next):
            self.next += 1
        file.flush()

    def write_all(self, file: TextIO) -> None:
        """Every further row that is answered, with gaps."""
        for index in range(self.next, len(self.asked)):
            self._write(file, index)

    def _write(self, file: TextIO, index: int) -> bool:
        numbers = range(index * self.n, (index + 1) * self.n)
        if not all(number in self.texts for number in numbers):
            return False
        said = [self.texts.pop(number) for number in numbers]
        told: dict[str, Any] = {"answer": said[0]} if self.n == 1 else {"answers": said}
        file.write(json.dumps({**self.asked[index].row, **told}, ensure_ascii=False) + "\n")
        self.written += 1
        return True


def _with_progress(answers: Iterator[tuple[int, str]], count: int) -> Iterator[tuple[int, str]]:
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
