"""`parley inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from parley.cli.terminal import importing, out, quiet_libraries
from parley.errors import DataError, RunError
from parley.text import print_text

if TYPE_CHECKING:
    from parley.config import DataSection
    from parley.data.conversation import Example


def inspect(
    data: Annotated[str, typer.Argument(help="Hub id, file (.json .jsonl .csv .parquet) or folder.")],
    model: Annotated[str, typer.Option(help="Hub id or folder whose chat template writes the row.")],
    row: Annotated[int, typer.Option(min=1, help="Which row; the first is 1.")] = 1,
    train_on: Annotated[Literal["all", "last"], typer.Option(help="Assistant turns that are learned.")] = "all",
    system: Annotated[str | None, typer.Option(help="System turn for conversations without one.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids as well.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the coloured row to this file.")] = None,
) -> None:
    """Show a row as the model sees it, trained tokens in colour.

    Example: parley inspect rows.jsonl --model meta-llama/Llama-3.2-1B-Instruct --row 3
    """
    with importing():
        quiet_libraries()
        from parley.config import DataSection, ModelSection
        from parley.data.preview import pieces, to_html, to_terminal
        from parley.data.render import pin_date, render_example
        from parley.models.tokenizer import load_tokenizer

    section = DataSection(source=data, train_on=train_on, system=system)
    example = _example(section, row)
    tokenizer = load_tokenizer(ModelSection(name=model))
    pin_date(tokenizer, section.date)
    rendered = render_example(tokenizer, example, train_on)
    shown = pieces(tokenizer, rendered)

    out.print(to_terminal(shown))
    summary = f"{example.origin}: {len(rendered.input_ids)} tokens, {sum(rendered.mask)} trained (in colour)"
    print_text(out, summary, "dim", wrap=False)
    if ids:
        styles = ("green" if trained else "dim" for trained in rendered.mask)
        out.print(
            Text.assemble(*((f"{token} ", style) for token, style in zip(rendered.input_ids, styles, strict=True)))
        )
    if html:
        _write(html, to_html(shown))
        print_text(out, f"written: {html}", "dim", wrap=False)


def _example(section: DataSection, row: int) -> Example:
    from parley.data.prepare import read_examples

    format, examples = read_examples(section)
    print_text(out, format.reason, "dim", wrap=False)
    count = 0
    for count, example in enumerate(examples, start=1):
        if count == row:
            return example
    raise DataError(f"{section.source}: got --row {row}; it has {count} rows, and the first is 1")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another file with --html") from None
