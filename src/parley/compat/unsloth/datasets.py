"""What notebooks do to a data set before training: rows to turns, turns to role and content, turns to text."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from parley.compat.unsloth.options import check_options
from parley.data.messages import parse_messages
from parley.errors import DataError, UsageError

CHAT_COLUMNS = ("conversations", "messages")
STANDARDIZE_NO_MEANING = [
    *("aliases_for_system", "aliases_for_user", "aliases_for_assistant"),
    *("batch_size", "num_proc", "tokenizer"),
]
INPUT, OUTPUT, SYSTEM = "{INPUT}", "{OUTPUT}", "{SYSTEM}"


def standardize_sharegpt(dataset: Dataset | IterableDataset, **options: Any) -> Dataset | IterableDataset:
    """`dataset`, also a stream, with the turns of its column conversations or messages as `role` and `content`.

    Raises DataError for a data set without such a column, or naming the row with a broken turn.
    """
    check_options(standardize_sharegpt, options, no_meaning=STANDARDIZE_NO_MEANING)
    columns = _columns(dataset)
    column = next((name for name in CHAT_COLUMNS if name in columns), None)
    if column is None:
        found = ", ".join(columns)
        raise DataError(f"standardize_sharegpt() got columns {found}; wanted one named {' or '.join(CHAT_COLUMNS)}")

    def standard(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {column: parse_messages(row[column], f"row {index + 1}", column)}

    return dataset.map(standard, with_indices=True, remove_columns=[column])


standardize_data_formats = standardize_sharegpt


def to_sharegpt(
    dataset: Dataset,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Dataset:
    """Rows of several columns to `conversations` of `from` and `value`.

    Args:
        merged_prompt: what the user says, with `{column}` for a column's text. A part in double square brackets is
            left out where one of its columns is empty: "{instruction}[[\\nYour input is:\\n{input}]]". Without a value,
            the column `merged_column_name`.
        output_column_name: the column of the answer.
        remove_unused_columns: whether only `conversations` is kept.
        conversation_extension: turns of the user in a conversation; all but the first come from other rows, at random.

    Raises UsageError for a column that is not there.
    """
    prompt = merged_prompt or "{" + merged_column_name + "}"
    used = [*re.findall(r"{(\w+)}", prompt), output_column_name]
    columns = _columns(dataset)
    for name in used:
        if name not in columns:
            raise UsageError(f"to_sharegpt() found no column {name!r}; the data set has {', '.join(columns)}")

    def conversation(row: dict[str, Any]) -> dict[str, Any]:
        question = {"from": "human", "value": _merged(prompt, row)}
        return {"conversations": [question, {"from": "gpt", "value": _text(row[output_column_name])}]}

    made = dataset.map(conversation, remove_columns=columns if remove_unused_columns else None)
    # Longer conversations are made of single exchanges, as notebooks expect; rows stay as many as they were.
    if conversation_extension <= 1:
        return made
    rng = random.Random(random_state)
    # A permutation for each further turn: every row is used equally often.
    orders = [list(range(len(made))) for _ in range(conversation_extension - 1)]
    for order in orders:
        rng.shuffle(order)
    turns = made["conversations"][:]
    joined = [sum((turns[order[i]] for order in orders), list(turns[i])) for i in range(len(made))]
    return concatenate_datasets(
        [made.remove_columns("conversations"), Dataset.from_dict({"conversations": joined})], axis=1
    )


def apply_chat_template(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    default_system_message: str | None = None,
) -> Dataset | IterableDataset:
    """`dataset` with a column `text`: its conversations as the chat template writes them.

    A `chat_template` shows one exchange, with {INPUT} for what the user says and {OUTPUT} for the answer: the text
    before it opens the conversation, and may hold {SYSTEM}, for which `default_system_message` stands in where a
    conversation has no system turn. The tokenizer keeps it as its own.

    Raises UsageError for a template without {INPUT} and {OUTPUT}, DataError for a data set without conversations.
    """
    if chat_template is not None:
        tokenizer.chat_template = example_to_template(chat_template, default_system_message)
    columns = _columns(dataset)
    column = next((name for name in CHAT_COLUMNS if name in columns), None)
    if column is None:
        found = ", ".join(columns)
        raise DataError(f"apply_chat_template() got columns {found}; wanted one named {' or '.join(CHAT_COLUMNS)}")

    def text(row: dict[str, Any]) -> dict[str, str]:
        # The text holds the special tokens; Parley encodes rows of text without adding a second beginning.
        return {"text": tokenizer.apply_chat_template(row[column], tokenize=False)}

    return dataset.map(text)


def example_to_template(example: str, default_system: str | None = None) -> str:
    """The Jinja template of an exchange that shows {INPUT} and {OUTPUT}. Raises UsageError where it does not."""
    if INPUT not in example or OUTPUT not in example or example.index(INPUT) > example.index(OUTPUT):
        raise UsageError(
            "chat_template: wanted a text with {INPUT} and, after it, {OUTPUT}, as one exchange is written"
        )
    before, _, rest = example.partition(INPUT)
    between, _, after = rest.partition(OUTPUT)
    if INPUT in after:  # the exchange is shown twice: what ends an answer is what the two have between them
        after = after.partition(INPUT)[0]
        header = _common_end(before, after)
        end = after.removesuffix(header)
    else:
        end = after
        header = _header(before, end)
    opening = before.removesuffix(header)
    system, default = _system(opening, default_system)
    # Without an end of its own, an answer needs a token after which the model stops.
    answer_end = _quote(end) if end.strip() else f"eos_token + {_quote(end)}"
    begins = '{{ bos_token if not opening.startswith(bos_token or "<bos>") else "" }}'
    return (
        "{%- if messages and messages[0]['role'] == 'system' %}"
        f"{{%- set opening = {system} %}}{{%- set turns = messages[1:] %}}"
        f"{{%- else %}}{{%- set opening = {default} %}}{{%- set turns = messages %}}{{%- endif %}}"
        f"{begins}{{{{- opening }}}}"
        "{%- for message in turns %}{%- if message['role'] == 'user' %}"
        f"{{{{- {_quote(header)} + message['content'] + {_quote(between)} }}}}"
        "{%- elif message['role'] == 'assistant' %}"
        f"{{{{- message['content'] }}}}{{{{- {answer_end} }}}}"
        "{%- else %}{{- raise_exception('this template writes no turns of ' + message['role']) }}"
        "{%- endif %}{%- endfor %}"
    )


def _header(before: str, end: str) -> str:
    """The header of each user turn, taken from the text of the example that precedes the first user turn."""
    if SYSTEM in before:
        return before.partition(SYSTEM)[2].removeprefix(end)
    if end.strip() and end in before:
        return before.rpartition(end)[2]
    # A line of its own after the last blank line: "Below is ...\n\n### Instruction:\n".
    return before[before.rstrip("\n").rfind("\n\n") + 2 :] if "\n\n" in before.rstrip("\n") else before


def _system(opening: str, default: str | None) -> tuple[str, str]:
    """Jinja expressions for what opens a conversation with a system turn, and one without."""
    if SYSTEM not in opening:
        gap = opening[len(opening.rstrip()) :]
        return f"messages[0]['content'] + {_quote(gap)}", _quote(opening)
    head, _, tail = opening.partition(SYSTEM)
    without = head + default + tail if default else ""
    return f"{_quote(head)} + messages[0]['content'] + {_quote(tail)}", _quote(without)


def _quote(text: str) -> str:
    """A Jinja string."""
    return json.dumps(text, ensure_ascii=False)


def _common_end(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]


def _merged(prompt: str, row: dict[str, Any]) -> str:
    def optional(match: re.Match[str]) -> str:
        names = re.findall(r"{(\w+)}", match.group(1))
        return match.group(1) if all(_text(row[name]) for name in names) else ""

    kept = re.sub(r"\[\[(.*?)\]\]", optional, prompt, flags=re.DOTALL)
    return re.sub(r"{(\w+)}", lambda match: _text(row[match.group(1)]), kept)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    # A stream without features has no column names until a row is read.
    return dataset.column_names or list(next(iter(dataset)))
