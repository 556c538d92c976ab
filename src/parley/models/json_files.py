"""Read the JSON files of a model or adapter folder: data from strangers, so every wrong form is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from parley.errors import ModelError
from parley.text import one_line

Fields = TypeVar("Fields", bound=BaseModel)
MOST_BYTES = 64 * 2**20  # far above any config; the index of a model with 100,000 tensors has 10 MB


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError where it cannot be read, is no JSON, or holds anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelError(f"{path}: {path.stat().st_size / 2**20:,.0f} MB are too much for a configuration file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{path}: nested too deeply; save it again") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise ModelError(f"{path}: not valid JSON ({one_line(error)}); save it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: got {_kind(value)}, wanted an object of named settings; save it again")
    return value


def first_fault(error: ValidationError) -> str:
    """The first field that does not fit and why: "r: got 'x'; Input should be a valid integer"."""
    fault = error.errors(include_url=False)[0]
    # Of a field that may have several types, pydantic adds the type it tried last.
    field = ".".join(str(part) for part in fault["loc"][:1])
    return f"{field}: got {one_line(repr(fault['input']), 60)}; {fault['msg']}"


def validated(kind: type[Fields], values: dict[str, Any], path: Path) -> Fields:
    """`values`, read from `path`, as the pydantic model `kind`. Raises ModelError that names the first wrong field."""
    try:
        return kind.model_validate(values)
    except (ValidationError, RecursionError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise ModelError(f"{path}: {reason}; correct it, or save it again") from None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
