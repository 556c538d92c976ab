"""Log-probabilities of the reference model: the trained weights as they were before the first step.

Base weights are frozen, so the reference of an adapter costs one copy of the adapter, and not a second model. Each
document is measured once, when a step first needs it, and kept by a hash of its ids and labels.

Shape suffixes (legend in docs/design.md): L tokens of one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from parley.training.preference.documents import PreferenceDocument


class Reference:
    """The reference of a preference loss.

    Args:
        model: its trainable parameters, as they are now, are the reference's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.original = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._slots: dict[bytes, int] = {}
        self._values = torch.zeros(0)

    def logps(
        self, documents: Sequence[PreferenceDocument], measure: Callable[[list[PreferenceDocument]], Tensor]
    ) -> Tensor:
        """The summed log-probability of each document's answer, (N,).

        Args:
            measure: the same by the reference model, for the documents that are not known yet.
        """
        digests = [_digest(document) for document in documents]
        unknown = {digest: d for digest, d in zip(digests, documents, strict=True) if digest not in self._slots}
        if unknown:
            values = measure(list(unknown.values()))
            self._slots |= {digest: len(self._slots) + index for index, digest in enumerate(unknown)}
            self._values = torch.cat([self._values.to(values), values])
        slots = torch.tensor([self._slots[digest] for digest in digests], device=self._values.device)
        return self._values[slots]

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[None]:
        """`model` with the reference's weights, and its own again afterwards. Buffers keep their addresses."""
        with torch.no_grad():
            trained = {name: p for name, p in model.named_parameters() if name in self.original}
            kept = {name: p.detach().clone() for name, p in trained.items()}
            try:
                for name, p in trained.items():
                    p.copy_(self.original[name])
                yield
            finally:
                for name, p in trained.items():
                    p.copy_(kept[name])


def _digest(document: PreferenceDocument) -> bytes:
    hashed = hashlib.blake2b(document.ids_L.tobytes(), digest_size=16)
    hashed.update(document.label_L.tobytes())
    return hashed.digest()
