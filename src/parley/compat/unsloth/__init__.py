"""For notebooks written for Unsloth: the names they import, on top of Parley's own code. Nothing is patched.

A notebook changes its imports and runs, on a GPU or without one:

    from parley.compat.unsloth import FastLanguageModel, is_bfloat16_supported
    from parley.compat.unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
    from parley import SFTConfig, SFTTrainer

Options that only steer speed or memory there are accepted and named in one line; options that would change the result
and are not offered here, and unknown ones, are a UsageError. So are the names of `out_of_scope` once they are used.
"""

from parley.compat.unsloth.chat_templates import (
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)
from parley.compat.unsloth.model import (
    FastCohereModel,
    FastGemma2Model,
    FastGemmaModel,
    FastGraniteModel,
    FastLanguageModel,
    FastLlamaModel,
    FastMistralModel,
    FastModel,
    FastQwen2Model,
    FastQwen3Model,
    is_bf16_supported,
    is_bfloat16_supported,
)
from parley.compat.unsloth.out_of_scope import (
    FastSentenceTransformer,
    FastTextModel,
    FastVisionModel,
    SyntheticDataKit,
    UnslothVisionDataCollator,
)
from parley.compat.unsloth.trainer import (
    PatchDPOTrainer,
    PatchFastRL,
    UnslothTrainer,
    UnslothTrainingArguments,
    unsloth_train,
)

__all__ = [
    "FastCohereModel",
    "FastGemma2Model",
    "FastGemmaModel",
    "FastGraniteModel",
    "FastLanguageModel",
    "FastLlamaModel",
    "FastMistralModel",
    "FastModel",
    "FastQwen2Model",
    "FastQwen3Model",
    "FastSentenceTransformer",
    "FastTextModel",
    "FastVisionModel",
    "PatchDPOTrainer",
    "PatchFastRL",
    "SyntheticDataKit",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "UnslothVisionDataCollator",
    "apply_chat_template",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
]
