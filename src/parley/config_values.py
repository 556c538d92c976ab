"""The values that settings may have: types with their ranges, and what no setting accepts."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from parley.errors import UsageError
from parley.text import shorten_middle

MAX_COUNT = 2**31 - 1  # counts reach int32 tensors and range objects of the libraries below
MAX_RANK = 16_384  # no matrix of today's models has a higher one
MAX_SEED = 2**32 - 1  # NumPy's generator takes 32 bits, and transformers seeds it with training.seed
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of a file name and of a path on Linux


def checked_path(text: str) -> str:
    """`text`, a path or a hub id, with `~` expanded. Raises ValueError for a path that no file system accepts."""
    if not text.strip():
        raise ValueError("it is empty; wanted a path or a hub id")
    if len(text.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in text.split("/")):
        raise ValueError(f"a path has at most {MAX_PATH_BYTES} bytes, and {MAX_NAME_BYTES} between two slashes")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{text.partition('/')[0]} is no user of this machine; write the path out") from None


PathText = Annotated[str, AfterValidator(checked_path)]
CheckedPath = Annotated[Path, AfterValidator(lambda path: Path(checked_path(str(path))))]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


def check_values(value: Any, path: str = "") -> None:
    """Raises UsageError for text and numbers that no setting accepts, those of TRL and PEFT included."""
    where = path or "settings"
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise UsageError(
                f"{where}: got {shorten_middle(repr(value), 120)}; wanted text without NUL that UTF-8 can hold"
            )
    elif isinstance(value, float) and not isfinite(value):
        raise UsageError(f"{where}: got {value}; wanted a finite number")
    elif isinstance(value, int) and abs(value) > 2**63 - 1:
        raise UsageError(f"{where}: got a number of {value.bit_length()} bits; wanted one of 64 at most")
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_values(key, path)
            check_values(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            check_values(inner, path)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: of a JSON or YAML escape, or of an argument that is not UTF-8
        return False
    return True
