"""NEFTune's noise (arXiv 2310.05914) in a packed row: of the magnitude that each document has by itself.

transformers' hook scales it by the length of the row that it sees, so that it would be smaller the more documents a row
has.

Shape suffixes (legend in docs/design.md): T tokens, D hidden size. Here only: 1 the one row of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from parley.train_step.packed_batch import DeviceBatch


@contextmanager
def noise_by_document(embedding: nn.Module, batch: DeviceBatch) -> Iterator[None]:
    """The difference that `embedding`'s other hooks make is scaled from the row's length to the document's."""
    clean: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output_1TD: Tensor) -> None:
        clean.append(output_1TD)

    def rescale(module: nn.Module, inputs: Any, output_1TD: Tensor) -> Tensor:
        clean_1TD = clean.pop()
        noise_1TD = (output_1TD - clean_1TD).detach()
        ratio_T = (batch.tokens / (batch.end_T - batch.start_T)).sqrt()
        return clean_1TD + noise_1TD * ratio_T[:, None].to(noise_1TD.dtype)

    hooks = [embedding.register_forward_hook(keep, prepend=True), embedding.register_forward_hook(rescale)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
