"""A conversation with a model: turns are kept, answers streamed, the adapter can be disabled and enabled."""

from __future__ import annotations

from collections import abc
from contextlib import closing

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parley.config import GenerationSection
from parley.data.example import Message
from parley.data.supervision import ControlText
from parley.data.values import text_of
from parley.inference.generate import Engine, Generator
from parley.models.base_answers import require_base


class ChatSession:
    """Talks to `model`, tuned or base, and keeps the turns.

    `system` and `settings` may be changed at any time and apply from the next answer on. Answers come from the weights
    as they are at the first one. `engine` and `control_tokens` as in generate.Generator.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSection | None = None,
        system: str | None = None,
        *,
        engine: Engine = "auto",
        control_tokens: ControlText = "auto",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or GenerationSection()
        self.system = system
        self.turns: list[Message] = []
        self._use_base = False
        self._generator = Generator(model, tokenizer, slots=1, engine=engine, control_tokens=control_tokens)

    @property
    def use_base(self) -> bool:
        """Whether answers come from the base model, with the adapter disabled."""
        return self._use_base

    @use_base.setter
    def use_base(self, value: bool) -> None:
        if value:
            require_base(self.model)
        self._use_base = value

    @property
    def messages(self) -> list[Message]:
        """The system turn, if any, and all turns so far."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def say(self, text: str) -> abc.Generator[str]:
        """Send `text` as the user's turn; the answer, piece by piece. Closing the iterator stops the answer.

        The question and the answer, complete or as far as it went, are kept as turns; of an empty answer nothing is
        kept. Raises DataError for a text that is not Unicode, as bytes that
        are not UTF-8 give on a terminal, and when the conversation fills the model's context.
        """
        # A terminal gives bytes that are not UTF-8 as lone surrogates, which no tokenizer takes.
        text_of(self.system, "the system turn")
        question = {"role": "user", "content": text_of(text, "the message")}
        pieces = self._generator.stream([*self.messages, question], self.settings, base=self.use_base)
        return self._answer(question, pieces)

    def _answer(self, question: Message, pieces: abc.Generator[str]) -> abc.Generator[str]:
        answer = ""
        try:
            with closing(pieces):
                for piece in pieces:
                    answer += piece
                    yield piece
        finally:  # also where the caller closes the iterator: what was shown stays part of the conversation
            if answer:
                self.turns += [question, {"role": "assistant", "content": answer}]

    def undo(self) -> str | None:
        """Remove the last question and its answer; the question, or None without one."""
        if not self.turns:
            return None
        question, _ = self.turns[-2:]
        del self.turns[-2:]
        return question["content"]

    def reset(self) -> None:
        """Remove all turns; the system turn stays."""
        self.turns.clear()

    def close(self) -> None:
        """Free the memory of the decoder. The next question allocates it again."""
        self._generator.close()

    def transcript(self) -> str:
        """The conversation as plain text, one paragraph a turn."""
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)
