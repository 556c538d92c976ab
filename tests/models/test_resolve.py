import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from parley.config import DEMO_MODEL, ModelSection
from parley.errors import ModelError, one_line
from parley.models import resolve
from parley.models.load import load_model
from parley.models.resolve import adapter_base, local_folder, model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(resolve, "snapshot_download", refuse)


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_llama_folder):
    """A hub on this machine: tiny/llama is there, tiny/gated is gated, anything else is unknown."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(tiny_llama_folder))
    server.asked = []
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


REFUSALS = [  # part of the path, status, the hub's code for it
    ("/tiny/llama/revision/no-such", 404, "RevisionNotFound"),
    ("/tiny/gated", 403, "GatedRepo"),
    ("/tiny/unknown", 404, "RepoNotFound"),
    ("/tiny/broken", 400, ""),
]


def refusal(path):
    for part, status, code in REFUSALS:
        if part in path:
            return status, b"{}", {"X-Error-Code": code}
    return None


def _handler(model):
    def content(path):
        files = list(model.iterdir())
        if path.startswith("/api/models/tiny/llama/tree"):
            entries = [{"path": file.name, "size": file.stat().st_size, "oid": file.name} for file in files]
            second_copies = ["original/params.json", "onnx/model.safetensors", "consolidated.safetensors"]
            entries += [{"path": name, "size": 9, "oid": "x"} for name in second_copies]
            return 200, json.dumps([{"type": "file", **entry} for entry in entries]).encode(), {}
        if path.startswith("/api/models/tiny/llama"):
            siblings = [{"rfilename": file.name} for file in files]
            return 200, json.dumps({"id": "tiny/llama", "sha": COMMIT, "siblings": siblings}).encode(), {}
        name = path.rpartition("/")[2]
        return 200, (model / name).read_bytes(), {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            self.server.asked.append(self.path)
            path = self.path.partition("?")[0]
            self.send(*refusal(path) or content(path), body)

        def send(self, status, content, headers, body):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Hub


def test_local_folder_never_asks_the_hub(tiny_llama_folder, no_network):
    assert model_folder(ModelSection(name=str(tiny_llama_folder))) == tiny_llama_folder.resolve()


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/no-such-folder", "a/b/c", "..", "models/", "a b"])
def test_names_that_can_only_be_paths_never_ask_the_hub(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "..":
        assert local_folder(name) == tmp_path.parent
        return
    with pytest.raises(ModelError, match="no such folder; give a model folder, or a hub id"):
        model_folder(ModelSection(name=name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/x", r"runs/x: no such folder here; runs/ is where runs are written"),
        ("mine/pirates", r"mine/pirates: no such folder in mine/, which is here; did you mean mine/pirate\?"),
        ("mine/zebra", r"mine/zebra: no such folder in mine/, .*for a model of the hub go to another folder"),
        ("empty/zebra", r"no such folder in empty/"),
        ("x" * 5000, "neither a path nor a hub id|no such folder"),
        ("a\0b", "neither a path nor a hub id|no such folder"),
        ("~nobody-here/x", "neither a path nor a hub id|no such folder"),
    ],
)
def test_a_mistyped_path_never_asks_the_hub(name, words, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "pirate").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for ask in (local_folder, lambda name: model_folder(ModelSection.model_construct(name=name))):
        with pytest.raises(ModelError, match=words) as caught:
            ask(name)
        assert "\n" not in str(caught.value)


def test_other_names_of_two_parts_are_hub_ids(no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/name") is None
    assert local_folder("gpt2") is None


def test_a_file_is_not_a_folder(tmp_path, no_network):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match="got a file, wanted a model folder"):
        model_folder(ModelSection(name=str(tmp_path / "model.gguf")))


def test_demo_is_the_packaged_folder(monkeypatch, no_network, tmp_path):
    monkeypatch.setattr(resolve, "demo_model_path", lambda: tmp_path)
    assert model_folder(ModelSection(name=DEMO_MODEL)) == tmp_path


def test_hub_model_is_downloaded_small_files_first_and_names_its_source(hub, tiny_llama_folder):
    section = ModelSection(name="tiny/llama")
    small = model_folder(section, weights=False)
    assert (small / "config.json").read_bytes() == (tiny_llama_folder / "config.json").read_bytes()
    assert not (small / "model.safetensors").exists()
    model, tokenizer = load_model(section)
    assert model.name_or_path == "tiny/llama"
    assert model.config._commit_hash == COMMIT
    assert len(tokenizer) == 384
    assert not any(word in path for path in hub.asked for word in ("consolidated", "original", "onnx"))


def test_hub_refusals_are_one_line_with_what_to_do(hub):
    for name, revision, words in [
        ("tiny/gated", None, r"accept its terms.*hf auth login.*HF_TOKEN"),
        ("tiny/unknown", None, r"no such model on the hub.*HF_TOKEN"),
        ("tiny/llama", "no-such", r"no revision 'no-such'; correct model\.revision"),
        ("tiny/broken", None, r"the hub cannot be reached .*Bad request"),
    ]:
        with pytest.raises(ModelError, match=words) as caught:
            model_folder(ModelSection(name=name, revision=revision))
        assert "\n" not in str(caught.value)


def test_offline_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot be reached.*HF_HUB_OFFLINE"):
        model_folder(ModelSection(name="tiny/llama"))


def test_adapter_base_reads_the_adapter_config(tmp_path):
    section = ModelSection(name=str(tmp_path), quantization="nf4")
    assert adapter_base(tmp_path, section) is None
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": "tiny/llama", "revision": "v1"}))
    base = adapter_base(tmp_path, section)
    assert (base.name, base.revision, base.quantization) == ("tiny/llama", "v1", "nf4")
    path.write_text("{}")
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        adapter_base(tmp_path, section)
    path.write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        adapter_base(tmp_path, section)


def test_one_line_shortens():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 240
