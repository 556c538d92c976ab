"""The two READMEs say the same: the same commands, code and formats, whatever the language around them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def code(name: str) -> list[str]:
    """The lines of indented and fenced code, without their comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    fenced = [line for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    indented = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in [*indented, *fenced]]


def test_both_readmes_have_the_same_code() -> None:
    assert code("README.md") == code("README.zh.md")


def test_both_readmes_name_the_same_columns_and_settings() -> None:
    tables = [re.findall(r"^\| (?!format|格式|---).*`.*$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
              for name in ("README.md", "README.zh.md")]  # fmt: skip
    columns = [[re.findall(r"`([^`]+)`", row) for row in rows if "parley" not in row] for rows in tables]
    assert columns[0][:7] == columns[1][:7]
    assert len(columns[0]) >= 7
