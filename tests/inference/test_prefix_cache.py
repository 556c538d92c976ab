from __future__ import annotations

from parley.inference.prefix_cache import Kept


def test_the_row_that_begins_alike_for_longest_and_never_the_whole_prompt() -> None:
    kept = Kept(3)
    assert kept.most_alike([1, 2], True)[1] == 0
    kept.read(0, [1, 2, 9], True)
    kept.read(2, [1, 2, 3, 4], True)
    assert kept.most_alike([1, 2, 3, 4, 5], True) == (2, 4)
    assert kept.most_alike([1, 2, 3], True) == (0, 2)  # its last token is what the first draw follows from
    assert kept.most_alike([7, 1, 2], True)[1] == 0


def test_voices_are_told_apart() -> None:
    kept = Kept(2)
    kept.read(0, [1, 2, 3], True)
    kept.read(1, [1, 2], False)
    assert kept.most_alike([1, 2, 3, 4], False) == (1, 2)


def test_a_token_that_was_drawn_last_is_in_no_row_yet() -> None:
    kept = Kept(2)
    kept.read(0, [1, 2], True)
    kept.draw(0, [3, 4])
    assert kept.most_alike([1, 2, 3, 4, 5], True) == (0, 3)
    kept.move(0, 1)
    kept.read(0, [9], True)
    assert kept.most_alike([1, 2, 3, 4, 5], True) == (1, 3)
    kept.draw(1, [5])
    assert kept.most_alike([1, 2, 3, 4, 5, 6], True) == (1, 4)
