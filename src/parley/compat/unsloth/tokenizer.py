"""The tokenizer that notebooks expect: `apply_chat_template` gives token ids, as it did before transformers 5.

Notebooks write `inputs = tokenizer.apply_chat_template(..., return_tensors="pt")` and then
`model.generate(input_ids=inputs)`, which needs the tensor itself and not the dictionary that is the default now.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from parley.data.conversation_text import check_bounds


class _IdsFromTemplate:
    """Put before a tokenizer's class: `return_dict` is False unless it is given."""

    def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
        check_bounds(self, conversation, *args[:1], **options)
        options.setdefault("return_dict", bool(options.get("return_assistant_tokens_mask")))
        return super().apply_chat_template(conversation, *args, **options)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        # The dynamic subclass cannot be pickled by name; data loaders with workers pickle the tokenizer.
        return _revived, (type(self).__mro__[2], self.__dict__)


def as_notebooks_expect(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer`, itself, as a subclass of its own class; it is saved under its own class's name."""
    if not isinstance(tokenizer, _IdsFromTemplate):
        own: Any = type(tokenizer)
        # The object keeps its identity, which a wrapper would not: transformers checks types with isinstance.
        tokenizer.__class__ = _subclass(own)
    return tokenizer


@cache
def _subclass(base: Any) -> Any:
    return type(base.__name__, (_IdsFromTemplate, base), {})


def _revived(base: type, state: dict[str, Any]) -> Any:
    subclass = _subclass(base)
    tokenizer = subclass.__new__(subclass)
    tokenizer.__dict__.update(state)
    return tokenizer
