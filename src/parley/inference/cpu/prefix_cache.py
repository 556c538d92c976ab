"""Which prompts the KV cache holds, so that one that begins as another did is prefilled from there on.

A chat's next turn repeats all turns before it, and prompts share what their template and system message write.
"""

from __future__ import annotations

from collections.abc import Sequence


class PrefixCache:
    """The tokens whose keys and values each row holds from its beginning, and whether the adapter computed them.

    A row keeps them after its answer is finished, until another prompt is prefilled into it.
    """

    def __init__(self, rows: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.adapter = [False] * rows
        self.pending = [False] * rows  # the last id was sampled: its keys and values come with the next step

    def longest_match(self, prompt: Sequence[int], adapter: bool) -> tuple[int, int]:
        """The row with the longest common prefix with `prompt`, and its length.

        The prompt's last token never counts: prefill needs it for the logits of the first sampled one.
        """
        rows = zip(self.ids, self.adapter, self.pending, strict=True)
        lengths = [
            min(_common_prefix(ids, prompt), len(ids) - pending, len(prompt) - 1) if with_adapter == adapter else 0
            for ids, with_adapter, pending in rows
        ]
        longest = max(lengths)
        return lengths.index(longest), longest

    def set(self, row: int, ids: Sequence[int], adapter: bool) -> None:
        """`row` now holds `ids` and nothing else."""
        self.ids[row], self.adapter[row], self.pending[row] = list(ids), adapter, False

    def append(self, row: int, ids: Sequence[int]) -> None:
        """An answer's next tokens; all but the last of them are in the row."""
        self.ids[row] += ids
        self.pending[row] = True

    def move(self, source: int, target: int) -> None:
        """One row was copied to another."""
        self.set(target, self.ids[source], self.adapter[source])
        self.pending[target] = self.pending[source]

    def clear(self) -> None:
        """Forget every row."""
        for row in range(len(self.ids)):
            self.set(row, [], False)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    for count, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return count
    return min(len(a), len(b))
