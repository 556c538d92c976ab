"""What verification asks of a program that reads an export, and of the trained model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from parley.exporting.samples import Prompt, ScoredRow


class Reader(Protocol):
    """A model opened by a program. A context manager: leaving it frees the model."""

    @property
    def program(self) -> str:
        """Name and version, as the record of an export gives them."""

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The conversation with the generation prompt, by the program's own template engine and tokenizer."""

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Tensor]:
        """For each row (S, V) float32: the logits at its positions."""

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy answers, without the token that ends them."""

    def ends_answers(self, token: int) -> bool:
        """Whether the program stops an answer at `token`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
