"""Files that come from a browser: into the studio's own folder, under names that lead nowhere else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

from parley.data.compression import COMPRESSIONS
from parley.data.files import KINDS, kind_of
from parley.errors import RunError, UsageError
from parley.units import file_size

MOST_BYTES = 16 * 2**30  # of all uploads together
LONGEST_NAME = 100
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
    space = MOST_BYTES - sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    part = target.with_name(target.name + ".part")
    try:
        with part.open("xb") as file:
            async for chunk in chunks:
                space -= len(chunk)
                if space < 0:
                    raise UsageError(f"uploads take {file_size(MOST_BYTES)} at most; remove some from {folder}")
                file.write(chunk)
        part.rename(target)
    except FileExistsError:
        raise RunError(f"{name}: is being uploaded already, or was cut off; remove {part}") from None
    except OSError as error:
        raise RunError(f"{name}: cannot be stored ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    return target
