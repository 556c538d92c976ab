"""What stands in the rows of a cache, so that a prompt which begins as another did is read from there on.

A chat's next turn repeats all turns before it, and prompts share what their template and system message write.
"""

from __future__ import annotations

from collections.abc import Sequence


class Kept:
    """The tokens whose keys and values each row holds from its beginning, and whether they are the tuned model's.

    A row keeps what it held when its answer is over, until another prompt is read into it.
    """

    def __init__(self, rows: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.tuned = [False] * rows
        self.drawn = [False] * rows  # the last token was drawn: a step has yet to read it

    def most_alike(self, prompt: Sequence[int], tuned: bool) -> tuple[int, int]:
        """The row that begins as `prompt` does for longest, and for how many tokens: never its last, which is read."""
        rows = zip(self.ids, self.tuned, self.drawn, strict=True)
        shared = [
            min(_shared(ids, prompt), len(ids) - drawn, len(prompt) - 1) if its_tuned == tuned else 0
            for ids, its_tuned, drawn in rows
        ]
        most = max(shared)
        return shared.index(most), most

    def read(self, row: int, ids: Sequence[int], tuned: bool) -> None:
        """`row` now holds `ids` and nothing else."""
        self.ids[row], self.tuned[row], self.drawn[row] = list(ids), tuned, False

    def draw(self, row: int, ids: Sequence[int]) -> None:
        """An answer's next tokens; all but the last of them are in the row."""
        self.ids[row] += ids
        self.drawn[row] = True

    def clear(self) -> None:
        """Forget every row."""
        for row in range(len(self.ids)):
            self.read(row, [], False)

    def move(self, source: int, target: int) -> None:
        """One row was copied to another."""
        self.read(target, self.ids[source], self.tuned[source])
        self.drawn[target] = self.drawn[source]


def _shared(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    for count, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return count
    return min(len(some), len(others))
