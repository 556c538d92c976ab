from __future__ import annotations

import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from parley.cli.chat import _converse, _stream_answer, _turn
from parley.cli.terminal import watch_interrupts
from parley.config import GenerationSection
from parley.inference.generate import generate
from parley.training.run_folder import RunFolder

GREEDY = GenerationSection(temperature=0, min_p=0, max_new_tokens=8)  # the run's own settings


def greedy(folder: RunFolder, *questions: str, base: bool = False, system: str | None = None) -> str:
    """What the last of `questions` is answered, the conversation told from its beginning."""
    model, tokenizer = folder.load()
    messages = [{"role": "system", "content": system}] if system else []
    for question in questions:
        messages.append({"role": "user", "content": question})
        if base:
            with model.disable_adapter():
                answer = generate(model, tokenizer, [messages], GREEDY)[0]
        else:
            answer = generate(model, tokenizer, [messages], GREEDY)[0]
        messages.append({"role": "assistant", "content": answer})
    return answer


def test_piped_lines_are_answered_by_tuned_and_base(run: RunFolder, parley_process: Callable[..., Any]) -> None:
    lines = ["Ahoy!", "", "And the sea?", "/reset", "/base", "Ahoy!", "/tuned", "/reset", "/system Be brief.", "Ahoy!"]
    ended = parley_process("chat", run.path, stdin="\n".join(lines))
    assert ended.code == 0, ended.err
    answers = [
        greedy(run, "Ahoy!"),
        greedy(run, "Ahoy!", "And the sea?"),
        greedy(run, "Ahoy!", base=True),
        greedy(run, "Ahoy!", system="Be brief."),
    ]
    assert len(set(answers)) == 4
    assert ended.out == "".join(f"{answer}\n" for answer in answers)
    told = ["conversation removed", "the base model answers", "the tuned model answers"]
    assert ended.err.splitlines() == [*told, "conversation removed", "system: Be brief."]


def test_options_change_how_a_plain_model_talks(
    parley: Callable[..., Any], tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*options: str) -> str:
        monkeypatch.setattr(sys, "stdin", iter_stdin(["Ahoy!"]))
        ended = parley("chat", tiny_llama_folder, "--temperature", "0", *options)
        assert ended.code == 0, ended.err
        return ended.out

    long = say("--max-new-tokens", "9")
    short = say("--max-new-tokens", "2")
    assert 0 < len(short.strip()) < len(long.strip())
    assert say("--max-new-tokens", "9", "--system", "You are a pirate.") != long


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["Ahoy!", "/base"], "parley: error: the base model cannot answer: this model has no adapter"),
        (["What be the sea? " * 2000], "parley: error: the conversation is"),
    ],
)
def test_errors_end_piped_input_in_one_line(
    parley: Callable[..., Any], tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "stdin", iter_stdin(lines))
    ended = parley("chat", tiny_llama_folder, "--max-new-tokens", "2")
    assert ended.code == 1
    assert ended.err.startswith(said)
    assert ended.err.count("\n") == 1 + said.count("\n")


def test_unknown_commands_are_told(
    parley: Callable[..., Any], tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", iter_stdin(["/frobnicate", "/help", "/quit", "never said"]))
    ended = parley("chat", tiny_llama_folder)
    assert (ended.code, ended.out) == (0, "")
    assert ended.err.startswith("/frobnicate: no such command")
    assert "/system TEXT" in ended.err


def test_settings_are_changed_shown_and_checked(
    parley: Callable[..., Any], tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/set temperature=0.25", "/set stop=[arr]", "/settings", "/set temprature=1"]
    monkeypatch.setattr(sys, "stdin", iter_stdin(lines))
    ended = parley("chat", tiny_llama_folder, "--set", "top_k=7")
    shown = ended.err.splitlines()[2]
    assert ended.code == 2
    assert "temperature=0.25" in shown
    assert "top_k=7" in shown
    assert "stop=['arr']" in shown
    assert ended.err.splitlines()[3].endswith("did you mean 'temperature'?")


def test_a_conversation_is_saved_and_undone(
    parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = tmp_path / "talk.json"
    lines = ["/undo", "Ahoy!", "And the sea?", "/undo", f"/save {talk}", "/undo", f"/save! {talk}", f"/save {talk}"]
    monkeypatch.setattr(sys, "stdin", iter_stdin(lines[:5]))
    ended = parley("chat", tiny_llama_folder, "--temperature", "0", "--max-new-tokens", "4", "--system", "Be brief.")
    assert ended.err.splitlines() == ["nothing to undo", "removed: And the sea?", f"3 messages are in {talk}"]
    saved = json.loads(talk.read_text(encoding="utf-8"))
    answer = ended.out.splitlines()[0]
    assert saved == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ahoy!"},
        {"role": "assistant", "content": answer},
    ]
    monkeypatch.setattr(sys, "stdin", iter_stdin(lines[6:]))
    ended = parley("chat", tiny_llama_folder)
    assert json.loads(talk.read_text(encoding="utf-8")) == []
    assert ended.code == 2
    assert "exists; choose another name, or /save! " in ended.err


def test_a_state_space_model_chats(
    parley: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba's cache has another name and form, and its configuration no number of positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": len(tiny_tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "stdin", iter_stdin(["Ahoy!", "And the sea?"]))
    ended = parley("chat", tmp_path, "--max-new-tokens", "4")
    assert ended.code == 0, ended.err
    assert len(ended.out.strip()) > 2


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Session:
        tokenizer = type("Tokenizer", (), {"encode": staticmethod(lambda text, **_: list(text))})
        use_base = False

        def say(self, text: str) -> Iterator[str]:
            yield from (piece for piece in ["\x1b[31mred", "\x9b2J\u202e", "\x07 a\tb\n"])

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _stream_answer(Session(), "Ahoy!")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "\u241b[31mred\u24212J\ufffd\u2407 a\tb\n\n"


class iter_stdin:
    """Piped input."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def isatty(self) -> bool:
        return False

    def __iter__(self) -> Iterator[str]:
        return iter(f"{line}\n" for line in self.lines)


class Terminal:
    """`parley` on a terminal of its own, typed to and read from."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "parley.cli.main", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
        os.close(slave)
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Read until `pattern` has come after what was waited for before; what was read."""
        deadline = monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    raise AssertionError(f"ended without {pattern!r}: {self.text!r}") from None
        read, self.text = self.text[: found.end()], self.text[found.end() :]
        return read


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the process as from a keyboard


@pytest.fixture
def terminal(tiny_llama_folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A chat whose answers last a minute, so that a late Ctrl-C on a busy machine still interrupts one."""
    folder = tmp_path / "llama"
    shutil.copytree(tiny_llama_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 65536
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    terminal = Terminal("chat", str(folder), "--temperature", "0", "--max-new-tokens", "60000")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.master)


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(terminal: Terminal) -> None:
    terminal.until(r"/help.*> ")
    terminal.type("Ahoy!\n")
    terminal.until("Ahoy!.*?\n.{20}")  # the answer has begun
    terminal.type("\x03")
    terminal.until(r"\(stopped\).*> ", seconds=10)
    terminal.type("\x03")  # at the prompt it only begins a new line
    terminal.type("\n/base\n")
    terminal.until("this model has no adapter.*> ", seconds=10)
    terminal.type("\x04")
    assert terminal.process.wait(timeout=20) == 0


class Talk:
    """A session whose answer has five pieces; `between` is called before the second."""

    tokenizer = type("Tokenizer", (), {"encode": staticmethod(lambda text, **_: list(text))})
    use_base = False

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        self.between, self.given = between, 0

    def say(self, text: str) -> Iterator[str]:
        for number in range(5):
            if number == 1:
                self.between()
            self.given += 1
            yield f"piece {number} "


def converse(session: Any, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """A conversation at the terminal; Ctrl-D after `lines`."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    _converse(session)


def test_an_interrupt_that_a_destructor_drops_still_stops_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python prints and drops what a destructor raises, KeyboardInterrupt too."""

    class Garbage:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    talk = Talk(between=lambda: Garbage() and None)
    converse(talk, monkeypatch, ["Ahoy!"])
    assert [unraisable.exc_type for unraisable in dropped] == [KeyboardInterrupt]
    assert talk.given == 2
    assert capsys.readouterr().out.count("(stopped)") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_dropped_at_the_prompt_does_not_stop_the_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk()
    with watch_interrupts() as interrupts:
        interrupts.seen = True
        monkeypatch.setattr("builtins.input", lambda _: "Ahoy!")
        try:
            assert _turn(talk, interrupts)  # type: ignore[arg-type]
        except KeyboardInterrupt:  # which would end pytest
            pytest.fail("the next answer was stopped")
    assert talk.given == 5


def test_ctrl_c_at_the_prompt_begins_a_new_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    presses = iter([KeyboardInterrupt, KeyboardInterrupt, EOFError])

    def read(prompt: str) -> str:
        raise next(presses)

    monkeypatch.setattr("builtins.input", read)
    _converse(Talk())  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines()[1:] == ["", "", ""]


def test_ctrl_c_between_any_two_lines_leaves_the_conversation_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGINT at each line of a conversation in turn: it goes on, to its last question and Ctrl-D."""
    interrupted = set()
    for position in itertools.count():
        lines_run = 0

        def trace(frame: Any, event: str, _: Any, position: int = position) -> Any:
            nonlocal lines_run
            if frame.f_code not in (_turn.__code__, _stream_answer.__code__):
                return None if event == "call" else trace
            if event == "line":
                lines_run += 1
                if lines_run == position + 1:
                    interrupted.add((frame.f_code.co_name, frame.f_lineno))
                    signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            converse(Talk(), monkeypatch, ["Ahoy!", "/settings-of-nobody", "Farewell!"])
        finally:
            sys.settrace(None)
        if lines_run <= position:  # past the end: nothing was interrupted
            break
    assert len(interrupted) > 20
    assert "(stopped)" in capsys.readouterr().out


def test_a_second_ctrl_c_while_the_first_is_shown_does_not_end_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def show(text: str, **_: Any) -> None:
        shown.append(text)
        if len([text for text in shown if "stopped" in text]) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("parley.cli.chat.out.print", show)
    converse(Talk(lambda: signal.raise_signal(signal.SIGINT)), monkeypatch, ["Ahoy!", "Farewell!"])
    assert shown.count("\n(stopped)") == 3  # the first answer twice, as its line was interrupted, and the second
