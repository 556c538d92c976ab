"""Which path of training a model takes with LoRA and default settings, from its configuration alone."""

from __future__ import annotations

import copy

from transformers import AutoModelForCausalLM, PreTrainedConfig

from parley.config import ModelSection
from parley.models.device import pick_device
from parley.models.doctor import Finding
from parley.models.load import load_config
from parley.models.meta_model import META
from parley.train_step.bind import Unsupported, supported_family
from parley.train_step.captured_step import check_captured

OPTIONS = "`parley plan` says the path of a run with its options, and counts it"


def path_finding(name: str) -> Finding:
    """For `parley doctor --model`. Raises ModelError for a model that is missing or damaged."""
    section = ModelSection(name=name)
    label = f"training {name}"
    config = load_config(section)
    try:
        family = supported_family(config)
    except Unsupported as reason:
        on_gpu = pick_device(section.device).type == "cuda"
        return Finding(label, _path_without_fused_step(config, str(reason), on_gpu), "note", OPTIONS)
    return Finding(
        label,
        f"fused step and Parley's decoder ({family.model_type} family); dropout and DoRA train on the fused step; "
        "the captured path takes other options",
        advice=OPTIONS,
    )


def _path_without_fused_step(config: PreTrainedConfig, reason: str, on_gpu: bool) -> str:
    lacking = why_not_captured(config)
    if lacking is not None:
        return f"plain path: {reason}; no captured path: {lacking}"
    if on_gpu:
        return f"captured path: {reason}"
    return f"plain path: {reason}; the captured path on a GPU, or here with training.engine: captured"


def why_not_captured(config: PreTrainedConfig) -> str | None:
    """Why models of this configuration do not take the captured path: as a run decides, without weights."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        with META:
            model = AutoModelForCausalLM.from_config(config)
        check_captured(model, None)
    except Unsupported as reason:
        return str(reason)
    return None
