from __future__ import annotations

import tomllib
from pathlib import Path

import parley
from parley.versions import installed_version, library_versions


def test_the_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert parley.__version__ == library_versions()["parley-llm"] == project["version"]
    source = Path(parley.__file__).parent
    assert not [path for path in source.rglob("*.py") if project["version"] in path.read_text(encoding="utf-8")]


def test_a_library_that_is_not_installed_is_named_as_such() -> None:
    assert installed_version("no-such-distribution") == "not installed"
