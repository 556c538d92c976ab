"""`parley push` against a local stand-in of the hub's HTTP API."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

import parley
from parley.errors import RunError, UsageError
from parley.exporting.push import exported_folder, prepare_upload, push


@dataclass
class Hub:
    """What the server was asked to make and to store; `repos` says which are private."""

    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    accepts: bool = True
    address: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if method == "GET":
            name = path.removeprefix("/api/models/")
            return (200, {"id": name, "private": self.repos[name]}) if name in self.repos else (404, {})
        if not self.accepts:
            return 401, {"error": "Invalid token"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            # huggingface_hub 1.x sends `private`, 2.x `visibility`.
            self.repos.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        assert "/commit/" in path
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.commits += 1
        return 200, {"commitUrl": f"{self.address}/owner/pirate/commit/1", "commitOid": "1" * 40, "success": True}


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, value = state.answer(self.command, self.path, body)
            payload = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = answer

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.address, token="hf_test")


@pytest.fixture(scope="module")
def verified(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parley.export(run, "adapter", output=tmp_path_factory.mktemp("push") / "adapter")[0].folder


@pytest.fixture
def folder(verified: Path, tmp_path: Path) -> Path:
    """An export with files in it that must stay."""
    copy = tmp_path / "export"
    copy.mkdir()
    for file in verified.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for name in (
        "optimizer.pt",
        "optimizer.safetensors",
        "events.jsonl",
        "rows.jsonl",
        "training_args.bin",
        ".env",
        "key.pem",
    ):
        (copy / name).write_text("secret", encoding="utf-8")
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / "model.safetensors").write_text("secret", encoding="utf-8")
    (copy / "vocab.json").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("secret", encoding="utf-8")
    return copy


def test_an_export_is_sent_in_one_commit_to_a_private_repository(folder: Path, hub: Hub, api: HfApi) -> None:
    upload = prepare_upload(folder, "owner/pirate")
    assert push(upload, api=api) == f"{hub.address}/owner/pirate"
    assert hub.repos == {"owner/pirate": True}
    assert hub.commits == 1
    weights = "adapter_model.safetensors"
    assert hub.files[weights] == (folder / weights).read_bytes()
    assert set(hub.files) == set(upload.files)


def test_only_files_of_the_allow_list_are_sent(folder: Path, hub: Hub, api: HfApi) -> None:
    upload = prepare_upload(folder, "owner/pirate")
    push(upload, api=api)
    assert set(hub.files) == {
        *("README.md", "export.json", "adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert b"secret" not in b"".join(hub.files.values())
    assert set(upload.left_out) == {
        *(
            "optimizer.pt",
            "optimizer.safetensors",
            "events.jsonl",
            "rows.jsonl",
            "training_args.bin",
            ".env",
            "key.pem",
        ),
        *("checkpoints", "vocab.json"),
    }


def test_the_card_that_is_sent_says_what_was_verified(folder: Path, hub: Hub, api: HfApi) -> None:
    push(prepare_upload(folder, "owner/pirate"), api=api)
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert "Verified: read by PEFT" in card.text


def test_public_is_asked_for(folder: Path, hub: Hub, api: HfApi) -> None:
    push(prepare_upload(folder, "owner/pirate", public=True), api=api)
    assert hub.repos == {"owner/pirate": False}


def test_a_public_repository_is_not_written_to_by_chance(folder: Path, hub: Hub, api: HfApi) -> None:
    hub.repos["owner/pirate"] = False
    with pytest.raises(UsageError, match="owner/pirate: exists and is public; add --public"):
        push(prepare_upload(folder, "owner/pirate"), api=api)
    assert not hub.files
    push(prepare_upload(folder, "owner/pirate", public=True), api=api)
    assert hub.files


@pytest.mark.parametrize("status", ["failed", "not verified"])
def test_what_is_not_verified_is_refused_unless_asked_for(folder: Path, status: str) -> None:
    record = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**record, "status": status}))
    with pytest.raises(UsageError, match=rf"UNVERIFIED \({status}\); .* or add --unverified"):
        prepare_upload(folder, "owner/pirate")
    upload = prepare_upload(folder, "owner/pirate", unverified=True)
    card = upload.files["README.md"]
    assert isinstance(card, bytes)
    assert b"**UNVERIFIED**" in card


def test_words_of_held_out_rows_stay(folder: Path) -> None:
    record = json.loads((folder / "export.json").read_text())
    record["figures"]["differences"] = [
        {"conversation": 0, "question": "secret", "trained": "secret", "export": "secret"}
    ]
    (folder / "export.json").write_text(json.dumps(record))
    upload = prepare_upload(folder, "owner/pirate")
    assert not any(b"secret" in content for content in upload.files.values() if isinstance(content, bytes))


@pytest.mark.parametrize("key", ["hf_" + "a" * 34, "sk-" + "b" * 40, "-----BEGIN OPENSSH PRIVATE KEY"])
def test_a_key_in_a_text_file_is_found(folder: Path, key: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"token": key}))
    with pytest.raises(RunError, match=r"tokenizer_config\.json: holds what looks like an access token or a key"):
        prepare_upload(folder, "owner/pirate")


def test_a_token_that_may_not_write_is_one_line(folder: Path, hub: Hub, api: HfApi) -> None:
    hub.accepts = False
    with pytest.raises(RunError, match="owner/pirate: the hub does not accept the token; run `hf auth login`"):
        push(prepare_upload(folder, "owner/pirate"), api=api)
    assert not hub.files


def test_a_hub_out_of_reach_is_one_line(folder: Path) -> None:
    with pytest.raises(RunError, match=r"the hub cannot be reached .*; nothing was sent"):
        push(prepare_upload(folder, "owner/pirate"), api=HfApi(endpoint="http://127.0.0.1:9", token="x"))


@pytest.mark.parametrize("name", ["a/b/c", "owner/with space", ""])
def test_a_name_that_the_hub_does_not_take_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name of a repository"):
        prepare_upload(folder, name)


def test_a_folder_that_is_neither_run_nor_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="neither a run nor an export"):
        prepare_upload(tmp_path, "owner/pirate")


def test_of_a_run_the_adapter_is_exported_and_verified_first(build_run: Any) -> None:
    run = build_run("llama")
    upload = prepare_upload(run, "owner/pirate")
    assert upload.record.status == "verified"
    assert upload.files["adapter_model.safetensors"] == run / "exports" / "adapter" / "adapter_model.safetensors"
    assert "not on the hub" in upload.notes[0]
    # The second time it is there already; weights that are newer than it are not what it holds.
    assert exported_folder(run) == run / "exports" / "adapter"
    (run / "adapter" / "new").touch()
    with pytest.raises(RunError, match="older than the run's weights; remove it"):
        exported_folder(run)
