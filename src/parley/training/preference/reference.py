"""Log-probabilities of the reference model: the trained weights as they were before the first step.

Base weights are frozen, so the reference of an adapter costs one copy of the adapter, and not a second model. Each
document is measured once, when a step first needs it, and kept by a hash of its ids and labels.

Shape suffixes (legend in docs/design.md): L tokens of one document, Z parameters in a flat buffer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from parley.train_step.slots import copy_to
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
        self._original_Z: Tensor | None = None  # of a flat buffer

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
        slots = torch.tensor([self._slots[digest] for digest in digests])
        return self._values[copy_to(self._values.device, slots)]

    @contextmanager
    def weights(self, model: nn.Module, flat_Z: Tensor | None = None) -> Iterator[None]:
        """`model` with the reference's weights, and its own again afterwards. Buffers keep their addresses.

        flat_Z: the buffer that all trainable parameters are views of, where there is one. From the second time on it
        is copied as a whole: the hundreds of copies of single parameters take a host as long as a forward pass.
        """
        if flat_Z is not None and self._original_Z is not None:
            kept_Z = flat_Z.clone()
            flat_Z.copy_(self._original_Z)
            try:
                yield
            finally:
                flat_Z.copy_(kept_Z)
            return
        with torch.no_grad():
            trained = {name: p for name, p in model.named_parameters() if name in self.original}
            kept = {name: p.detach().clone() for name, p in trained.items()}
            try:
                for name, p in trained.items():
                    p.copy_(self.original[name])
                self._original_Z = None if flat_Z is None else flat_Z.clone()
                yield
            finally:
                for name, p in trained.items():
                    p.copy_(kept[name])


def _digest(document: PreferenceDocument) -> bytes:
    hashed = hashlib.blake2b(document.ids_L.tobytes(), digest_size=16)
    hashed.update(document.label_L.tobytes())
    if document.tail_L is not None:
        hashed.update(document.tail_L.tobytes())
    return hashed.digest()
