"""What Parley relies on in accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader


def test_a_prepared_loader_without_a_device_leaves_batches_as_they_are() -> None:
    documents = [object(), object()]
    loader = Accelerator(cpu=True).prepare(
        DataLoader([1, 2], batch_size=2, collate_fn=lambda _: {"documents": documents})
    )
    loader.device = None
    assert [batch["documents"] for batch in loader] == [documents]


def test_gradients_are_synchronised_unless_said_otherwise() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.sync_gradients
    with accelerator.no_sync(torch.nn.Linear(1, 1)):
        pass
