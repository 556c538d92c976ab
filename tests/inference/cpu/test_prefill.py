"""How prompts are cut into passes; what they say is held to transformers in test_decoder.py."""

from __future__ import annotations

from parley.inference.cpu.prefill import _cuts
from parley.inference.model import PREFILL_TOKENS


def test_passes_hold_so_many_tokens_and_a_longer_prompt_is_one_of_its_own() -> None:
    half, whole = PREFILL_TOKENS // 2, PREFILL_TOKENS
    assert _cuts([5]) == [0, 1]
    assert _cuts([half, half, 1]) == [0, 2, 3]
    assert _cuts([whole + 1, 3, whole, 2]) == [0, 1, 2, 3, 4]
    assert _cuts([3, whole + 1]) == [0, 1, 2]
