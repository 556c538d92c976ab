"""`parley chat`: a conversation in the terminal, or the answers to piped lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from parley.cli.terminal import complain, err, out, quiet_libraries
from parley.errors import ParleyError

if TYPE_CHECKING:
    from parley.generation.chat import ChatSession

UNSEEN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}  # a terminal would obey them
HELP = """\
/base          answers come from the model as it was before training
/tuned         answers come from the trained model again
/system TEXT   set the system turn; without TEXT, remove it
/reset         forget the conversation
/help          this list
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    source: Annotated[str | None, typer.Argument(metavar="[RUN|MODEL]", help="A run's folder, or any model.")] = None,
    system: Annotated[str | None, typer.Option(help="System turn.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0: always the likeliest token.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
) -> None:
    """Talk to a run's tuned and base model; /base switches.

    Example: parley chat runs/demo
    """
    quiet_libraries()
    session = _session(source)
    if system is not None:
        session.system = system
    if temperature is not None:
        session.settings.temperature = temperature
    if max_new_tokens is not None:
        session.settings.max_new_tokens = max_new_tokens
    if sys.stdin.isatty():
        _converse(session)
    else:
        _answer_lines(session, sys.stdin)


def _session(source: str | None) -> ChatSession:
    from parley.config import DEMO_MODEL, ModelSection
    from parley.generation.chat import ChatSession
    from parley.models.load import load_model
    from parley.training.run_folder import RunFolder

    if source is not None and RunFolder.is_run(source):
        run = RunFolder.open(source)
        return ChatSession(*run.load(), settings=run.config.generation, system=run.config.data.system)
    return ChatSession(*load_model(ModelSection(name=source or DEMO_MODEL)))


def _answer_lines(session: ChatSession, lines: Iterator[str]) -> None:
    """Piped input: each line is said or obeyed; answers alone go to stdout."""
    for line in lines:
        if not (line := line.strip()):
            continue
        if line.startswith("/"):
            if not _obey(session, line):
                return
        else:
            _say(session, line)


def _converse(session: ChatSession) -> None:
    import readline  # noqa: F401  (input() edits lines and remembers them once it is imported)

    out.print("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D quits.", style="dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith("/"):
                if not _obey(session, line):
                    return
            elif line:
                out.print(_say(session, line), style="dim")
        except KeyboardInterrupt:
            out.print("\n(stopped)", style="dim")
        except ParleyError as error:
            complain(str(error))


def _say(session: ChatSession, text: str) -> str:
    """Print the answer as it comes; how fast it came."""
    answer, started = "", perf_counter()
    with closing(session.say(text)) as pieces:
        for piece in pieces:
            print(piece.translate(UNSEEN) if sys.stdout.isatty() else piece, end="", flush=True)
            answer += piece
    print()
    tokens = len(session.tokenizer.encode(answer, add_special_tokens=False))
    seconds = perf_counter() - started
    return f"{tokens} tokens, {tokens / seconds:.0f} tokens/s{' (base)' if session.use_base else ''}"


def _obey(session: ChatSession, line: str) -> bool:
    """Carry out a /command; False ends the conversation."""
    command, _, rest = line.partition(" ")
    match command:
        case "/quit" | "/exit":
            return False
        case "/base" | "/tuned":
            session.use_base = command == "/base"
            told = "the base model answers" if session.use_base else "the tuned model answers"
        case "/reset":
            session.reset()
            told = "conversation forgotten"
        case "/system":
            session.system = rest.strip() or None
            told = f"system: {session.system}" if session.system else "no system turn"
        case "/help":
            told = HELP
        case _:
            told = f"{command}: no such command; /help lists them"
    err.print(Text(told, style="dim"))
    return True
