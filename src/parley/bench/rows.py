"""The rows of a job, rendered once so that every trainer reads the same ids in the same order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from parley.bench.jobs import Job
from parley.config import DataSection, RunConfig
from parley.data.prepare import prepare, read_examples
from parley.errors import DataError
from parley.models.load import load_tokenizer

LONG_ROWS = 32
TEMPLATE_TOKENS = 60  # upper bound of what a template adds to one answer


def write_rows(job: Job, config: RunConfig, folder: Path, processes: int = 1) -> None:
    """Render the job's rows into the new `folder`. Raises DataError and ModelError."""
    tokenizer = load_tokenizer(config.model)
    data = config.data
    folder.mkdir()
    if job.length is not None:
        long = folder / "long.jsonl"
        with long.open("w", encoding="utf-8") as file:
            for text in _long_texts(job.length, data, tokenizer):
                file.write(json.dumps({"instruction": "Continue.", "response": text}) + "\n")
        data = data.model_copy(update={"source": str(long), "limit": None})
    rows = prepare(data, tokenizer, config.model.max_seq_length).train
    # A step that is short of rows would be timed as a full one.
    rows_per_step = job.batch * job.accumulate * processes
    if len(rows) < rows_per_step:
        raise DataError(
            f"{config.data.source}: {len(rows)} rows are left, and a step of job {job.name} takes {rows_per_step}"
        )
    rows.save_to_disk(str(folder / "rows"))


def read_rows(folder: Path) -> Dataset:
    return load_from_disk(str(folder / "rows"))


def as_text(rows: Dataset, tokenizer: Any) -> Dataset:
    """The same rows as text, for a trainer that tokenizes by itself."""
    return Dataset.from_list([{"text": tokenizer.decode(ids)} for ids in rows["input_ids"]])


def _long_texts(length: int, data: DataSection, tokenizer: Any) -> Iterator[str]:
    """Texts of nearly `length` tokens, cut from all answers joined, at offsets sampled with a fixed seed."""
    _, examples = read_examples(data)
    answers = [example.messages[-1]["content"] for example in examples if example.messages]
    if not answers:
        raise DataError(f"{data.source}: no conversations to make long ones of; give rows with an answer")
    ids = tokenizer(" ".join(answers), add_special_tokens=False)["input_ids"]
    # Repeated until a slice of `length` fits behind any start.
    ids = ids * (2 + length // len(ids))
    generator = random.Random(0)
    # Offsets, not whole answers: every row has the same length, so that steps can be compared.
    for _ in range(LONG_ROWS):
        start = generator.randrange(len(ids) - length)
        yield tokenizer.decode(ids[start : start + length - TEMPLATE_TOKENS])
