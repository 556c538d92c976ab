"""The process that holds the models of a comparison: it answers questions side by side until it is ended.

Base and tuned answers of one model are decoded in one batch, the adapter switched off for the base's row; two models
are decoded at the same time, each by a scheduler of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from parley.config import GenerationSection
from parley.errors import ParleyError, one_line

if TYPE_CHECKING:
    from parley.inference.fan_in import IndexedOutput
    from parley.inference.generate import Generator
    from parley.serving.loading import LoadedModel
    from parley.serving.token_text import TokenTexts

Token = tuple[int, str, float | None]
"""Id, text and log-probability of one token."""


@dataclass(frozen=True)
class Side:
    """One of the answers: a run, adapter or model, tuned or with its adapter switched off."""

    source: str
    base: bool = False


@dataclass(frozen=True)
class Question:
    """`prompt` for all `sides`. Without `system`, each side has the system turn of its own run."""

    id: int
    prompt: str
    sides: tuple[Side, ...]
    settings: GenerationSection
    system: str | None = None


@dataclass(frozen=True)
class Loaded:
    """The models are there. `settings`: the generation settings of the first; `base_of`: names of the bases that can
    answer, by source."""

    settings: GenerationSection
    base_of: dict[str, str]


@dataclass(frozen=True)
class Note:
    """A line for the user, or what ended the process's work (`fatal`)."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Prompted:
    """The exact prompt of one side."""

    question: int
    side: int
    tokens: list[Token]


@dataclass(frozen=True)
class Piece:
    """The next part of one side's answer; the last has a `finish_reason`, or the `error` that ended it."""

    question: int
    side: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


Message = Loaded | Note | Prompted | Piece


def answer_questions(connection: Connection, sources: Sequence[str]) -> None:
    """Load `sources`, say so, then answer each Question that comes; an int cancels the question of that id."""
    Answering(connection).run(sources)


class Answering:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._models: dict[str, _Model] = {}
        self._cancelled: set[int] = set()

    def run(self, sources: Sequence[str]) -> None:
        notes = _Notes(self)
        logging.getLogger("parley").addHandler(notes)
        try:
            self._run(sources)
        except ParleyError as error:
            self.send(Note(str(error), fatal=True))
        finally:
            logging.getLogger("parley").removeHandler(notes)
            for model in self._models.values():
                model.generator.close()

    def _run(self, sources: Sequence[str]) -> None:
        for source in sources:
            self._models[source] = _Model(source)
        first = self._models[sources[0]]
        self.send(Loaded(first.loaded.settings, {s: m.base_name for s, m in self._models.items() if m.base_name}))
        while True:
            try:
                received: Question | int = self._connection.recv()
            except EOFError:
                return
            if isinstance(received, int):
                self._cancelled.add(received)
                continue
            for source in dict.fromkeys(side.source for side in received.sides):
                threading.Thread(target=self._answer, args=(received, source), daemon=True).start()

    def send(self, message: Message) -> None:
        with self._sending:
            self._connection.send(message)

    def _answer(self, question: Question, source: str) -> None:
        """Answer the sides of `question` that the model `source` answers, in one batch."""
        model = self._models[source]
        indices = [index for index, side in enumerate(question.sides) if side.source == source]
        with model.lock:  # one question at a time: the decoder is made for two rows
            try:
                self._stream(question, model, indices)
            except ParleyError as error:
                self._fail(question, indices, str(error))
            except Exception as error:  # noqa: BLE001  (carried to the page that waits for it)
                self._fail(question, indices, f"{type(error).__name__}: {one_line(error)}")

    def _stream(self, question: Question, model: _Model, indices: list[int]) -> None:
        from parley.inference.scheduler import Request

        system = model.loaded.system if question.system is None else question.system or None
        turns = [{"role": "user", "content": question.prompt}]
        messages = [{"role": "system", "content": system}, *turns] if system else turns
        prompt = model.generator.prompt_ids(messages)
        for index in indices:
            self.send(Prompted(question.id, index, [model.token(token) for token in prompt]))
        requests = [Request(prompt, question.settings, question.sides[index].base, 0) for index in indices]
        with closing(model.generator.outputs(requests)) as outputs:
            for output in outputs:
                if question.id in self._cancelled:
                    return
                self.send(_piece(question, model, indices, output))

    def _fail(self, question: Question, indices: list[int], message: str) -> None:
        for index in indices:
            self.send(Piece(question.id, index, "", error=message))


def _piece(question: Question, model: _Model, indices: list[int], indexed: IndexedOutput) -> Piece:
    request, output = indexed
    if isinstance(output, Exception):
        return Piece(question.id, indices[request], "", error=one_line(output))
    tokens = [model.token(token.id, token.logprob) for token in output.tokens]
    return Piece(question.id, indices[request], output.text, tokens, output.finish_reason)


class _Model:
    """A loaded model with its decoder. Raises ParleyError where `source` cannot be loaded."""

    def __init__(self, source: str) -> None:
        from parley.inference.generate import Generator
        from parley.serving.loading import load_for_inference
        from parley.serving.token_text import TokenTexts

        self.loaded: LoadedModel = load_for_inference(source)
        self.generator: Generator = Generator(
            self.loaded.model, self.loaded.tokenizer, slots=2, control_tokens=self.loaded.control_tokens
        )
        self.lock = threading.Lock()
        self._texts: TokenTexts = TokenTexts(self.loaded.tokenizer)

    @property
    def base_name(self) -> str | None:
        return next((name for name, is_base in self.loaded.names.items() if is_base), None)

    def token(self, token: int, logprob: float | None = None) -> Token:
        return token, self._texts.text_of(token), logprob


class _Notes(logging.Handler):
    """Parley's own warnings, for the page: which checkpoint is used, why the base cannot answer."""

    def __init__(self, answering: Answering) -> None:
        super().__init__(logging.WARNING)
        self._answering = answering

    def emit(self, record: logging.LogRecord) -> Any:
        self._answering.send(Note(one_line(record.getMessage(), 400)))
