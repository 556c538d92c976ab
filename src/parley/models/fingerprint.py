"""A fingerprint of a model's weights, by which a run recognises its base later, from sizes and samples of the files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from parley.config import DEMO_MODEL, ModelSection
from parley.models.demo import demo_model_path
from parley.models.resolve import adapter_base, local_folder, run_weights

BLOCK = 2**16
BLOCKS = 64
"""Samples of a file. Training changes nearly every weight, so that far fewer would distinguish two models."""


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes and evenly spaced blocks of the weight files in `folder`: milliseconds for any size."""
    digest = sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for i in range(BLOCKS):
                opened.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()


def base_fingerprint(section: ModelSection) -> str | None:
    """The fingerprint of the base model under `section.name`; None for a hub id, whose commit identifies it.

    Does not use the network. Raises ModelError for a folder that is gone or an adapter that names no base.
    """
    while True:
        folder = demo_model_path() if section.name == DEMO_MODEL else local_folder(section.name)
        if folder is None:
            return None
        folder = run_weights(folder) or folder
        base = adapter_base(folder, section)
        if base is None:
            return weights_fingerprint(folder)
        section = base
