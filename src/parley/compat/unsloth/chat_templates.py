"""`get_chat_template` as notebooks call it, and the module that they import its companions from."""

from __future__ import annotations

import json
import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from parley.compat.unsloth.datasets import (
    apply_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)
from parley.compat.unsloth.families import FAMILIES, NAMES, Family
from parley.compat.unsloth.options import check_options
from parley.compat.unsloth.responses import train_on_responses_only
from parley.config_keys import nearest
from parley.data.render import pin_date
from parley.errors import ModelError, UsageError

__all__ = [
    "apply_chat_template",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]

logger = logging.getLogger(__name__)

PLAIN_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
OWN_EOS = "eos_token"
"""What a tuple of template and end token names in place of a token: the tokenizer's own end-of-text token."""

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
    chat_template: str | tuple[str, ...] | list[str] = "chatml",
    mapping: dict[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """`tokenizer`, itself, with the requested chat template.

    A tokenizer whose own template is of the family that `chat_template` names keeps it. Otherwise it gets a short one
    of that family. A tuple is a template of the notebook's own and the token that ends its turns. `mapping` names the
    keys and roles of the notebook's turns, such as {"role": "from", "content": "value", "user": "human", "assistant":
    "gpt"}; `system_message` opens conversations that have no system turn. ChatML, or a template of the notebook's own,
    on a tokenizer without its end token ends turns with the end-of-text token, unless `map_eos_token` is False.

    Raises UsageError for an unknown name, ModelError for a tokenizer that lacks the template's tokens.
    """
    check_options(get_chat_template, options, no_meaning=["patch_saving", "use_zoo_tokenizer_patch"])
    if isinstance(chat_template, str):
        family = FAMILIES[_family_name(chat_template)]
        own = tokenizer.chat_template
        # The model's own template is what it was trained with; a short one of ours would change its ids.
        if not isinstance(own, str) or family.mark not in own:
            tokenizer.chat_template = _family_template(tokenizer, chat_template, family, map_eos_token)
    else:
        tokenizer.chat_template = _own_template(tokenizer, *chat_template[:2], map_eos_token=map_eos_token)
    # As `parley train` does: the golden ids of a run must not depend on the day.
    pin_date(tokenizer)
    # A mapping may name only some of the four, as in notebooks that rename roles alone.
    mapping = PLAIN_MAPPING | (mapping or {})
    before = ""
    if mapping != PLAIN_MAPPING:
        roles = {mapping["user"]: "user", mapping["assistant"]: "assistant"}
        before = _RENAMING.format(
            role=json.dumps(mapping["role"]), content=json.dumps(mapping["content"]), roles=json.dumps(roles)
        )
    # In the template, not in the rows: it must be there when the model is served as well.
    if system_message is not None:
        before += _SYSTEM.format(system=json.dumps(system_message, ensure_ascii=False))
    tokenizer.chat_template = before + tokenizer.chat_template
    return tokenizer


def _family_name(chat_template: str) -> str:
    if chat_template not in NAMES:
        raise UsageError(
            f"get_chat_template() got an unknown chat_template {chat_template!r}; did you mean "
            f"{nearest(str(chat_template), NAMES)!r}? A template of your own is a tuple of it and its end token"
        )
    return NAMES[chat_template]


def _family_template(tokenizer: PreTrainedTokenizerBase, name: str, family: Family, map_eos_token: bool) -> str:
    where = tokenizer.name_or_path or "the tokenizer"
    if family.template is None:
        offered = ", ".join(known for known, candidate in FAMILIES.items() if candidate.template)
        raise ModelError(
            f"{where} has no {name} template of its own, and those written here are {offered}; name one of them, or "
            "leave get_chat_template out to use the tokenizer's own"
        )
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in family.tokens if token not in vocabulary]
    if not missing:
        # Generation stops at eos_token, which has to be what training ends a turn with.
        if family.end is not None:
            tokenizer.eos_token = family.end
        _require_end(tokenizer, name)
        return family.template
    if family is FAMILIES["chatml"] and map_eos_token and tokenizer.eos_token:
        logger.warning("get_chat_template: %s has no %s; turns end with %s", where, family.end, tokenizer.eos_token)
        return family.template.replace(json.dumps(f"{family.end}\n"), "eos_token + '\\n'")
    raise ModelError(
        f"{where} has no token {missing[0]}, which {name} needs; use the tokenizer's own template, or chatml"
    )


def _own_template(tokenizer: PreTrainedTokenizerBase, template: str, end: str = OWN_EOS, *, map_eos_token: bool) -> str:
    """The notebook's own template, with the tokenizer's end token set to `end` or `end` replaced by it."""
    if end == OWN_EOS:
        _require_end(tokenizer, "this template")
    elif end in tokenizer.get_vocab():
        tokenizer.eos_token = end
    elif map_eos_token and tokenizer.eos_token:
        logger.warning("get_chat_template: no token %s; turns end with %s", end, tokenizer.eos_token)
        return template.replace(end, tokenizer.eos_token)
    else:
        raise ModelError(f"{tokenizer.name_or_path or 'the tokenizer'} has no token {end}; name one that it has")
    return template


def _require_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-text token, with which {name} ends turns; set "
            "tokenizer.eos_token"
        )
