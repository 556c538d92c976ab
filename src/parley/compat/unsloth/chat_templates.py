"""`get_chat_template` and its companions as notebooks call them."""

from __future__ import annotations

import json
import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from parley.compat.unsloth.families import FAMILIES, NAMES, Family
from parley.compat.unsloth.options import check_options
from parley.compat.unsloth.responses import train_on_responses_only
from parley.config import nearest
from parley.data.messages import parse_messages
from parley.data.render import pin_date
from parley.errors import DataError, ModelError, UsageError

__all__ = ["get_chat_template", "standardize_data_formats", "standardize_sharegpt", "train_on_responses_only"]

logger = logging.getLogger(__name__)

CHAT_COLUMNS = ("conversations", "messages")
STANDARDIZE_NO_MEANING = [
    *("aliases_for_system", "aliases_for_user", "aliases_for_assistant"),
    *("batch_size", "num_proc", "tokenizer"),
]
PLAIN_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}

# Put before a template whose notebook's turns have other keys and roles; standard turns pass unchanged.
_RENAMING = """\
{{%- set renamed = namespace(turns=[]) -%}}
{{%- for turn in messages -%}}
{{%- set role = turn[{role}] if {role} in turn else turn["role"] -%}}
{{%- set words = turn[{content}] if {content} in turn else turn["content"] -%}}
{{%- set renamed.turns = renamed.turns + [dict(turn, role={roles}.get(role, role), content=words)] -%}}
{{%- endfor -%}}
{{%- set messages = renamed.turns -%}}
"""
_SYSTEM = """\
{{%- if messages and messages[0]["role"] != "system" -%}}
{{%- set messages = [dict(role="system", content={system})] + messages -%}}
{{%- endif -%}}
"""


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str = "chatml",
    mapping: dict[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """`tokenizer`, itself, with the chat template asked for.

    A tokenizer whose own template is of the family that `chat_template` names keeps it. Otherwise it gets a short
    one, of Llama 3's family or ChatML. `mapping` names the keys and roles of the notebook's turns, such as
    {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}; `system_message` opens conversations
    that have no system turn. ChatML on a tokenizer without <|im_end|> ends turns with the end-of-text token, unless
    `map_eos_token` is False.

    Raises UsageError for an unknown name, ModelError for a tokenizer that lacks the template's tokens.
    """
    check_options(get_chat_template, options, no_meaning=["patch_saving", "use_zoo_tokenizer_patch"])
    family = FAMILIES[_family_name(chat_template)]
    own = tokenizer.chat_template
    if not isinstance(own, str) or family.mark not in own:
        tokenizer.chat_template = _written(tokenizer, chat_template, family, map_eos_token)
    pin_date(tokenizer)
    mapping = PLAIN_MAPPING | (mapping or {})
    before = ""
    if mapping != PLAIN_MAPPING:
        roles = {mapping["user"]: "user", mapping["assistant"]: "assistant"}
        before = _RENAMING.format(
            role=json.dumps(mapping["role"]), content=json.dumps(mapping["content"]), roles=json.dumps(roles)
        )
    if system_message is not None:
        before += _SYSTEM.format(system=json.dumps(system_message, ensure_ascii=False))
    tokenizer.chat_template = before + tokenizer.chat_template
    return tokenizer


def standardize_sharegpt(dataset: Dataset, **options: Any) -> Dataset:
    """`dataset` with the turns of its column conversations or messages as `role` and `content`.

    Raises DataError for a data set without such a column, or naming the row with a broken turn.
    """
    check_options(standardize_sharegpt, options, no_meaning=STANDARDIZE_NO_MEANING)
    column = next((name for name in CHAT_COLUMNS if name in dataset.column_names), None)
    if column is None:
        found = ", ".join(dataset.column_names)
        raise DataError(f"standardize_sharegpt() got columns {found}; wanted one named {' or '.join(CHAT_COLUMNS)}")

    def standard(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {column: parse_messages(row[column], f"row {index + 1}", column)}

    return dataset.map(standard, with_indices=True, remove_columns=[column], desc="turns to role and content")


standardize_data_formats = standardize_sharegpt


def _family_name(chat_template: str) -> str:
    if chat_template not in NAMES:
        raise UsageError(
            f"get_chat_template() got an unknown chat_template {chat_template!r}; did you mean "
            f"{nearest(str(chat_template), NAMES)!r}? A template of your own goes into tokenizer.chat_template"
        )
    return NAMES[chat_template]


def _written(tokenizer: PreTrainedTokenizerBase, name: str, family: Family, map_eos_token: bool) -> str:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in family.tokens if token not in vocabulary]
    where = tokenizer.name_or_path or "the tokenizer"
    if family.template is None:
        offered = ", ".join(known for known, each in FAMILIES.items() if each.template)
        raise ModelError(
            f"{where} has no {name} template of its own, and those written here are {offered}; name one of them, or "
            "leave get_chat_template out to use the tokenizer's own"
        )
    if not missing:
        tokenizer.eos_token = family.end
        return family.template
    if family is FAMILIES["chatml"] and map_eos_token and tokenizer.eos_token:
        logger.warning("get_chat_template: %s has no %s; turns end with %s", where, family.end, tokenizer.eos_token)
        return family.template.replace(f"'{family.end}\\n'", "eos_token + '\\n'")
    raise ModelError(
        f"{where} has no token {missing[0]}, which {name} needs; use the tokenizer's own template, or chatml"
    )
