"""The formats of preference data: each an object that knows its columns and turns a row into a Preference.

A new format is a subclass of PreferenceFormat and an entry in PREFERENCE_FORMATS; a row that suits several is of the
first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from parley.config import DataSection
from parley.data.columns import Fields, Spellings
from parley.data.example import Example, Message
from parley.data.files import Row
from parley.data.formats import history_turns
from parley.data.messages import joined, parse_messages, with_system
from parley.data.tool_calls import parse_tools
from parley.data.values import short, type_name
from parley.errors import DataError

_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_CHOSEN = ("chosen", "chosen_response")
_REJECTED = ("rejected", "rejected_response")
_TURNS = ("messages", "conversations", "conversation")
_LABEL = ("label", "kto_tag", "desirable")
_QUESTION = ("instruction", "question")

Answer = str | list[Message]


@dataclass(frozen=True)
class Preference:
    """One row: a prompt with a `chosen` and a `rejected` answer, or with one answer that is `desirable` or not.

    Of a labelled row, `chosen` is the answer, whether desirable or not.
    """

    origin: str
    chosen: Example
    rejected: Example | None = None
    desirable: bool | None = None


class PreferenceFormat(ABC):
    """One format of preference data; attributes as in parley.data.formats.Format."""

    label: ClassVar[str]
    columns: ClassVar[Spellings]
    optional: ClassVar[Spellings] = (_SYSTEM, _TOOLS)
    labelled: ClassVar[bool] = False

    def fields(self, row: Row, origin: str, data: DataSection) -> Fields:
        return Fields(row, origin, (*self.columns, *self.optional), data)

    def suits(self, row: Row, fields: Fields) -> bool:
        """Whether a row has the columns, whatever is in them: a null answer is a bad row of this format."""
        return all(any(name in row or name in fields.own for name in names) for names in self.columns)

    @abstractmethod
    def preference(self, fields: Fields) -> Preference:
        """Raises DataError naming the row."""


class Ranking(PreferenceFormat):
    """{"conversations": [turns], "chosen": {"from": "gpt", "value": "Hi"}, "rejected": {...}}, as in LLaMA-Factory"""

    label = "ShareGPT ranking"
    columns = (_TURNS, _CHOSEN, _REJECTED)

    def suits(self, row: Row, fields: Fields) -> bool:
        """Not where a prompt is beside the turns: UltraFeedback's `messages` repeat the chosen conversation."""
        return super().suits(row, fields) and not row.get("prompt")

    def preference(self, fields: Fields) -> Preference:
        prompt = turns_of(fields, "messages")
        answers = [turns_of(fields, name) for name in ("chosen", "rejected")]
        return _pair(fields, prompt, *answers)


class Comparison(PreferenceFormat):
    """{"instruction": "Translate:", "input": "cheese", "chosen": "fromage", "rejected": "queso"}, or with `question`"""

    label = "Alpaca comparison"
    columns: ClassVar[Spellings] = (_QUESTION, _CHOSEN, _REJECTED)
    optional: ClassVar[Spellings] = (("input",), ("history",), _SYSTEM, _TOOLS)

    def preference(self, fields: Fields) -> Preference:
        answers = [_assistant(fields, name) for name in ("chosen", "rejected")]
        return _pair(fields, instruction_turns(fields), *answers)


class InputComparison(Comparison):
    """{"input": "cheese in French", "chosen": "fromage", "rejected": "queso"}, axolotl's chatml.icr"""

    columns = (("input",), _CHOSEN, _REJECTED)
    optional = (("history",), _SYSTEM, _TOOLS)

    def suits(self, row: Row, fields: Fields) -> bool:
        return super().suits(row, fields) and isinstance(row.get("input"), str) and not row.get("prompt")


class RankedOutputs(PreferenceFormat):
    """{"instruction": "Translate:", "input": "cheese", "output": ["fromage", "queso"]}, the better one first"""

    label = "Alpaca comparison (output as a list)"
    columns = (_QUESTION, ("output",))
    optional = (("input",), ("history",), _SYSTEM, _TOOLS)

    def suits(self, row: Row, fields: Fields) -> bool:
        return super().suits(row, fields) and isinstance(fields.value("output"), list)

    def preference(self, fields: Fields) -> Preference:
        answers = fields.value("output")
        if len(answers) != 2 or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{fields.origin}: 'output' has {len(answers)} entries; wanted two texts, the better first")
        turns = [[_said(fields, name, text)] for name, text in zip(("chosen", "rejected"), answers, strict=True)]
        return _pair(fields, instruction_turns(fields), *turns)


class Pair(PreferenceFormat):
    """{"prompt": ..., "chosen": ..., "rejected": ...} as text or turns; without a prompt, what both begin with is it"""

    label = "preference pairs"
    columns = (_CHOSEN, _REJECTED)
    optional = (("prompt",), _SYSTEM, _TOOLS)

    def preference(self, fields: Fields) -> Preference:
        kinds = {name: _kind(fields, name) for name in ("chosen", "rejected")}
        if len(set(kinds.values())) > 1:
            raise DataError(
                f"{fields.origin}: 'chosen' is {kinds['chosen']} and 'rejected' is {kinds['rejected']}; wanted both as "
                "text or both as turns"
            )
        prompt = fields.value("prompt")
        if kinds["chosen"] == "text":
            return self._of_text(fields, prompt)
        chosen, rejected = (turns_of(fields, name) for name in ("chosen", "rejected"))
        turns = turns_of(fields, "prompt") if isinstance(prompt, list | dict) else None
        if turns is None or (_begins_with(chosen, turns) and _begins_with(rejected, turns)):
            turns, chosen, rejected = self._implicit(fields, chosen, rejected)
        return _pair(fields, turns, chosen, rejected)

    def _of_text(self, fields: Fields, prompt: Any) -> Preference:
        chosen, rejected = fields.text("chosen"), fields.text("rejected")
        turns = turns_of(fields, "prompt") if isinstance(prompt, list | dict) else _question(fields)
        if turns:
            answers = ([_said(fields, name, fields.text(name))] for name in ("chosen", "rejected"))
            return _pair(fields, turns, *answers)
        _check_answers(fields, chosen, rejected)
        text = fields.text("prompt")
        if "prompt" not in fields.own:
            text = _common_prefix(chosen, rejected)
            text = text[:-1] if text.endswith(" ") else text  # as TRL does: most tokens begin with their space
            chosen, rejected = chosen[len(text) :], rejected[len(text) :]
            _check_answers(fields, chosen, rejected)
        if not text.strip():
            raise DataError(
                f"{fields.origin}: has no prompt, and chosen and rejected begin differently; add a prompt column"
            )
        first, second = (Example(fields.origin, prompt=text, completion=answer) for answer in (chosen, rejected))
        return Preference(fields.origin, first, second)

    def _implicit(
        self, fields: Fields, chosen: list[Message], rejected: list[Message]
    ) -> tuple[list[Message], list[Message], list[Message]]:
        """The longest run of turns that both begin with, as in TRL, and what is left of both."""
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, text = chosen[:shared], fields.value("prompt")
        if not prompt and isinstance(text, str) and text.strip():
            prompt = [{"role": "user", "content": text}]
        if not prompt:
            raise DataError(
                f"{fields.origin}: has no prompt, and chosen and rejected begin with other turns; add a prompt column"
            )
        return prompt, chosen[shared:], rejected[shared:]


class Labelled(PreferenceFormat):
    """{"prompt": ..., "completion": ..., "label": true}: one answer, and whether it is wanted"""

    label = "labelled answers"
    columns = (("prompt",), ("completion", "response"), _LABEL)
    labelled = True

    def preference(self, fields: Fields) -> Preference:
        prompt, answer = fields.value("prompt"), fields.value("completion")
        if isinstance(prompt, list | dict) or isinstance(answer, list | dict):
            turns = turns_of(fields, "prompt") if isinstance(prompt, list | dict) else None
            return _labelled(fields, turns or [{"role": "user", "content": fields.text("prompt")}], "completion")
        if turns := _question(fields):
            return _labelled(fields, turns, "completion")
        text, answer = fields.text("prompt"), fields.text("completion")
        _check_label(fields)
        if not text.strip():
            raise DataError(f"{fields.origin}: 'prompt' is empty; wanted the text that the answer continues")
        if not answer.strip():
            raise DataError(
                f"{fields.origin}: {fields.own.get('completion', 'completion')!r} is empty; wanted an answer"
            )
        example = Example(fields.origin, prompt=text, completion=answer)
        return Preference(fields.origin, example, desirable=fields.value("label"))


class LabelledInstruction(PreferenceFormat):
    """{"instruction": ..., "output": ..., "kto_tag": true}, as in LLaMA-Factory; axolotl's answer is `completion`"""

    label = "labelled answers to instructions"
    columns = (_QUESTION, ("output", "response", "completion"), _LABEL)
    optional = (("input",), ("history",), _SYSTEM, _TOOLS)
    labelled = True

    def preference(self, fields: Fields) -> Preference:
        return _labelled(fields, instruction_turns(fields), "output")


class LabelledConversation(PreferenceFormat):
    """{"messages": [..., {"role": "assistant", ...}], "label": true}: the last answer, and whether it is wanted"""

    label = "labelled conversations"
    columns: ClassVar[Spellings] = (_TURNS, _LABEL)
    labelled = True
    turns: ClassVar[str] = "messages"

    def preference(self, fields: Fields) -> Preference:
        turns = turns_of(fields, self.turns)
        start = len(turns)
        while start and turns[start - 1]["role"] != "user":
            start -= 1
        return _with_label(fields, turns[:start], turns[start:])


class LabelledCompletion(LabelledConversation):
    """{"completion": [the whole conversation], "label": true}, axolotl's chatml.argilla_chat"""

    columns = (("completion",), _LABEL)
    turns = "completion"

    def suits(self, row: Row, fields: Fields) -> bool:
        return super().suits(row, fields) and isinstance(fields.value("completion"), list)


PREFERENCE_FORMATS: tuple[PreferenceFormat, ...] = (
    Ranking(),
    Comparison(),
    InputComparison(),
    Pair(),
    LabelledConversation(),
    Labelled(),
    LabelledInstruction(),
    LabelledCompletion(),
    RankedOutputs(),
)


def _kind(fields: Fields, name: str) -> str:
    value = fields.value(name)
    if value is None or (isinstance(value, str | list | dict) and not value):
        raise DataError(f"{fields.origin}: {name!r} is {'missing' if value is None else 'empty'}; wanted an answer")
    if isinstance(value, list | dict):
        return "turns"
    if not isinstance(value, str):
        raise DataError(f"{fields.origin}: {name!r} is {type_name(value)}; wanted an answer as text or turns")
    return "turns" if value.lstrip().startswith("[{") else "text"  # CSV holds turns as JSON text


def turns_of(fields: Fields, name: str) -> list[Message]:
    """The turns of a column, or of a single turn. Raises DataError where there is none."""
    value, own = fields.value(name), fields.own.get(name, name)
    if isinstance(value, dict):
        value = [value]
    if value is None or not value:
        raise DataError(f"{fields.origin}: {own!r} is {'missing' if value is None else 'empty'}; wanted turns")
    if not isinstance(value, list) and not (isinstance(value, str) and value.lstrip().startswith("[")):
        raise DataError(f"{fields.origin}: {own!r} is {type_name(value)}; wanted a turn or a list of turns")
    data = fields.data
    keys: dict[str, str] = {key: data.columns[key] for key in ("role", "content") if key in data.columns}
    return parse_messages(value, fields.origin, own, keys=keys, roles=data.roles)


def _assistant(fields: Fields, name: str) -> list[Message]:
    """An answer that may come as text or as turns."""
    return turns_of(fields, name) if _kind(fields, name) == "turns" else [_said(fields, name, fields.text(name))]


def _said(fields: Fields, name: str, text: str) -> Message:
    if not text.strip():
        raise DataError(f"{fields.origin}: {name!r} is empty; wanted an answer")
    return {"role": "assistant", "content": text}


def instruction_turns(fields: Fields) -> list[Message]:
    text = joined(fields.text(name) for name in ("instruction", "input"))
    if not text.strip():
        raise DataError(
            f"{fields.origin}: {fields.own.get('instruction', 'instruction')!r} is empty; wanted a question"
        )
    history: list[Message] = [{"role": role, "content": said} for role, said in history_turns(fields)]
    return [*history, {"role": "user", "content": text}]


def _question(fields: Fields) -> list[Message]:
    """A prompt of text as a user's turn, where a system prompt or tools make the row a conversation."""
    text = fields.text("prompt")
    chat = fields.text("system") or fields.data.system or fields.value("tools")
    return [{"role": "user", "content": text}] if chat and text.strip() else []


def _common_prefix(first: str, second: str) -> str:
    end = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[:end]


def _begins_with(turns: list[Message], prompt: list[Message]) -> bool:
    return len(turns) > len(prompt) and turns[: len(prompt)] == prompt


def _pair(fields: Fields, prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Preference:
    _check_prompt(fields, prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(fields, name, answer)
    _check_answers(fields, chosen, rejected)
    return Preference(fields.origin, _example(fields, prompt, chosen), _example(fields, prompt, rejected))


def _labelled(fields: Fields, prompt: list[Message], name: str) -> Preference:
    return _with_label(fields, prompt, _assistant(fields, name))


def _with_label(fields: Fields, prompt: list[Message], answer: list[Message]) -> Preference:
    _check_label(fields)
    _check_prompt(fields, prompt)
    _check_answer(fields, "answer", answer)
    return Preference(fields.origin, _example(fields, prompt, answer), desirable=fields.value("label"))


def _example(fields: Fields, prompt: list[Message], answer: list[Message]) -> Example:
    system = fields.text("system") or fields.data.system
    tools = parse_tools(fields.value("tools"), fields.origin)
    return Example(fields.origin, prompt=with_system(prompt, system), completion=answer, tools=tools)


def _check_prompt(fields: Fields, prompt: list[Message]) -> None:
    if not any(turn["role"] != "system" for turn in prompt):
        raise DataError(f"{fields.origin}: the prompt has no question; wanted a user's turn before the answers")
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{fields.origin}: the prompt ends with the assistant's turn; wanted a user's or a tool's")


def _check_answer(fields: Fields, name: str, answer: list[Message]) -> None:
    if not answer or answer[-1]["role"] != "assistant":
        seen = f"ends with the {answer[-1]['role']}'s turn" if answer else "has no turn with text"
        raise DataError(f"{fields.origin}: {name!r} {seen}; wanted an answer of the assistant")


def _check_answers(fields: Fields, chosen: Answer, rejected: Answer) -> None:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, str) and not answer.strip():
            raise DataError(f"{fields.origin}: {name!r} is empty; wanted an answer")
    if chosen == rejected:
        raise DataError(f"{fields.origin}: chosen and rejected are the same; leave the row out, nothing is preferred")


def _check_label(fields: Fields) -> None:
    value = fields.value("label")
    if not isinstance(value, bool):
        seen = "missing" if value is None else short(value)
        raise DataError(f"{fields.origin}: {fields.own.get('label', 'label')!r} is {seen}; wanted true or false")
