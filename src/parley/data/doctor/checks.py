"""What the doctor looks for: a list of small objects, each with the setting or command that cures what it finds.

A check of single rows is an entry of ROW_CHECKS. The other checks need more than one row, the row before it is parsed,
or its tokens; `diagnose` counts them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from parley.data.doctor.conversation import Conversation
from parley.data.doctor.text_faults import (
    media_placeholder,
    mojibake,
    nul,
    replacement_character,
    template_text,
    turn_mark,
)

Severity: TypeAlias = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""error: rows are lost, or figures are wrong. warning: the model learns something unwanted. note: worth a look."""

Find: TypeAlias = Callable[[Conversation], "str | None"]


@dataclass(frozen=True)
class Check:
    """A kind of fault. what: which rows these are. cure: the setting or command against it."""

    name: str
    severity: Severity
    what: str
    cure: str


@dataclass(frozen=True)
class RowCheck(Check):
    """A check of one row. find: what is wrong with it in a few words or an excerpt, None where nothing is."""

    find: Find


def drops(name: str, otherwise: str = "", which: str = "them") -> str:
    """The cure by `data.drop`, after the better one where there is one."""
    return f"{otherwise}{'; ' if otherwise else ''}data.drop=[{name}] leaves {which} out"


BAD_ROW = Check(
    "bad-row",
    "error",
    "rows that cannot be read or understood",
    "correct them; data.bad_rows=skip, the default, leaves them out",
)
SURROGATE = Check(
    "lone-surrogate",
    "error",
    "rows that hold half a character (a lone surrogate), which no tokenizer reads",
    "repair the text where it was cut; data.bad_rows=skip, the default, leaves them out",
)
HELDOUT = Check(
    "heldout-duplicate",
    "error",
    "held-out rows that repeat a training row",
    drops("heldout-duplicate", which="the training rows"),
)
NEAR_HELDOUT = Check(
    "heldout-near-duplicate",
    "warning",
    "held-out rows that nearly repeat a training row",
    drops("heldout-near-duplicate", which="the training rows"),
)
NO_ANSWER = Check(
    "no-answer",
    "warning",
    "rows that have no assistant turn, so training leaves them out",
    "give them an answer, or name the speaker with data.roles",
)
EMPTY_ANSWER = Check(
    "empty-answer",
    "warning",
    "rows that have an empty answer, which training leaves out",
    drops("empty-answer", "write the answer"),
)
DUPLICATE = Check("duplicate", "warning", "rows that repeat an earlier one", drops("duplicate"))
NEAR_DUPLICATE = Check("near-duplicate", "note", "rows that nearly repeat an earlier one", drops("near-duplicate"))
OVERLONG = Check("overlong", "warning", "rows that are longer than model.max_seq_length", "")
UNSUPERVISED = Check(
    "unsupervised",
    "warning",
    "rows that have no supervised token, so training leaves them out",
    "data.train_on and the messages' weights say which turns are supervised",
)
RENDERING = Check("rendering", "warning", "", "")
"""What rendering says of a row, under the text of its note."""

_IN_WORDS = re.compile(r"\W*[\w'’.,%-]*\W*")
_LONGEST_WORD = 40
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def _one_word(row: Conversation) -> str | None:
    return next((text for text in map(str.strip, row.answers) if text and not row.plain and _is_one_word(text)), None)


def _is_one_word(text: str) -> bool:
    if len(text) > _LONGEST_WORD or any(map(str.isspace, text)) or not _IN_WORDS.fullmatch(text):
        return False
    # Scripts without spaces: a sentence has no spaces either, so only one or two characters count as a word.
    return not _NO_SPACES.search(text) or sum(map(str.isalnum, text)) <= 2


def _system_later(row: Conversation) -> str | None:
    later = next((number for number, turn in enumerate(row.turns, 1) if turn.role == "system" and number > 1), None)
    return f"turn {later} is the system's" if later else None


def _assistant_first(row: Conversation) -> str | None:
    first = next((turn.role for turn in row.turns if turn.role not in ("system", "developer")), None)
    return "the assistant speaks first" if first == "assistant" and not row.plain else None


def _repeated_role(row: Conversation) -> str | None:
    for number, (turn, following) in enumerate(zip(row.turns, row.turns[1:], strict=False), 2):
        if turn.role == following.role and turn.role in ("user", "assistant"):
            return f"turn {number} is the {turn.role}'s again"
    return None


def _unanswered(row: Conversation) -> str | None:
    roles = [turn.role for turn in row.turns]
    return f"the last turn is the {roles[-1]}'s" if "assistant" in roles and roles[-1] != "assistant" else None


def _orphan_result(row: Conversation) -> str | None:
    called = False
    for number, turn in enumerate(row.turns, 1):
        if turn.role == "tool" and not called:
            return f"turn {number} is a tool's, and no call comes before it"
        called = called or turn.calls
    return None


def _turn_marks(row: Conversation) -> str | None:
    if row.plain:
        return None  # rows of text are in the model's format, control tokens included
    return next(filter(None, (turn_mark(text) for turn in row.turns for text in (turn.content, *turn.other))), None)


def _media_placeholder(row: Conversation) -> str | None:
    return next(filter(None, (media_placeholder(turn.content) for turn in row.turns)), None)


def _template_text(row: Conversation) -> str | None:
    if row.plain:
        return None
    return next(filter(None, (template_text(turn.content) for turn in row.turns)), None)


TEXT_CHECKS: tuple[RowCheck, ...] = (
    RowCheck(
        "control-token",
        "warning",
        "rows that hold control tokens of a model family in their text",
        drops("control-token", "remove them: Parley writes the model's own around each turn"),
        _turn_marks,
    ),
    RowCheck(
        "media-placeholder",
        "warning",
        "rows that hold the placeholder of a picture or sound, which the model would never see",
        drops("media-placeholder", "describe in words what it stood for"),
        _media_placeholder,
    ),
    RowCheck(
        "template-text",
        "warning",
        "rows that hold another template's headings in their text",
        drops("template-text", "split them into turns with columns or roles of their own"),
        _template_text,
    ),
    RowCheck(
        "mojibake",
        "warning",
        "rows that hold text read with the wrong encoding",
        drops("mojibake", "read the source as UTF-8 again, or repair it with ftfy"),
        lambda row: mojibake(row.text),
    ),
    RowCheck(
        "replacement-character",
        "warning",
        "rows that hold U+FFFD in place of characters that were lost",
        drops("replacement-character", "read the source as UTF-8 again"),
        lambda row: replacement_character(row.text),
    ),
    RowCheck(
        "nul", "warning", "rows that hold the character NUL", drops("nul", "remove it"), lambda row: nul(row.text)
    ),
    RowCheck(
        "one-word-answer",
        "note",
        "rows that have an answer of one word",
        drops("one-word-answer", "fine where that is the task"),
        _one_word,
    ),
)
# An empty turn is left out, and then two of one speaker meet: these are asked only of rows without one.
ORDER_CHECKS: tuple[RowCheck, ...] = (
    RowCheck(
        "system-later",
        "warning",
        "rows that have a system turn that is not the first",
        drops("system-later"),
        _system_later,
    ),
    RowCheck(
        "repeated-role",
        "warning",
        "rows that have two turns of one speaker in a row",
        drops("repeated-role"),
        _repeated_role,
    ),
    RowCheck(
        "orphan-result",
        "warning",
        "rows that have a tool's result without a call",
        drops("orphan-result"),
        _orphan_result,
    ),
    RowCheck(
        "assistant-first", "note", "rows that begin with the assistant", drops("assistant-first"), _assistant_first
    ),
    RowCheck(
        "unanswered",
        "note",
        "rows that end without an answer, so that what follows the last one is not supervised",
        drops("unanswered"),
        _unanswered,
    ),
)

ROW_CHECKS = (*TEXT_CHECKS, *ORDER_CHECKS)
_WHOLE_SET = (HELDOUT, NEAR_HELDOUT, EMPTY_ANSWER, DUPLICATE, NEAR_DUPLICATE)
DROPPABLE = {check.name: check for check in (*_WHOLE_SET, *ROW_CHECKS)}
"""The checks that `data.drop` may name."""
