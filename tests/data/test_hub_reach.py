from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parley.data import hub_reach
from parley.errors import DataError
from parley.library_compat.huggingface_hub import HTTPError


class Unreachable:
    def dataset_info(self, *_: Any, **__: Any) -> None:
        raise HTTPError("no route to host")


@pytest.mark.parametrize(
    ("source", "folder"), [("own/set", "own___set"), ("Own/MATH-500", "Own___math-500"), ("DemoSet", "demo_set")]
)
def test_a_data_set_that_was_downloaded_needs_no_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, folder: str
) -> None:
    monkeypatch.setattr(hub_reach, "HfApi", Unreachable)
    monkeypatch.setattr(hub_reach.datasets_config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match="the hub cannot be reached"):
        hub_reach.check_hub_reached(source)
    (tmp_path / folder).mkdir()
    hub_reach.check_hub_reached(source)
