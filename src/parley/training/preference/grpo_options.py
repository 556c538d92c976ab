"""Options of GRPOConfig that a run of Parley's cannot follow: each is refused by its name."""

from __future__ import annotations

import dataclasses
from typing import Any

import trl

from parley.config import GenerationSection
from parley.errors import UsageError

OWN_DECODER = "answers are sampled by Parley's own decoder from the weights that are trained"
REFUSED = {
    "use_vllm": OWN_DECODER,
    "use_transformers_continuous_batching": OWN_DECODER,
    "use_transformers_paged": OWN_DECODER,
    "transformers_continuous_batching_config": OWN_DECODER,
    "cache_implementation": OWN_DECODER,
    "sync_ref_model": "the reference is the trained weights before the first step",
    "cast_lm_head_to_fp32": "the head's product stays in the model's type, and the softmax after it is in fp32",
    "use_liger_kernel": "the packed step has kernels of its own",
    "pad_to_multiple_of": "completions are documents of one row without padding",
}
"""Options without which training is another one than asked for, with the reason."""
OF_REFUSED = ("vllm_", "ref_model_")
"""Prefixes of options that only refused ones read."""
CHOICES = {
    "loss_type": ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
"""Options whose values TRL looks at in the first step."""
GENERATION = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "stop_strings": "stop",
}
"""Keys of `generation_kwargs` that the decoder follows, with their names in GenerationSection."""


def check_options(args: trl.GRPOConfig, prefix: str = "") -> None:
    """Raises UsageError that names the first option that cannot have effect. `prefix`: of its name in a message."""
    defaults = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    for name, reason in REFUSED.items():
        if getattr(args, name) not in (defaults[name], None):
            raise UsageError(f"{prefix}{name} is not followed: {reason}; leave it out, or use trl.GRPOTrainer")
    for name, default in defaults.items():
        if name.startswith(OF_REFUSED) and getattr(args, name) != default:
            reason = OWN_DECODER if name.startswith("vllm_") else REFUSED["sync_ref_model"]
            raise UsageError(f"{prefix}{name} is not followed: {reason}; leave it out, or use trl.GRPOTrainer")
    for name, choices in CHOICES.items():
        if (value := getattr(args, name)) not in choices:
            raise UsageError(f"{prefix}{name}: got {value!r}; wanted one of {', '.join(choices)}")
    sampling_settings(args, 1, prefix)


def sampling_settings(args: trl.GRPOConfig, longest: int, prefix: str = "") -> GenerationSection:
    """How answers are sampled; `longest`: tokens of an answer where `max_completion_length` is None.

    Raises UsageError for a value that sampling does not take, and for keys of generation_kwargs that are not known.
    """
    values: dict[str, Any] = {
        "max_new_tokens": args.max_completion_length or longest,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k or 0,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
    }
    for name, value in (args.generation_kwargs or {}).items():
        if (name, value) == ("do_sample", True):  # as always
            continue
        if name not in GENERATION:
            raise UsageError(
                f"{prefix}generation_kwargs: {name!r} is not followed: {OWN_DECODER}; it knows {', '.join(GENERATION)}"
            )
        if name == "stop_strings":
            value = [value] if isinstance(value, str) else value
        values[GENERATION[name]] = value
    if values["temperature"] == 0:
        raise UsageError(f"{prefix}temperature: got 0; a group of equal answers teaches nothing: set more than 0")
    try:
        return GenerationSection(**values)
    except ValueError as error:
        raise UsageError(f"{prefix}{_first(error)}") from None


def _first(error: Any) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: got {first['input']!r}; {first['msg']}"
