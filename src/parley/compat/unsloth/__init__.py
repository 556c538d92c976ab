"""For notebooks written for Unsloth: the names they import, on top of Parley's own code. Nothing is patched.

A notebook changes its imports and runs, on a GPU or without one:

    from parley.compat.unsloth import FastLanguageModel, is_bfloat16_supported
    from parley.compat.unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
    from parley import SFTTrainer

Options that only steer speed or memory there are taken and named in one line; options that would change the result
and are not offered here, and unknown ones, are a UsageError.
"""

from parley.compat.unsloth.chat_templates import (
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    train_on_responses_only,
)
from parley.compat.unsloth.model import FastLanguageModel, is_bf16_supported, is_bfloat16_supported

__all__ = [
    "FastLanguageModel",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "standardize_data_formats",
    "standardize_sharegpt",
    "train_on_responses_only",
]
