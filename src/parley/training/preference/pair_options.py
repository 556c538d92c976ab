"""Options of DPOConfig and KTOConfig that are accepted and change nothing: named with their reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import trl

WITHOUT_EFFECT = {
    "padding_free": "documents of a step are always one row without padding",
    "precompute_ref_log_probs": "reference log-probabilities are always measured once and kept",
    "precompute_ref_batch_size": "reference log-probabilities are measured in the passes of a step",
    "dataset_num_proc": "rows are rendered in one process",
    "pad_token": "documents of a step are one row without padding",
}
"""Option, with the reason."""
READS_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}


class Need(NamedTuple):
    """What an option is read with, in words, and whether that is given."""

    what: str
    given: Callable[[Any], Any]


SYNC = Need("sync_ref_model", lambda args: False)
NEEDED: dict[str, Need] = {
    "label_smoothing": Need(
        f"loss_type {', '.join(sorted(READS_SMOOTHING))}", lambda args: READS_SMOOTHING & set(args.loss_type)
    ),
    "discopop_tau": Need("loss_type discopop", lambda args: "discopop" in args.loss_type),
    "f_alpha_divergence_coef": Need(
        "f_divergence_type alpha_divergence", lambda args: args.f_divergence_type == "alpha_divergence"
    ),
    "ref_model_mixup_alpha": SYNC,
    "ref_model_sync_steps": SYNC,
}
"""Option of the losses of pairs, to what it has no effect without."""


def pair_options_without_effect(args: Any, read: frozenset[str] = frozenset()) -> list[str]:
    """One line for each option of a preference loss that is set and changes nothing; `read`: by another loss."""
    kind = trl.DPOConfig if isinstance(args, trl.DPOConfig) else trl.KTOConfig
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    changed = {name for name, value in vars(args).items() if value not in (defaults.get(name), None)} - read
    lines = [f"{name} has no effect: {reason}" for name, reason in WITHOUT_EFFECT.items() if name in changed]
    return lines + [
        f"{name} has no effect without {need.what}"
        for name, need in NEEDED.items()
        if name in changed and not need.given(args)
    ]
