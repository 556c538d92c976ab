"""The targets that `parley export --to` knows, in the order of the documentation."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from parley.config_keys import nearest
from parley.errors import UsageError
from parley.exporting.exporter import Exporter

# Modules are imported when their target is asked for: some need packages that not every installation has.
EXPORTERS = {
    "adapter": ("parley.exporting.adapter", "AdapterExporter"),
    "merged": ("parley.exporting.merged", "MergedExporter"),
    "gguf": ("parley.exporting.gguf.exporter", "GgufExporter"),
    "gguf-lora": ("parley.exporting.gguf.lora", "LoraGgufExporter"),
    "ollama": ("parley.exporting.ollama", "OllamaExporter"),
    "mlx": ("parley.exporting.mlx", "MlxExporter"),
    "vllm": ("parley.exporting.vllm", "VllmExporter"),
}
PACKAGES = dict.fromkeys(("gguf", "gguf-lora", "ollama"), ("gguf", "xllamacpp"))
"""Modules of the optional dependency group `export` that a target imports."""


def exporter_of(target: str) -> Exporter:
    """The exporter of `target`. Raises UsageError for an unknown one, or one whose packages are not installed."""
    if target not in EXPORTERS:
        similar = nearest(target, EXPORTERS)
        meant = f"did you mean {similar}?" if similar else f"it knows {', '.join(EXPORTERS)}"
        raise UsageError(f"--to {target}: no such export; {meant}")
    missing = [package for package in PACKAGES.get(target, ()) if find_spec(package) is None]
    if missing:
        raise UsageError(f"--to {target}: {', '.join(missing)} not installed; pip install 'parley-llm[export]'")
    module, name = EXPORTERS[target]
    exporter: Exporter = getattr(import_module(module), name)()
    return exporter
