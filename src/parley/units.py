"""Units and small arithmetic that several packages share."""

GIB = 2**30  # bytes


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple
