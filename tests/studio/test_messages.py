"""Messages of the commands in Chinese: made by the commands themselves, so that a changed one is noticed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from parley.config import RunConfig, setting_errors
from parley.data.doctor import checks
from parley.data.doctor.checks import DROPPABLE, Check
from parley.errors import ParleyError
from parley.studio import data_view
from parley.studio.i18n import translator
from parley.studio.messages import FORMATS, translated
from parley.studio.prediction import predict
from parley.studio.state import Studio

ROWS = [
    {"prompt": "Two and two", "completion": "four"},
    {"prompt": "Two and two", "completion": "four"},
    {"prompt": "Hello", "completion": ""},
    {"prompt": "<|im_start|>", "completion": "no"},
    {"prompt": "long", "completion": "words " * 90},
]
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def in_chinese(text: str) -> str:
    return translated(translator("zh"), text)


def is_chinese(text: str) -> bool:
    return _CHINESE.search(in_chinese(text)) is not None


def test_what_no_format_fits_and_english_stay_as_they_are() -> None:
    for text in ("A row's own words and more", "3 of what is left", "", "one\ntwo", "100%"):
        assert in_chinese(text) == text
    assert all(translated(translator("en"), text) == text for text in FORMATS)


@pytest.mark.parametrize("check", [*DROPPABLE.values(), *(c for c in vars(checks).values() if isinstance(c, Check))])
def test_every_finding_and_cure_is_translated(check: Check) -> None:
    assert all(is_chinese(text) for text in (check.what, check.cure) if text)


def test_the_doctor_speaks_chinese(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"data": {"source": str(path)}, "model": {"max_seq_length": 32}}
    for overlong in ("drop", "split", "truncate"):
        settings["data"]["overlong"] = overlong
        found = data_view.check(json.dumps(settings))
        names = {"duplicate", "empty-answer", "control-token", "overlong"}
        assert names <= {finding.check for finding in found.findings}
        for finding in found.findings:
            assert all(is_chinese(text) for text in (finding.what, finding.cure)), finding
    unchanged = [name for name, value in found.facts() if not is_chinese(name)]
    values = dict(found.facts())
    assert unchanged == []
    assert in_chinese(values["format"]) == "提示和续写（列 prompt, completion）"
    assert in_chinese(values["turns a row"]).startswith("2 到 2，平均 2；5% 不超过 2")
    assert is_chinese(values["supervised"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training": {"seed": -1}}, "得到 -1；应不小于 0"),
        ({"training": {"weight_decay": "oops"}}, "得到 'oops'；应为数字"),
        ({"lora": {"r": "x"}}, "得到 'x'；应为整数"),
        ({"model": {"dtype": "x"}}, "得到 'x'；应为 'auto', 'bfloat16', 'float16' or 'float32'"),
        ({"model": {"nme": "x"}}, "运行设置 里没有 'model.nme' 这个键；是不是 'name'？"),
    ],
)
def test_errors_of_settings_are_translated_with_their_values(values: dict[str, object], said: str) -> None:
    ((_, message),) = setting_errors(values)
    assert in_chinese(message) == said


def test_errors_of_data_models_and_places_are_translated(studio: Studio, tmp_path: Path) -> None:
    (studio.root / "empty.jsonl").touch()
    (studio.root / "columns.jsonl").write_text('{"ask": "x", "reply": "y"}\n')

    def check(settings: dict[str, object]) -> None:
        studio.check_settings(RunConfig.create(settings))
        data_view.check(json.dumps(settings))

    def refused(**settings: object) -> str:
        with pytest.raises(ParleyError) as error:
            check(settings)
        return str(error.value)

    assert is_chinese(refused(data={"source": str(studio.root / "empty.jsonl")}))
    assert is_chinese(refused(data={"source": str(studio.root / "columns.jsonl")}))
    assert is_chinese(refused(data={"source": "/etc/passwd"}))
    assert is_chinese(refused(data={"source": "parley-demo-pirate"}, model={"name": "./nowhere"}))
    assert is_chinese(refused(model={"trust_remote_code": True}))


def test_a_chinese_page_says_them_in_chinese(client: TestClient) -> None:
    client.headers["Accept-Language"] = "zh-CN"
    assert "没有这个名称的运行" in client.get("/runs/nope").text
    assert "得到 0；应不小于 1" in client.post("/train/check", data={"settings": "lora: {r: 0}\n"}).text
    note = predict("training: {method: dpo}\ndata: parley-demo-preferences\n").note
    assert note is not None
    assert "没有预估" in in_chinese(note)
