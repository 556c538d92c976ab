"""`parley`: the commands, and how they end.

A user's error is one line on stderr and an exit code: 2 for usage, 1 for data, model, device and run. Ctrl-C is
130, SIGTERM 143. Anything else is a fault of Parley's own and keeps its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

import parley
from parley.cli import (
    bench,
    card,
    chat,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    push,
    report,
    runs,
    serve,
    studio,
    train,
)
from parley.cli.terminal import Stopped, complain, err, is_first_process
from parley.errors import ParleyError, UsageError
from parley.text import print_text

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "train": train.train,
    "plan": plan.plan,
    "chat": chat.chat,
    "generate": generate.generate,
    "serve": serve.serve,
    "studio": studio.studio,
    "inspect": inspect.inspect,
    "eval": evaluate.evaluate,
    "export": export.export,
    "card": card.card,
    "push": push.push,
    "report": report.report,
    "runs": runs.runs,
    "bench": bench.bench,
    "doctor": doctor.doctor,
}

INTERRUPTED = 130  # also what typer makes of Ctrl-C

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
for name, command in COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True, epilog="Start with: [bold]parley demo[/bold]")
def parley_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Fine-tune chat models of the Llama family on your own conversations."""
    if version:
        print(f"parley {parley.__version__}")
    elif context.invoked_subcommand is None:
        context.get_help()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or file that is not UTF-8 gets escapes, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Not standalone: typer would print its own errors, over several lines.
        code = app(args=given, prog_name="parley", standalone_mode=False) or 0
    except ParleyError as error:
        complain(str(error))
        code = error.exit_code
    except typer.Abort:  # the end of input at a question
        code = 1
    except typer.TyperException as error:  # a wrong command, option or argument
        complain(f"{error.format_message().rstrip('.')}; {_help_for(given)} lists what there is")
        code = error.exit_code
    except Stopped as stop:
        if is_first_process():
            print_text(err, f"parley: stopped; {stop}", wrap=False)
        code = stop.code
    except BrokenPipeError:  # stdout has no reader any more, as after `| head`
        code = 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        complain(f"{error.filename}: the name is too long for a file; give a shorter one")
        code = UsageError.exit_code
    else:
        if code == INTERRUPTED and is_first_process():
            err.print("parley: stopped")
    _flush_stdout()
    sys.exit(code)


def _flush_stdout() -> None:
    """Write what is buffered, or drop it where the reader is gone: at exit Python would print the error."""
    if sys.stdout is None:  # started without one, as `>&-` does
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help_for(arguments: list[str]) -> str:
    return f"parley {arguments[0]} --help" if arguments and arguments[0] in COMMANDS else "parley --help"


if __name__ == "__main__":
    main()
