"""What a run of given settings would take, by `parley plan`; `predict` and `references` run in the worker process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from parley.config import RunConfig
from parley.config_reference import SettingReference, section_models, setting_references, yaml_value
from parley.safe_yaml import load_yaml

if TYPE_CHECKING:
    from parley.training.plan.planner import Data

Verdict = Literal["fits", "tight", "does not fit"]
TIGHT = 0.85  # of what is free: above it, another program's growth ends the run


@dataclass(frozen=True)
class Prediction:
    """`plan`: as `parley plan --json` prints it; None where the method is not planned, which `note` says then."""

    plan: dict[str, Any] | None
    note: str | None = None

    @property
    def verdict(self) -> Verdict | None:
        if self.plan is None:
            return None
        if not self.plan["fits"]:
            return "does not fit"
        return "tight" if self.plan["peak_bytes"] > TIGHT * self.plan["free_bytes"] else "fits"


def predict(text: str, model: str | None = None) -> Prediction:
    """The plan of a run of the settings in `text`, with another model where `model` is given.

    Raises what `parley train` raises before it loads weights: for a key that TRL or PEFT does not know, a data set that
    cannot be read, a model that is not there.
    """
    from parley.models.device import pick_device
    from parley.pipeline import training_arguments
    from parley.training.plan.device import planned_device
    from parley.training.plan.run_plan import plan_for

    config = RunConfig.create(load_yaml(text, "settings") or {})
    if model is not None:
        config.model.name = model
    training_arguments(config)
    if config.training.method != "sft":
        return Prediction(None, f"training.method: {config.training.method} is checked, but not planned")
    device = planned_device(pick_device(config.model.device), None)
    return Prediction(plan_for(config, _data(config), device).to_json())


def _data(config: RunConfig) -> Data:
    """The lengths of the rows, kept while the files are the same: most changes of settings leave them alone."""
    model = config.model.model_dump_json(include={"name", "revision", "max_seq_length", "chat_template", "adapter"})
    files = [config.data.source, config.data.heldout, config.model.name, config.model.chat_template]
    changed = tuple(_modified(str(name)) for name in files if name)
    return _cached_data(config.data.model_dump_json(), model, changed, _Hidden(config))


@lru_cache(maxsize=8)
def _cached_data(data: str, model: str, changed: tuple[float, ...], config: _Hidden) -> Data:
    from parley.training.plan.run_plan import read_data

    return read_data(config.config)


class _Hidden:
    """A config beside the key of a cache: equal to every other."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


def _modified(name: str) -> float:
    try:
        return Path(name).stat().st_mtime
    except OSError:
        return 0.0


def references() -> list[SettingReference]:
    """Every setting there is, those of TRL's SFTConfig and PEFT's LoraConfig included."""
    from peft import LoraConfig

    from parley.training.arguments import ELSEWHERE, UNREAD
    from parley.training.sft_config import SFTConfig

    own = list(setting_references())
    spelled_out = {each.key for each in own}
    libraries = [*_fields("training", SFTConfig, {*ELSEWHERE, *UNREAD}), *_fields("lora", LoraConfig, {"task_type"})]
    assert {"training", "lora"} <= set(section_models())
    return own + [each for each in libraries if each.key not in spelled_out]


def _fields(section: str, dataclass_: type, left_out: set[str]) -> Iterator[SettingReference]:
    for field in fields(dataclass_):
        if field.init and field.name not in left_out:
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            meaning = " ".join(str(field.metadata.get("help", "")).split())
            yield SettingReference(f"{section}.{field.name}", kind, _default(field), meaning)


def _default(field: Field[Any]) -> str:
    plain = isinstance(field.default, bool | int | float | str | list | dict | None)
    return yaml_value(field.default) if plain else "its own"
