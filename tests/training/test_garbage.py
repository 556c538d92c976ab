"""The garbage collector during training."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.training.rows import supervised_rows
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from parley.training.garbage import existing_objects_frozen
from parley.training.trainer import SFTTrainer


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """The tests' own freeze (conftest.py) is lifted for a while."""
    gc.unfreeze()
    yield
    gc.freeze()


class Node:
    def __init__(self) -> None:
        self.itself: Any = self


def test_old_objects_are_left_out_of_collections_and_new_ones_are_not() -> None:
    garbage = weakref.ref(Node())
    with existing_objects_frozen():
        assert garbage() is None
        assert gc.get_freeze_count() > 10_000
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    with existing_objects_frozen():
        pass
    assert gc.get_freeze_count() > 10_000


def test_an_error_thaws_them() -> None:
    with pytest.raises(ValueError, match="step"), existing_objects_frozen():
        raise ValueError("step")
    assert gc.get_freeze_count() == 0


def test_a_trainer_freezes_them_for_its_steps(build_family: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    counts: list[int] = []

    class Counts(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            counts.append(gc.get_freeze_count())

    run = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(build_family("llama")),
        args=SFTConfig(str(tmp_path), max_steps=2, save_strategy="no", report_to="none", use_cpu=True, bf16=False),
        train_dataset=supervised_rows(),
        processing_class=tiny_tokenizer,
        callbacks=[Counts()],
    )
    run.train()
    assert len(counts) == 2
    assert min(counts) > 10_000
    assert gc.get_freeze_count() == 0
