"""The models that a run can start from: the embedded one, runs, folders, and what was downloaded from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CacheNotFound, scan_cache_dir

from parley.config import DEMO_MODEL
from parley.models.demo import demo_model_path

Kind = Literal["embedded", "run", "folder", "hub"]
DEPTH = 3  # folders below an allowed one
MOST_FOLDERS = 5_000
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Model:
    """`name`: what model.name is set to; `title`: how a page calls it; `size` of its weights in bytes."""

    name: str
    title: str
    kind: Kind
    size: int


def list_models(root: Path, roots: Sequence[Path]) -> list[Model]:
    """What is there, without loading any: runs of `root` and folders of `roots`, the embedded model first."""
    found = [Model(DEMO_MODEL, DEMO_MODEL, "embedded", weights_size(demo_model_path()))]
    for folder in dict.fromkeys(roots):
        found += _local_models(folder, runs=folder == root)
    return [*found, *sorted(_downloaded(), key=lambda model: model.name.lower())]


def weights_size(folder: Path) -> int:
    """Bytes of the weight files in `folder`; 0 where it has none."""
    return sum(_size(entry) for entry in _entries(folder) if entry.name.endswith(WEIGHTS) and entry.is_file())


def _local_models(root: Path, *, runs: bool) -> Iterator[Model]:
    """Folders with a model's files, and the weights of runs; hidden folders and links are not followed."""
    waiting = [(root, 0)]
    for _ in range(MOST_FOLDERS):
        if not waiting:
            return
        path, depth = waiting.pop()
        title = str(path.relative_to(root)) if path != root else path.name
        if (path / "run.yaml").is_file():
            if runs:
                yield from _run_model(path, title)
            continue
        if (path / "config.json").is_file() and (size := weights_size(path)):
            yield Model(str(path), title, "folder", size)
            continue
        if depth < DEPTH:
            inner = [entry for entry in _entries(path) if entry.is_dir(follow_symlinks=False)]
            ordered = sorted(inner, key=lambda entry: entry.name, reverse=True)
            waiting += [(Path(entry.path), depth + 1) for entry in ordered if not entry.name.startswith(".")]


def _run_model(path: Path, title: str) -> Iterator[Model]:
    for name, config in (("adapter", "adapter_config.json"), ("model", "config.json")):
        if (path / name / config).is_file():
            yield Model(str(path / name), title, "run", weights_size(path / name))


def _downloaded() -> Iterator[Model]:
    """Models in the hub's cache whose configuration is there."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in repositories:
        files = {file.file_name for revision in repository.revisions for file in revision.files}
        if repository.repo_type == "model" and files & {"config.json", "adapter_config.json"}:
            yield Model(repository.repo_id, repository.repo_id, "hub", repository.size_on_disk)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0
