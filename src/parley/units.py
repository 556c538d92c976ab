"""Units and small arithmetic that several packages share."""

GIB = 2**30  # bytes


def file_size(size: int) -> str:
    """`size` bytes in the unit that people read it in."""
    for unit, bytes_of_it in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.1f} {unit}"
    return f"{size} B"


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple
