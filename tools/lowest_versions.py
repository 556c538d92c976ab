"""Print the lower end of each range in pyproject.toml as a pip constraint, to test the oldest versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def lowest(requirements: list[str]) -> list[str]:
    """`name==version.*` for each requirement of the form `name>=version,...`."""
    ends = [re.match(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", text) for text in requirements]
    return [f"{end[1]}=={end[2]}.*" for end in ends if end]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(lowest(project["dependencies"])))
