"""Files that come from a browser: into the studio's own folder, under names that lead nowhere else."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from parley.data.compression import COMPRESSIONS
from parley.data.files import KINDS, kind_of
from parley.errors import RunError, UsageError
from parley.units import file_size

MOST_BYTES = 16 * 2**30  # of all uploads together
LONGEST_NAME = 100
PART = ".part"
PART_SECONDS = 3600.0  # without a write, after which nobody sends the rest
_STRANGE = re.compile(r"[^\w.-]+")


def upload_path(folder: Path, name: str) -> Path:
    """A file in `folder` that does not exist, named as `name` is. Raises UsageError for what is no data file."""
    kept = _STRANGE.sub("-", name.replace("\\", "/").rpartition("/")[2]).lstrip(".-")
    if kind_of(Path(kept)) is None:
        raise UsageError(f"{name}: not a data file; wanted {', '.join(KINDS)}, or one with {', '.join(COMPRESSIONS)}")
    stem, dot, suffixes = kept.partition(".")
    stem = stem[:LONGEST_NAME]
    candidates = (f"{stem}{number}{dot}{suffixes[:40]}" for number in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(path for each in candidates if not (path := folder / each).exists())


async def save_upload(folder: Path, name: str, chunks: AsyncIterator[bytes]) -> Path:
    """Write `chunks` as they come; the file appears when it is whole. Raises UsageError and RunError."""
    target = upload_path(folder, name)
    _remove_old_parts(folder)
    space = MOST_BYTES - sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    part = folder / f"{secrets.token_hex(8)}{PART}"  # two tabs may send a file of one name
    try:
        with part.open("xb") as file:
            async for chunk in chunks:
                space -= len(chunk)
                if space < 0:
                    raise UsageError(f"uploads take {file_size(MOST_BYTES)} at most; remove some from {folder}")
                await asyncio.to_thread(file.write, chunk)  # a slow disk does not hold up the other pages
        while target.exists():
            target = upload_path(folder, name)
        part.rename(target)
    except OSError as error:
        raise RunError(f"{name}: cannot be stored ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _remove_old_parts(folder: Path) -> None:
    """Remove what uploads left behind whose studio was killed; they take space, and nothing continues them."""
    for part in folder.glob(f"*{PART}"):
        with suppress(OSError):  # another studio of this folder may do the same
            if time.time() - part.stat().st_mtime > PART_SECONDS:
                part.unlink()
