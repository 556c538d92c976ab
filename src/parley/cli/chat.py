"""`parley chat`: a conversation in the terminal, or the answers to piped lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli.loading import TrustRemoteCode, change_settings, open_model
from parley.cli.terminal import Interrupts, complain, err, importing, out, quiet_libraries, watch_interrupts
from parley.errors import ParleyError, UsageError
from parley.text import print_text, visible

if TYPE_CHECKING:
    from parley.inference.chat import ChatSession

HELP = """\
/base            answers come from the model as it was before training
/tuned           answers come from the trained model again
/system TEXT     set the system turn; without TEXT, remove it
/set KEY=VALUE   change how answers are sampled: temperature, min_p, max_new_tokens ...
/settings        how they are sampled now
/undo            remove the last question and its answer
/reset           remove the whole conversation
/save FILE       write the conversation as JSON messages; /save! overwrites
/help            this list
/quit            end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    source: Annotated[str | None, typer.Argument(metavar="[RUN|MODEL]", help="A run's folder, or any model.")] = None,
    system: Annotated[str | None, typer.Option(help="System turn.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0: always the most likely token.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other generation setting. Repeatable.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Through transformers, without Parley's decoder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a run's tuned and base model; /base switches.

    Example: parley chat runs/demo
    """
    with importing():
        quiet_libraries()
        from parley.inference.chat import ChatSession

    options = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    changes = [f"{name}={value}" for name, value in options.items() if value is not None]
    loaded = open_model(source, system, [*changes, *(settings or [])], trust_remote_code=trust_remote_code)
    session = ChatSession(
        loaded.model,
        loaded.tokenizer,
        loaded.settings,
        loaded.system,
        engine="plain" if plain else "auto",
        control_tokens=loaded.control_tokens,
    )
    if sys.stdin.isatty():
        _converse(session)
    else:
        _answer_lines(session, sys.stdin)


def _answer_lines(session: ChatSession, lines: Iterator[str]) -> None:
    """Piped input: each line is a question or a command; only answers go to stdout."""
    for line in lines:
        if not (line := line.strip()):
            continue
        if line.startswith("/"):
            if not _run_command(session, line):
                return
        else:
            _stream_answer(session, line)


def _converse(session: ChatSession) -> None:
    # Only where a person types: piped input must not depend on the terminal library.
    import readline  # noqa: F401  (input() edits lines and remembers them once it is imported)

    out.print("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D quits.", style="dim")
    stopped, more = False, True
    with watch_interrupts() as interrupts:
        while more:
            # What takes time is inside, the line about a Ctrl-C too: the next Ctrl-C must not end the program.
            try:
                if stopped:
                    out.print("\n(stopped)", style="dim")
                    stopped = False
                more = _turn(session, interrupts)
            except KeyboardInterrupt:
                stopped = True


def _turn(session: ChatSession, interrupts: Interrupts) -> bool:
    """One line from the terminal, answered. Returns False where it ends the program."""
    try:
        interrupts.seen = False
        line = input("> ").strip()
    except EOFError:
        print()
        return False
    except KeyboardInterrupt:
        print()
        return True
    try:
        if line.startswith("/"):
            return _run_command(session, line)
        if line:
            out.print(_stream_answer(session, line, interrupts), style="dim")
    except ParleyError as error:
        complain(str(error))
    return True


def _stream_answer(session: ChatSession, text: str, interrupts: Interrupts | None = None) -> str:
    """Print the answer as it comes. Returns a line with its length and speed.

    Raises KeyboardInterrupt after the first piece that finds `interrupts` set.
    """
    answer, started, first = "", perf_counter(), 0.0
    # Closing the iterator frees the decoder slot when Ctrl-C interrupts the loop.
    with closing(session.say(text)) as pieces:
        for piece in pieces:
            # Time to first token, the wait that a reader feels.
            first = first or perf_counter() - started
            print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)
            answer += piece
            if interrupts is not None and interrupts.seen:
                raise KeyboardInterrupt
    seconds = perf_counter() - started
    print()
    tokens = len(session.tokenizer.encode(answer, add_special_tokens=False))
    figures = [f"{tokens} tokens", f"{tokens / seconds:,.0f} tokens/s", f"first after {1000 * first:,.0f} ms"]
    return " · ".join([*figures, "base"] if session.use_base else figures)


def _run_command(session: ChatSession, line: str) -> bool:
    """Run a /command. Returns False where it ends the program."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/quit" | "/exit":
            return False
        case "/base" | "/tuned":
            session.use_base = command == "/base"
            message = "the base model answers" if session.use_base else "the tuned model answers"
        case "/reset":
            session.reset()
            message = "conversation removed"
        case "/undo":
            question = session.undo()
            message = "nothing to undo" if question is None else f"removed: {question}"
        case "/system":
            session.system = rest or None
            message = f"system: {session.system}" if session.system else "no system turn"
        case "/set":
            session.settings = change_settings(session.settings, [rest])
            message = _settings(session)
        case "/settings":
            message = _settings(session)
        case "/save" | "/save!":
            message = _save(session, rest, overwrite=command == "/save!")
        case "/help":
            message = HELP
        case _:
            message = f"{command}: no such command; /help lists them"
    print_text(err, message, "dim", wrap=False)
    return True


def _settings(session: ChatSession) -> str:
    return "  ".join(
        f"{key}={value}" for key, value in session.settings.model_dump().items() if value not in (None, [])
    )


def _save(session: ChatSession, name: str, *, overwrite: bool) -> str:
    """Write the messages to the file `name`. Raises UsageError where it cannot, or may not, be written."""
    if not name:
        raise UsageError("/save: wanted the name of a file, for example /save talk.json")
    path = Path(name).expanduser()
    text = json.dumps(session.messages, ensure_ascii=False, indent=1) + "\n"
    try:
        # Mode "x" fails on an existing file in one system call, without a race.
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path}: exists; choose another name, or /save! {name} to overwrite it") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; choose another name") from None
    return f"{len(session.messages)} messages are in {path}"
