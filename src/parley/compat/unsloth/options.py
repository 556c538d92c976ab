"""Options of a function that has more of them in notebooks than a meaning here."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

from parley.config_keys import nearest
from parley.errors import UsageError

logger = logging.getLogger(__name__)


def check_options(
    function: Callable[..., Any],
    options: dict[str, Any],
    *,
    no_meaning: Iterable[str] = (),
    not_offered: dict[str, str] | None = None,
) -> None:
    """Sort out the `options` that `function` does not name itself.

    Those of `no_meaning` are named in one line. Those of `not_offered` (name to advice) raise UsageError once they
    ask for something; unknown ones raise it always, naming the nearest known.
    """
    name, not_offered, no_meaning = function.__name__, not_offered or {}, set(no_meaning)
    known = {parameter for parameter in inspect.signature(function).parameters if parameter != "options"}
    known |= no_meaning | set(not_offered)
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"{name}() got an unknown option {option!r}; did you mean {nearest(option, known)!r}?")
        # Notebooks write defaults out: None, False or 0 ask for nothing.
        if option in not_offered and value:
            raise UsageError(f"{name}({option}={value!r}) is not offered here; {not_offered[option]}")
    unused = sorted(option for option in options if option in no_meaning)
    if unused:
        logger.warning("%s: %s ha%s no meaning here", name, ", ".join(unused), "s" if len(unused) == 1 else "ve")
