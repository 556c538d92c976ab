"""What the data page is told of rows, tokens, checks and columns; and where uploads go."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from parley.config import RunConfig
from parley.errors import DataError, UsageError
from parley.safe_yaml import load_yaml
from parley.studio import data_view, uploads
from parley.studio.state import Studio

ROWS = [
    {"instruction": "Greet me", "context": "", "response": "Ahoy!"},
    {"instruction": "Greet me", "context": "", "response": "Ahoy!"},
    {"instruction": "Name a colour", "context": "", "response": "Blau, 🌊 wie das Meer"},
    "no row",
]


def settings(source: Path | str, **data: object) -> str:
    return yaml.safe_dump({"model": "parley-demo", "data": {"source": str(source), **data}})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_first_rows_show_columns_and_format(file: Path) -> None:
    look = data_view.look(settings(file))
    assert look.format == "Dolly (columns instruction, context, response)"
    assert [(column.name, column.sample) for column in look.columns] == [
        ("instruction", "Greet me"), ("context", ""), ("response", "Ahoy!"),
    ]  # fmt: skip


def test_unknown_columns_are_mapped_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"frage": "Wer?", "antwort": "Ich."}\n')
    assert "frage" in data_view.look(settings(path)).problem
    mapped = settings(path, columns={"prompt": "frage", "completion": "antwort"})
    assert data_view.look(mapped).format.startswith("prompt and completion")
    page = data_view.rows(mapped, 0, 20, "", "")
    assert [(turn.role, turn.text) for turn in page.rows[0].sides[0]] == [("user", "Wer?"), ("assistant", "Ich.")]


def test_rows_are_paged_searched_and_filtered(file: Path) -> None:
    whole = data_view.rows(settings(file), 0, 2, "", "")
    assert ([row.number for row in whole.rows], whole.following) == ([1, 2], True)
    rest = data_view.rows(settings(file), 2, 2, "", "")
    assert ([row.number for row in rest.rows], rest.following) == ([3, 4], False)
    assert rest.rows[1].problem
    assert [row.number for row in data_view.rows(settings(file), 0, 9, "BLAU", "").rows] == [3]
    assert [row.number for row in data_view.rows(settings(file), 0, 9, "", "duplicate").rows] == [2]
    assert data_view.rows(settings(file), 0, 9, "nowhere", "").rows == []


def test_tokens_have_their_text_and_their_mask(file: Path) -> None:
    view = data_view.tokens(settings(file), 3)
    tokens = view.sides[""]
    assert "".join(text for text, kind in tokens if kind == "supervised").startswith("Blau, 🌊 wie das Meer")
    assert tokens[0] == ("<|begin_of_text|>", "control")
    assert view.counts[""] == (len(tokens), sum(kind == "supervised" for _, kind in tokens))
    assert not view.cut


def test_long_texts_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"instruction": "x" * 1_000_000, "context": "", "response": "y"}) + "\n")
    turn = data_view.rows(settings(path), 0, 1, "", "").rows[0].sides[0][0]
    assert (len(turn.text), turn.more) == (data_view.LONGEST_TEXT, 1_000_000 - data_view.LONGEST_TEXT)
    view = data_view.tokens(settings(path), 1)
    assert view.cut
    assert len(view.sides[""]) == data_view.MOST_TOKENS


def test_checks_have_lengths_in_tokens(file: Path) -> None:
    diagnosis = data_view.check(settings(file))
    assert {"bad-row", "duplicate", "one-word-answer"} <= {finding.check for finding in diagnosis.findings}
    assert diagnosis.tokens is not None
    assert sum(count for _, count in diagnosis.tokens.histogram) == diagnosis.tokens.count == 3
    assert max(length for length, _ in diagnosis.tokens.histogram) == diagnosis.tokens.largest
    assert "histogram" not in diagnosis.model_dump_json()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("../../.ssh/rows.jsonl", "rows.jsonl"),
        ("..\\..\\rows.csv", "rows.csv"),
        (".hidden.jsonl", "hidden.jsonl"),
        ("a b\x00<c>.jsonl.gz", "a-b-c-.jsonl.gz"),
        ("数据.json", "数据.json"),
        ("x" * 500 + ".jsonl", "x" * 100 + ".jsonl"),
    ],
)
def test_an_upload_stays_in_its_folder(tmp_path: Path, name: str, kept: str) -> None:
    assert uploads.upload_path(tmp_path, name) == tmp_path / kept
    (tmp_path / kept).touch()
    assert uploads.upload_path(tmp_path, name) not in (tmp_path / kept, tmp_path)


@pytest.mark.parametrize("name", ["run.yaml", "rows", "", "..", "a/b/", "model.safetensors", "x.html", "rows.jsonl/.."])
def test_what_is_no_data_file_is_not_stored(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a data file"):
        uploads.upload_path(tmp_path, name)


def upload(client: TestClient, name: str, content: bytes | AsyncIterator[bytes]) -> object:
    return client.post("/data/uploads", params={"name": name}, content=content)


def test_an_upload_becomes_the_data_of_the_next_run(studio: Studio, client: TestClient) -> None:
    studio.draft.set({"data.columns": {"response": "antwort"}, "data.drop": ["duplicate"], "training.max_steps": 7})
    content = b"x" * 3_000_000  # larger than a form may be
    assert client.post("/data/uploads", params={"name": "rows.txt"}, content=content).json() == {"name": "rows.txt"}
    assert (studio.uploads / "rows.txt").read_bytes() == content
    assert studio.draft.value("data.source") == str(studio.uploads / "rows.txt")
    assert studio.draft.value("data.columns") is None, "the mapping of another data set stayed"
    assert studio.draft.value("training.max_steps") == 7


def test_two_tabs_may_send_a_file_of_one_name(tmp_path: Path) -> None:
    (tmp_path / f"killed{uploads.PART}").touch()
    os.utime(tmp_path / f"killed{uploads.PART}", (1, 1))

    async def chunks(text: bytes) -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0.001)
            yield text

    async def both() -> list[Path]:
        return await asyncio.gather(*(uploads.save_upload(tmp_path, "rows.txt", chunks(text)) for text in (b"a", b"b")))

    paths = asyncio.run(both())
    assert [path.read_bytes() for path in paths] == [b"aaa", b"bbb"]
    assert sorted(tmp_path.iterdir()) == sorted(paths), "what a killed studio left is still there"


def test_a_full_disk_is_one_line_and_leaves_nothing(
    studio: Studio, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object) -> object:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    refused = client.post("/data/uploads", params={"name": "rows.jsonl"}, content=b"x")
    assert refused.json() == {"error": "rows.jsonl: cannot be stored (No space left on device)"}
    assert list(studio.uploads.iterdir()) == []


def test_a_refused_upload_leaves_nothing(studio: Studio, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 1000)
    refused = client.post("/data/uploads", params={"name": "rows.jsonl"}, content=b"x" * 2000)
    assert refused.status_code == 400
    assert "at most" in refused.json()["error"]
    assert list(studio.uploads.iterdir()) == []


@pytest.mark.parametrize("source", ["/etc/passwd", "../../etc/hosts.json", "~root/x.jsonl", "./x.jsonl", "/"])
def test_a_source_outside_of_the_allowed_folders_is_refused(studio: Studio, client: TestClient, source: str) -> None:
    response = client.post("/data/source", data={"source": source}, headers={"HX-Request": "true"})
    assert response.status_code == 400
    assert studio.draft.text == ""
    response = client.post("/data/source", data={"source": f"../../../{source}", "upload": "1"})
    assert response.status_code == 400


@pytest.mark.parametrize("key", ["data.source", "data.heldout", "model.name"])
def test_settings_edited_by_hand_open_nothing_else(studio: Studio, client: TestClient, key: str) -> None:
    studio.draft.set({key: "/etc"})
    for path in ("/data/look", "/data/checks", "/data/rows", "/data/tokens/1"):
        response = client.get(path)
        assert response.status_code == 400
        assert "--allow" in response.text
    with pytest.raises(UsageError, match="--allow"):
        studio.start_run(studio.draft.text)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("training: {method: grpo, rewards: ['os:getcwd']}", "training.rewards"),
        ("model: {name: parley-demo, trust_remote_code: true}", "model.trust_remote_code"),
    ],
)
def test_the_studio_starts_no_code_of_others(studio: Studio, settings: str, named: str) -> None:
    with pytest.raises(UsageError, match=f"{named}: .*parley train"):
        studio.start_run(f"data: parley-demo-pirate\n{settings}\n")
    assert not studio.queue.jobs()


def test_rewards_that_come_with_parley_may_be_named(studio: Studio) -> None:
    settings = "{data: parley-demo-pirate, training: {method: grpo, rewards: ['parley.rewards:ends_with']}}"
    studio.check_settings(RunConfig.create(load_yaml(settings, "the settings")))


def test_cures_are_set_and_taken_back(studio: Studio, client: TestClient) -> None:
    cures = [("data.drop", "[duplicate]"), ("data.drop", "[mojibake]"), ("data.overlong", "split")]
    for key, value in cures:
        assert client.post("/data/cure", data={"key": key, "value": value}).status_code == 204
    assert studio.draft.value("data.drop") == ["duplicate", "mojibake"]
    assert studio.draft.value("data.overlong") == "split"
    client.post("/data/cure", data={"key": "data.drop", "value": "[duplicate]", "undo": "1"})
    assert studio.draft.value("data.drop") == ["mojibake"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "/etc"),
        ("data.drop", "[everything]"),
        ("data.drop", "7"),
        ("model.max_seq_length", "x"),
        ("", ""),
    ],
)
def test_a_wrong_cure_changes_nothing(studio: Studio, client: TestClient, key: str, value: str) -> None:
    assert client.post("/data/cure", data={"key": key, "value": value}).status_code == 400
    assert studio.draft.text == ""


def test_a_mapping_of_columns_goes_into_the_settings(studio: Studio, client: TestClient) -> None:
    form = {"format": "dolly", "column.response": "antwort", "column.context": ""}
    assert client.post("/data/columns", data=form).status_code == 204
    assert studio.draft.value("data.columns") == {"response": "antwort"}
    assert studio.draft.value("data.format") == "dolly"
    assert client.post("/data/columns", data={"format": "nonsense"}).status_code == 400


def test_a_mapping_of_pairs_is_one_of_columns(studio: Studio, client: TestClient, tmp_path: Path) -> None:
    path = studio.root / "pairs.jsonl"
    path.write_text('{"q": "Hi?", "good": "Hello!", "bad": "No."}\n')
    studio.draft.set({"data.source": str(path)})
    form = {"format": "pairs", "column.prompt": "q", "column.chosen": "good", "column.rejected": "bad"}
    assert client.post("/data/columns", data=form).status_code == 204
    assert studio.draft.value("data.format") is None
    assert len(data_view.rows(studio.draft.text, 0, 5, "", "").rows[0].sides) == 2


def test_errors_of_a_part_are_shown_in_its_place_and_those_of_an_action_beside(client: TestClient) -> None:
    htmx = {"HX-Request": "true"}
    part = client.get("/data/rows", params={"found_by": "nonsense"}, headers=htmx)
    action = client.post("/data/columns", data={"format": "nonsense"}, headers=htmx)
    assert [each.status_code for each in (part, action)] == [400, 400]
    assert "hx-retarget" not in part.headers
    assert action.headers["hx-retarget"] == "#messages"


def test_a_source_without_rows_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError):
        data_view.check(settings(tmp_path / "empty.jsonl"))
