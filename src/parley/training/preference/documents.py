"""Documents of a preference step: what is chosen, rejected, desirable or undesirable, and the sums a loss reads.

Shape suffixes (legend in docs/design.md): L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import DOCUMENTS, ORIGIN, Document
from parley.train_step.slots import Slots

Role = Literal["chosen", "rejected", "desirable", "undesirable", "mismatched"]


@dataclass(frozen=True)
class PreferenceDocument(Document):
    """A prompt with one of its answers.

    role: "mismatched" is KTO's: a prompt with another row's answer, which estimates the divergence from the reference.
    prompt_L: True for supervised tokens that are no part of the answer (ORPO's loss reads the prompt, too); None where
        there are none.
    tail_L: True for the answer's tokens behind the length that both answers of a pair have (`ld_alpha` weights them);
        None where they are not distinguished.
    """

    role: Role = "chosen"
    prompt_L: NDArray[np.bool_] | None = None
    tail_L: NDArray[np.bool_] | None = None

    def with_supervised_prompt(self) -> PreferenceDocument:
        """The same, with every token supervised."""
        return replace(self, label_L=self.ids_L, prompt_L=self.label_L == IGNORE_INDEX)

    def with_tail(self, length: int) -> PreferenceDocument:
        """The same, whose answer's tokens behind the first `length` are its tail."""
        supervised_L = self.label_L != IGNORE_INDEX
        supervised_L[0] = False  # never predicted
        return replace(self, tail_L=supervised_L & (supervised_L.cumsum() > length))

    @property
    def answer_tokens(self) -> int:
        """Supervised tokens of the answer. The first token of a document is never predicted."""
        prompt = 0 if self.prompt_L is None else int(self.prompt_L[1:].sum())
        return self.supervised_tokens - prompt


def slots_of(documents: Sequence[PreferenceDocument]) -> Slots:
    """Of N documents: slot n for the answer of document n, N + n for its supervised prompt, 2 N + n for its tail."""
    count, by_document = len(documents), []
    for index, document in enumerate(documents):
        supervised_L = document.label_L[1:] != IGNORE_INDEX
        slot = np.full(int(supervised_L.sum()), index, dtype=np.int64)
        for block, part_L in ((1, document.prompt_L), (2, document.tail_L)):
            if part_L is not None:
                slot += block * count * part_L[1:][supervised_L]
        by_document.append(slot)
    return Slots(by_document, 3 * count)


class PairCollator:
    """Rows of pairs to `{"documents": [chosen, rejected, chosen, rejected, ...]}`.

    Args:
        supervise_prompt: the loss reads the prompt of the chosen answer, too.
        split_tails: the loss weights the tokens of the longer answer that the shorter one has no counterpart of.
    """

    def __init__(self, supervise_prompt: bool = False, split_tails: bool = False) -> None:
        self.supervise_prompt, self.split_tails = supervise_prompt, split_tails

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, list[Document]]:
        documents: list[Document] = []
        for row in rows:
            chosen, rejected = _document(row, "chosen_"), _document(row, "rejected_")
            if self.split_tails:
                shared = min(chosen.answer_tokens, rejected.answer_tokens)
                chosen, rejected = chosen.with_tail(shared), rejected.with_tail(shared)
            documents += [chosen.with_supervised_prompt() if self.supervise_prompt else chosen, rejected]
        return {DOCUMENTS: documents}


class LabelledCollator:
    """Rows with a label to documents: those of the rows, and behind them as many mismatched ones.

    A mismatched document is a row's prompt with the answer of the row before it, as in TRL's KTOTrainer.

    mismatched: False leaves them out.
    """

    def __init__(self, mismatched: bool = True) -> None:
        self.mismatched = mismatched

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, list[Document]]:
        rows = list(rows)
        documents = [replace(_document(row, ""), role=_label_role(row)) for row in rows]
        mismatched: list[PreferenceDocument] = []
        if self.mismatched:
            mismatched = [_mismatched(documents[index], documents[index - 1]) for index in range(len(documents))]
        return {DOCUMENTS: [*documents, *mismatched]}


def _label_role(row: dict[str, Any]) -> Role:
    return "desirable" if row["desirable"] else "undesirable"


def _document(row: dict[str, Any], side: Literal["chosen_", "rejected_", ""]) -> PreferenceDocument:
    ids, labels = row[f"{side}input_ids"], row[f"{side}labels"]
    document = PreferenceDocument(np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))
    return replace(document, origin=row.get(ORIGIN, ""), role="rejected" if side == "rejected_" else "chosen")


def _mismatched(prompt: PreferenceDocument, answer: PreferenceDocument) -> PreferenceDocument:
    head = _answer_start(prompt)
    tail = _answer_start(answer)
    ids_L = np.concatenate([prompt.ids_L[:head], answer.ids_L[tail:]])
    label_L = np.concatenate([np.full(head, IGNORE_INDEX, dtype=np.int32), answer.label_L[tail:]])
    return PreferenceDocument(ids_L, label_L, prompt.origin, role="mismatched")


def _answer_start(document: PreferenceDocument) -> int:
    return int(np.argmax(document.label_L != IGNORE_INDEX))
