"""A conversation with a model: turns are kept, answers streamed, the adapter can be switched off and on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parley.config import GenerationSection
from parley.data.conversation import Message
from parley.inference.generate import Answerer, Engine
from parley.models.adapters import require_base


class ChatSession:
    """Talks to `model`, tuned or base, and remembers what was said.

    `system` may be changed at any time and holds from the next answer on. `settings` likewise. Answers come from the
    weights as they are at the first one. `engine` as in generate.Answerer.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSection | None = None,
        system: str | None = None,
        *,
        engine: Engine = "auto",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or GenerationSection()
        self.system = system
        self.turns: list[Message] = []
        self._use_base = False
        self._answerer = Answerer(model, tokenizer, slots=1, engine=engine)

    @property
    def use_base(self) -> bool:
        """Whether answers come from the base model, the adapter switched off."""
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

    def say(self, text: str) -> Generator[str]:
        """Say `text`; the answer, piece by piece. Closing the iterator stops the answer.

        The question and what was answered, to its end or until it was stopped, are kept as turns; of an
        answer without a word nothing is kept. Raises DataError when the conversation fills the model's context.
        """
        question = {"role": "user", "content": text}
        pieces = self._answerer.stream([*self.messages, question], self.settings, base=self.use_base)
        return self._answer(question, pieces)

    def _answer(self, question: Message, pieces: Generator[str]) -> Generator[str]:
        said = ""
        try:
            with closing(pieces):
                for piece in pieces:
                    said += piece
                    yield piece
        finally:
            if said:
                self.turns += [question, {"role": "assistant", "content": said}]

    def undo(self) -> str | None:
        """Forget the last question and its answer; the question, or None where nothing was said yet."""
        if not self.turns:
            return None
        question, _ = self.turns[-2:]
        del self.turns[-2:]
        return question["content"]

    def reset(self) -> None:
        """Forget all turns; the system turn stays."""
        self.turns.clear()

    def close(self) -> None:
        """Free what answering took beside the model. The session can go on."""
        self._answerer.close()

    def transcript(self) -> str:
        """The conversation as plain text, one paragraph a turn."""
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)
