"""What every setting of a run is called, takes and means, by the models of config.py: for references and completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from parley.config import RunConfig
from parley.config_values import MAX_COUNT


@dataclass(frozen=True)
class SettingReference:
    """One setting: its dotted `key`, its type and default as YAML writers read them, and the values it can take."""

    key: str
    type: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


def section_models() -> dict[str, type[BaseModel]]:
    """The model of each section of a run's settings, by its key."""
    found = {}
    for name, field in RunConfig.model_fields.items():
        model = next((part for part in (field.annotation, *get_args(field.annotation)) if _is_section(part)), None)
        if model is not None:
            found[name] = model
    return found


def setting_references() -> Iterator[SettingReference]:
    """All settings that the models spell out, top-level ones first."""
    sections = section_models()
    for name, field in RunConfig.model_fields.items():
        if name not in sections:
            yield _reference(name, field)
    for name, model in sections.items():
        for key, field in model.model_fields.items():
            yield _reference(f"{name}.{key}", field)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _reference(key: str, field: Any) -> SettingReference:
    default = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    choices = tuple(_choices(field.annotation))
    return SettingReference(key, _type(field), yaml_value(default), field.description or "", choices)


def _choices(annotation: Any) -> Iterator[str]:
    """The values of the Literals in an annotation, and true and false for a bool."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for part in get_args(annotation):
            yield from _choices(part)


def _type(field: Any) -> str:
    """The annotation as YAML writers read it, with its bounds."""
    return ", ".join([_annotation(field.annotation), *_bounds(field.metadata)])


def _annotation(annotation: Any) -> str:
    """An annotation in words; validators inside `Annotated` say nothing about the value that is wanted."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        metadata = [part for rule in arguments[1:] for part in getattr(rule, "metadata", [rule])]
        return " ".join([_annotation(arguments[0]), *_bounds(metadata)])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_annotation, arguments))
    if arguments:
        return f"{origin.__name__}[{', '.join(map(_annotation, arguments))}]"
    return {"Path": "path"}.get(annotation.__name__, annotation.__name__)


def _bounds(metadata: Sequence[Any]) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(signs[name], getattr(rule, name)) for rule in metadata for name in signs if hasattr(rule, name)]
    return [f"{sign} {value}" for sign, value in found if value != MAX_COUNT]


def yaml_value(value: Any) -> str:
    """`value` in one line of YAML."""
    plain = value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)
    return yaml.safe_dump(plain, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("...\n").strip()
