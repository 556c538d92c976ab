"""transformers' internals that Parley needs."""

from __future__ import annotations

from transformers import PreTrainedModel


def attention_implementation(model: PreTrainedModel) -> str:
    """The attention that `model` runs: eager, sdpa, flash_attention_2, ...

    Private: the attribute. Public alternative: none; `set_attn_implementation` sets what nothing public reads.
    """
    return str(model.config._attn_implementation)
