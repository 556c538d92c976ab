"""The held-out share of a data set, chosen by a hash of each conversation.

A row's side depends on its words alone: not on its place, its neighbours or the size of the data. So a row keeps its
side when the data grows or is shuffled, rows that repeat a conversation are on one side, and a larger share contains a
smaller one.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from parley.config import DataSection
from parley.data.example import LOSS_KEYS, Example, Message
from parley.data.sources import is_local

DIGEST_BYTES = 8
# Independent of training.seed: runs with different seeds are compared on the same held-out rows.
SEED = 0
AT_MOST = 10
"""At most one row in ten is held out, where a number of rows is."""


def heldout_section(data: DataSection) -> DataSection:
    """`data` for the rows of the source `data.heldout`."""
    assert data.heldout is not None
    source, _, split = data.heldout.partition("#")
    # `limit` is meant for training rows, and the held-out loss is computed over the same rows at each evaluation.
    changes: dict[str, Any] = {"source": source, "split": split or "train", "limit": None, "streaming": False}
    if is_local(source):
        changes |= {"subset": None, "revision": None}  # those of a training set on the hub
    return data.model_copy(update=changes | {"heldout": None, "drop": []})


def sampled_rows(wanted: int, rows: int) -> set[int]:
    """The numbers, from 0, of the rows held out of `rows` where `wanted` are: as many, but at most a tenth."""
    return set(random.Random(SEED).sample(range(rows), min(wanted, rows // AT_MOST)))


def is_heldout(example: Example, share: float) -> bool:
    """Whether `example` belongs to the held-out `share` of its data set."""
    return int.from_bytes(conversation_digest(example)) < share * 2 ** (8 * DIGEST_BYTES)


def conversation_digest(example: Example) -> bytes:
    """A hash of what is said and by whom; runs of white space count as one space.

    Left out are system turns (`data.system` may add one, and the same questions and answers under another system turn
    are no new conversation), loss weights, tools, and the form the row came in.
    """
    words = json.dumps(_words(example), sort_keys=True, default=str)  # ASCII: a row may hold lone surrogates
    return hashlib.blake2b(words.encode(), digest_size=DIGEST_BYTES).digest()


def _words(example: Example) -> Any:
    if example.input_ids is not None:
        return [int(token) for token in example.input_ids]
    if example.text is not None:
        return _collapsed(example.text)
    if isinstance(example.prompt, str):
        return [["user", _collapsed(example.prompt)], ["assistant", _collapsed(example.completion)]]
    completion = example.completion if isinstance(example.completion, list) else []
    messages = [*(example.messages or example.prompt or []), *completion]
    return [_turn(message) for message in messages if message["role"] != "system"]


def _turn(message: Message) -> list[Any]:
    """Role and content, then what else the message holds (tool calls, reasoning, a name)."""
    other = {key: value for key, value in message.items() if key not in ("role", "content", *LOSS_KEYS) and value}
    return [message["role"], _collapsed(message.get("content")), *([other] if other else [])]


def _collapsed(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value
