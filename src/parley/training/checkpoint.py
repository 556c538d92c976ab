"""Checkpoints on disk: written beside their place, synced and renamed; read only where every byte is as written.

checkpoint-N/
  adapter_model.safetensors and adapter_config.json, or model.safetensors and config.json; the tokenizer's files
  optimizer.pt, scheduler.pt, rng_state.pth   tensors and numbers, read with torch.load(weights_only=True)
  trainer_state.json                          transformers' state: step, epoch, logged figures
  resume_state.json                           settings, data and counters (training/resume_state.py)
  manifest.json                               size and SHA-256 of each other file

The files but for the last two are those of transformers' Trainer, so that TRL can resume from them too. A file is
pickled by none of this, and training_args.bin, which is, is neither written nor read.

A checkpoint is complete or it is not there: its folder gets its name, in one rename, after its last byte is on the disk
(write, fsync of files and folder, rename, fsync of the parent: Pillai et al., OSDI 2014). What a disk damages later is
found by the checksums.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
TRAINING_ARGS = "training_args.bin"
OPTIMIZER = "optimizer.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
MAX_JSON_BYTES = 256 * 2**20  # trainer_state.json of a million logged steps


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that is not as it was written, and how that shows."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name} is damaged ({self.reason})"


def step_of(path: Path) -> int | None:
    """N of a folder called checkpoint-N; None for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders called checkpoint-N in `folder`, the newest (largest N) first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint in `folder` that is whole, and the newer ones that are not."""
    damaged: list[Damaged] = []
    for path in checkpoints_in(folder):
        reason = None if is_foreign(path) else find_damage(path)
        if reason is None:
            return path, damaged
        damaged.append(Damaged(path, reason))
    return None, damaged


def is_foreign(path: Path) -> bool:
    """Whether `path` is a checkpoint of TRL's or transformers' own Trainer, which writes no checksums."""
    has = {name: (path / name).is_file() for name in (MANIFEST, TRAINING_ARGS, TRAINER_STATE)}
    return has[TRAINING_ARGS] and has[TRAINER_STATE] and not has[MANIFEST]


def find_damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None where it is whole.

    Reads every byte once: about a second per GB.
    """
    if not path.is_dir():
        return "it is no folder"
    try:
        recorded = read_json(path / MANIFEST)["files"]
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in recorded.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    present = {str(file.relative_to(path)) for file in _files(path)} - {MANIFEST}
    if missing := sorted(wanted.keys() - present):
        return f"{missing[0]} is missing"
    if extra := sorted(present - wanted.keys()):
        return f"{extra[0]} was added"
    for name, (size, digest) in wanted.items():
        try:
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes of {size}"
            if _sha256(path / name) != digest:
                return f"the checksum of {name} is wrong"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    if step_of(path) not in (None, read_json(path / TRAINER_STATE).get("global_step")):
        return f"its {TRAINER_STATE} is of another step"
    return None


def unfinished_folder(target: Path) -> Path:
    """Where `target` is written before it gets its name. No reader takes this name for a checkpoint."""
    return target.with_name(f".{target.name}.unfinished")


def commit(unfinished: Path, target: Path) -> None:
    """Give a written folder its checksums and its name, once all of it is on the disk.

    A folder that is there already gives way: it keeps its place until the new one is complete.
    """
    files = {}
    for file in _files(unfinished):
        sync(file)
        files[str(file.relative_to(unfinished))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync(manifest)
    _sync_names(unfinished)
    replace_folder(unfinished, target)


def sync_folder(folder: Path) -> None:
    """Wait until every file in `folder`, and every name, is on the disk."""
    for file in _files(folder):
        sync(file)
    _sync_names(folder)


def replace_folder(source: Path, target: Path) -> None:
    """Rename the folder `source` to `target`; what had that name is moved aside first, and removed after."""
    old = target.with_name(f".{target.name}.old")
    remove_folder(old)
    if target.exists():
        os.rename(target, old)  # rename() replaces no folder that has files
    os.rename(source, target)
    sync(target.parent)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Remove a folder under a name that no reader looks for, so that a kill halfway leaves no torn checkpoint."""
    if not path.is_dir():
        return
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        path = path.rename(hidden)
    shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed in `folder`.

    Only for the one that holds the folder's lock: another's unfinished checkpoint looks the same.
    """
    for pattern in (".checkpoint-*.unfinished", ".checkpoint-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for old in folder.glob(".checkpoint-*.old"):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames: the old one is still whole
            old.rename(target)


def rotate(folder: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the checkpoints written first, until `limit` are left; those in `keep` stay."""
    if limit is None or limit <= 0:
        return
    written_last = sorted(checkpoints_in(folder), key=lambda path: (path.stat().st_mtime_ns, step_of(path)))[::-1]
    protected = {path.resolve() for path in keep}
    excess = len(written_last) - max(limit, len(protected))
    for path in written_last[::-1]:
        if excess <= 0:
            return
        if path.resolve() not in protected:
            remove_folder(path)
            excess -= 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError where it is too large or no object."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: over {MAX_JSON_BYTES} bytes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: no object")
    return values


WRITE_FAULTS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file too large for this file system or limit",
    errno.EROFS: "read-only file system",
    errno.EIO: "input/output error",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ESTALE: "network file system gone",
}
UNRELATED_TO_SPACE = {WRITE_FAULTS[code] for code in (errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)}
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What Python, torch.save and safetensors raise where a file cannot be written; and for other reasons, too."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_fault(error: BaseException) -> str | None:
    """Why a file could not be written, in a few words; None for an error of another kind.

    Python gives the errno. safetensors and tokenizers are written in Rust and give it in their message, tokenizers in a
    bare Exception; torch.save gives none.
    """
    code = error.errno if isinstance(error, OSError) else None
    if match := _OS_ERROR.search(str(error)):
        code = int(match[1])
    if code in WRITE_FAULTS:
        return WRITE_FAULTS[code]
    if isinstance(error, SafetensorError) and "No space left" in str(error):
        return WRITE_FAULTS[errno.ENOSPC]
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        return "torch could not write the file"
    return None


def _sync_names(folder: Path) -> None:
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
