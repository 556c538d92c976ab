"""Regular expressions over module names, as lora.target_modules allows them, with a limit on their time.

Python's `re` cannot be interrupted, and a pattern such as `(.*)*x` takes exponential time. `regex`, which transformers
requires, has a timeout.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

import regex

from parley.errors import UsageError
from parley.text import one_line

SECONDS = 1.0  # for all names of a model together; ordinary patterns take a millisecond


def matching(pattern: str, names: Iterable[str], setting: str) -> list[str]:
    """The names that `pattern` matches in full. Raises UsageError for a pattern that is broken or takes too long."""
    try:
        compiled = regex.compile(pattern)
        end = perf_counter() + SECONDS
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - perf_counter(), 1e-3)) is not None]
    except regex.error as error:
        raise UsageError(f"{setting} {one_line(pattern, 80)!r}: not a regular expression ({error})") from None
    except (TimeoutError, RecursionError, MemoryError):
        raise UsageError(
            f"{setting} {one_line(pattern, 80)!r}: matching takes too long; write a simpler pattern, or list the names"
        ) from None
