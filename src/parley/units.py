"""Units and small arithmetic that several packages share."""

GIB = 2**30  # bytes


def file_size(size: int) -> str:
    """`size` bytes in the unit that people read it in."""
    for unit, bytes_of_it in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.1f} {unit}"
    return f"{size} B"


def counted(count: float, thing: str) -> str:
    """A number and its noun: 1 step, 1,200 steps."""
    return f"{count:,.15g} {thing}" + ("" if count == 1 else "s")


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def short_count(count: int) -> str:
    """1.24 B for 1,235,814,400; parameters are counted so."""
    for unit, name in [(1e9, "B"), (1e6, "M"), (1e3, "k")]:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)
