from __future__ import annotations

from parley.inference.cpu.prefix_cache import PrefixCache


def test_the_row_that_begins_alike_for_longest_and_never_the_whole_prompt() -> None:
    prefixes = PrefixCache(3)
    assert prefixes.longest_match([1, 2], True)[1] == 0
    prefixes.set(0, [1, 2, 9], True)
    prefixes.set(2, [1, 2, 3, 4], True)
    assert prefixes.longest_match([1, 2, 3, 4, 5], True) == (2, 4)
    assert prefixes.longest_match([1, 2, 3], True) == (0, 2)  # its last token is whose logits the first sample needs
    assert prefixes.longest_match([7, 1, 2], True)[1] == 0


def test_base_and_adapter_rows_are_distinguished() -> None:
    prefixes = PrefixCache(2)
    prefixes.set(0, [1, 2, 3], True)
    prefixes.set(1, [1, 2], False)
    assert prefixes.longest_match([1, 2, 3, 4], False) == (1, 2)


def test_the_last_sampled_token_is_in_no_row_yet() -> None:
    prefixes = PrefixCache(2)
    prefixes.set(0, [1, 2], True)
    prefixes.append(0, [3, 4])
    assert prefixes.longest_match([1, 2, 3, 4, 5], True) == (0, 3)
    prefixes.move(0, 1)
    prefixes.set(0, [9], True)
    assert prefixes.longest_match([1, 2, 3, 4, 5], True) == (1, 3)
    prefixes.append(1, [5])
    assert prefixes.longest_match([1, 2, 3, 4, 5, 6], True) == (1, 4)
