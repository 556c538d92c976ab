"""The settings that the next run starts from: Data and Model choose into them, Train edits the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parley.studio.settings_edit import set_setting, setting
from parley.training.report import replace_file


class Draft:
    """A YAML text in the file `path`. A page that starts a run sends its own text, so that tabs do not mix."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def write(self, text: str) -> None:
        """Raises RunError where the disk refuses."""
        replace_file(self.path, text, "parley studio")

    def set(self, changes: dict[str, Any]) -> None:
        """Set each dotted key; None removes it. Raises UsageError for a text that is not YAML any more."""
        text = self.text
        for key, value in changes.items():
            text = set_setting(text, key, value)
        self.write(text)

    def value(self, key: str) -> Any:
        return setting(self.text, key)
