import pytest

from parley.errors import ModelError
from parley.models import demo


def test_packaged_folder_is_found_or_its_absence_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match=r"lacks .*demo-model; reinstall parley-llm"):
        demo.demo_model_path()
    folder = tmp_path / "assets" / "demo-model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert demo.demo_model_path() == folder
