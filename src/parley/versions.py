"""Versions of Parley and of the libraries below it, as installed. Parley's own is written in pyproject.toml alone."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "parley-llm"
LIBRARIES = (DISTRIBUTION, "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


@cache  # reading the metadata takes 10 ms a package, and every checkpoint asks
def installed_version(distribution: str) -> str:
    """The version in the package's metadata; "not installed" for a source tree or a library that is missing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def library_versions() -> dict[str, str]:
    return {name: installed_version(name) for name in LIBRARIES}


__version__ = installed_version(DISTRIBUTION)
