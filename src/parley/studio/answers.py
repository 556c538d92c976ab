"""The models of a comparison from the studio's side: loaded, asked, watched and freed."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

from parley.config import GenerationSection
from parley.errors import UsageError
from parley.quiet_libraries import quiet_libraries
from parley.studio.answering import Loaded, Message, Note, Piece, Prompted, Question, Side, Token, answer_questions
from parley.studio.child import begin_child

State = Literal["empty", "loading", "ready", "failed"]
IDLE_SECONDS = 15 * 60.0  # without a question; then the memory is freed
END_SECONDS = 5.0  # a process that is terminated ends in some milliseconds
MOST_QUESTIONS = 50  # of the last ones the answers are kept
MOST_CHARACTERS = 32_000  # of a prompt


@dataclass
class Asked:
    """A question and what came of it. Sides are in the order of the question; pages may show them in another."""

    question: Question
    pieces: list[Piece] = field(default_factory=list)
    prompts: dict[int, list[Token]] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def finished(self) -> bool:
        ended = {piece.side for piece in self.pieces if piece.finish_reason or piece.error}
        return len(ended) == len(self.question.sides)

    @property
    def failed(self) -> bool:
        return any(piece.error for piece in self.pieces)

    def text(self, side: int) -> str:
        return "".join(piece.text for piece in self.pieces if piece.side == side)

    def tokens(self, side: int) -> list[Token]:
        """The sampled tokens, the end of the turn included."""
        return [token for piece in self.pieces if piece.side == side for token in piece.tokens]

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self._changed.set()

    async def follow(self, start: int, heartbeat: float = 15.0) -> AsyncIterator[tuple[int, Piece] | None]:
        """Each piece from number `start` on with its number, as they come, to the last; None as a heartbeat."""
        while True:
            while start < len(self.pieces):
                yield start, self.pieces[start]
                start += 1
            if self.finished:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), heartbeat)
            except TimeoutError:
                yield None


class Answers:
    """At most one process with the models of one comparison. All methods are called on the event loop.

    `run_child` and `prepare` are what the process runs.
    """

    def __init__(
        self,
        idle_seconds: float = IDLE_SECONDS,
        run_child: Callable[[Connection, Sequence[str]], None] = answer_questions,
        prepare: Callable[[], object] = quiet_libraries,
    ) -> None:
        self.state: State = "empty"
        self.sources: tuple[str, ...] = ()
        self.loaded: Loaded | None = None
        self.notes: list[str] = []
        self.error: str | None = None
        self.questions: OrderedDict[int, Asked] = OrderedDict()
        self._idle_seconds, self._run_child, self._prepare = idle_seconds, run_child, prepare
        self._ids = itertools.count(1)
        self._process: Any = None
        self._connection: Connection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    def load(self, sources: Sequence[str]) -> None:
        """Start loading `sources`, after what was loaded before is freed. Its end shows in `state`."""
        self.close()
        self.sources, self.state, self.error, self.notes = tuple(sources), "loading", None, []
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        target = (self._run_child, self._prepare, theirs, self.sources)
        self._process = context.Process(target=_child, args=target, name="parley-answers", daemon=True)
        self._process.start()
        theirs.close()
        reader = (self._connection, asyncio.get_running_loop())
        threading.Thread(target=self._read, args=reader, name="parley-answers", daemon=True).start()
        self._restart_timer()

    async def loading(self) -> None:
        """Wait until the models are loaded or have failed to."""
        while self.state == "loading":
            self._changed.clear()
            await self._changed.wait()

    def ask(self, prompt: str, sides: Sequence[Side], settings: GenerationSection, system: str | None = None) -> Asked:
        """Send a question to the models. Raises UsageError where they are not loaded, or it has no text."""
        if self.state != "ready" or self._connection is None:
            raise UsageError("the models are not loaded; load them first")
        if not prompt.strip() or len(prompt) > MOST_CHARACTERS:
            raise UsageError(f"the question has {len(prompt)} characters; wanted 1 to {MOST_CHARACTERS}")
        if not {side.source for side in sides} <= set(self.sources):
            raise UsageError("another model was loaded meanwhile; reload the page")
        question = Question(next(self._ids), prompt, tuple(sides), settings, system)
        asked = self.questions[question.id] = Asked(question)
        while len(self.questions) > MOST_QUESTIONS:
            self.questions.popitem(last=False)
        self._connection.send(question)
        self._restart_timer()
        return asked

    def cancel(self, asked: Asked) -> None:
        """Stop the answers to a question; what is there of them stays."""
        if asked.finished:
            return
        if self._connection is not None:
            self._connection.send(asked.question.id)
        self._end(asked, "stopped")

    def close(self) -> None:
        """Free the models and their memory."""
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None:
            self._process.terminate()
            self._process.join(END_SECONDS)  # what is loaded next finds its memory free
        self._gone("the models were freed")
        self.state, self.sources, self.loaded = "empty", (), None

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._idle_seconds, self._idle)

    def _idle(self) -> None:
        if all(asked.finished for asked in self.questions.values()) and self.state != "loading":
            self.close()
        else:
            self._restart_timer()

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of its own: what the process sends, for the event loop."""
        while True:
            try:
                message: Message | None = connection.recv()
            except (EOFError, OSError):
                message = None
            if loop.is_closed():
                return
            loop.call_soon_threadsafe(self._receive, connection, message)
            if message is None:
                return

    def _receive(self, connection: Connection, message: Message | None) -> None:
        if connection is not self._connection:  # of a process that was replaced meanwhile
            return
        match message:
            case Loaded():
                self.loaded, self.state = message, "ready"
            case Note(text, fatal):
                if fatal:
                    self.error = text
                else:
                    self.notes.append(text)
            case Prompted(question, side, tokens):
                if question in self.questions:
                    self.questions[question].prompts[side] = tokens
            case Piece(question):
                if question in self.questions and not self.questions[question].finished:
                    self.questions[question].add(message)
            case None:
                self.state = "failed"
                self.error = self.error or "the process of the models ended, most likely for lack of memory"
                self._gone(self.error)
        self._changed.set()

    def _gone(self, reason: str) -> None:
        """The process has ended, or was told to: nothing unfinished will be answered."""
        if self._connection is not None:
            self._connection.close()
        self._process, self._connection = None, None
        for asked in self.questions.values():
            self._end(asked, reason)

    def _end(self, asked: Asked, reason: str) -> None:
        for side in range(len(asked.question.sides)):
            if not any(piece.side == side and (piece.finish_reason or piece.error) for piece in asked.pieces):
                asked.add(Piece(asked.question.id, side, "", error=reason))


def _child(
    run_child: Callable[[Connection, Sequence[str]], None],
    prepare: Callable[[], object],
    connection: Connection,
    sources: Sequence[str],
) -> None:
    begin_child(prepare)
    run_child(connection, sources)
