"""Compressed files, read as streams: gzip, bzip2 and xz by Python, zstd by pyarrow."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged compressed file raises, besides an OSError without errno."""


def open_file(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed as its suffix says."""
    match path.suffix.lower():
        case ".gz":
            # Iterating a GzipFile calls Python code for each line; BufferedReader splits lines in C.
            return io.BufferedReader(gzip.open(path, "rb"))
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return _open_zstd(path)
    return path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    # The standard library reads zstd from Python 3.14 on; pyarrow is installed with datasets.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
