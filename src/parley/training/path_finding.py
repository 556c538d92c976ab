"""Which path of training a model takes with LoRA and default settings, from its configuration alone."""

from __future__ import annotations

from parley.config import ModelSection
from parley.models.device import pick_device
from parley.models.doctor import Finding
from parley.models.load import load_config
from parley.train_step.bind import Unsupported, supported_family


def path_finding(name: str) -> Finding:
    """For `parley doctor --model`. Raises ModelError for a model that is missing or damaged."""
    section = ModelSection(name=name)
    label = f"training {name}"
    try:
        family = supported_family(load_config(section))
    except Unsupported as reason:
        # Whether documents are isolated there is shown by a probe when training begins.
        path = "captured path" if pick_device(section.device).type == "cuda" else "plain path"
        return Finding(
            label, f"{path}: {reason}", "note", "`parley plan` counts a run; training says the path it takes"
        )
    return Finding(
        label, f"fused step and Parley's decoder ({family.model_type} family); dropout and DoRA train on the fused step"
    )
