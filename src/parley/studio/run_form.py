"""The settings that have a field of their own on the train page, in plain words, and how their text becomes a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parley.config import PREFERENCE_LEARNING_RATE, RunConfig
from parley.errors import UsageError
from parley.safe_yaml import load_yaml
from parley.studio.i18n import N_
from parley.studio.settings_edit import setting


@dataclass(frozen=True)
class FormField:
    """`label` and `why` are messages; `choices` are values with their messages, empty for a number."""

    key: str
    label: str
    why: str
    choices: tuple[tuple[str, str], ...] = ()


FIELDS = (
    FormField(
        "training.method",
        N_("Method"),
        N_(
            "What is learned from. Answers to imitate are the usual start. Pairs of a better and a worse answer, as "
            "blind votes give them, come after that."
        ),
        (
            ("sft", N_("answers to imitate")),
            ("dpo", N_("pairs: better and worse (DPO)")),
            ("simpo", N_("pairs, without the base beside it (SimPO)")),
            ("orpo", N_("pairs and imitation at once (ORPO)")),
            ("ipo", N_("pairs, against overfitting (IPO)")),
            ("kto", N_("answers marked good or bad (KTO)")),
        ),
    ),
    FormField(
        "training.num_train_epochs",
        N_("Epochs"),
        N_(
            "Passes over the data: how often each conversation is seen. One is right for thousands of them; for a few "
            "hundred, two or three. More, and it repeats them by heart."
        ),
    ),
    FormField(
        "training.max_steps",
        N_("Maximum steps"),
        N_("Ends training early. Empty: the epochs decide. A small number gives a quick first look."),
    ),
    FormField(
        "training.learning_rate",
        N_("Learning rate"),
        N_("How far each step moves. Too high and the loss jumps about or grows; too low and nothing changes."),
    ),
    FormField(
        "training.per_device_train_batch_size",
        N_("Batch size per device"),
        N_("Conversations at a time. More are faster and take more memory."),
    ),
    FormField(
        "training.gradient_accumulation_steps",
        N_("Gradient accumulation steps"),
        N_("Batches of one step: 2 at a time, 4 times, are steps of 8. Larger steps are steadier and fewer."),
    ),
    FormField(
        "lora.r",
        N_("LoRA rank"),
        N_(
            "The size of the adapter: how much can be learned. 16 is enough for a style; 64 for much "
            "new material. It takes little memory."
        ),
    ),
    FormField(
        "model.max_seq_length",
        N_("Maximum length (tokens)"),
        N_(
            "Longer conversations are left out. Memory grows with it. A token is about ¾ of an English word, or one "
            "Chinese character."
        ),
    ),
    FormField(
        "model.quantization",
        N_("Quantization"),
        N_("Precision of the base model. 4 bits (NF4) need a quarter of the memory of 16, at nearly the same quality."),
        (
            ("auto", N_("as it was saved")),
            ("none", N_("16 bits")),
            ("nf4", N_("4 bits (NF4)")),
            ("int8", N_("8 bits")),
        ),
    ),
    FormField(
        "data.heldout_rows",
        N_("Held-out conversations"),
        N_("Set aside and not trained on: they show whether it learned more than its data by heart."),
    ),
)
_BY_KEY = {field.key: field for field in FIELDS}


def values(text: str) -> dict[str, Any]:
    """The value of each field in the YAML `text`; None where it has the default. Empty where it is not YAML."""
    try:
        return {field.key: setting(text, field.key) for field in FIELDS}
    except UsageError:
        return {}


def defaults(text: str) -> dict[str, Any]:
    """What each field is where it is empty: the learning rate depends on the method."""
    config = RunConfig()
    found = {}
    for field in FIELDS:
        section, _, name = field.key.partition(".")
        found[field.key] = getattr(getattr(config, section), name)
    if values(text).get("training.method") not in (None, "sft"):
        found["training.learning_rate"] = PREFERENCE_LEARNING_RATE
    return found


def parsed(key: str, text: str) -> Any:
    """The value that `text` in the field `key` stands for; None for an empty one. Raises UsageError."""
    if key not in _BY_KEY:
        raise UsageError(f"{key}: has no field on this page; write it as YAML")
    text = text.strip()
    if not text:
        return None
    value = load_yaml(text, key)
    if not isinstance(value, str | int | float):
        raise UsageError(f"{key}: got {text!r}; wanted one number or word")
    return value
