"""Uploads an export to the hub: an allow-list of files, private by default, shown before anything is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from parley.errors import RunError, UsageError, one_line
from parley.exporting.card import CARD_FILE, UNVERIFIED, card_text, published
from parley.exporting.export import EXPORTS, export
from parley.exporting.record import RECORD_FILE, ExportRecord, read_record
from parley.library_compat.huggingface_hub import HTTPError
from parley.training.run_folder import RunFolder

UPLOADED = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    "adapters.safetensors", "*.gguf", "config.json", "generation_config.json", "adapter_config.json", "Modelfile",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""Files that are sent, beside card and record. Everything else stays, whatever it is."""
SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""Access tokens of the hub, of OpenAI and others, GitHub and AWS, and private keys."""
WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Upload:
    """What is sent: bytes, or the file at a path, by name in the repository.

    Attributes:
        repo: owner/name, or a name of one's own.
        left_out: files of the folder that are not sent.
        record: as it is published.
        notes: what the user should know before sending.
    """

    repo: str
    files: dict[str, bytes | Path]
    left_out: list[str]
    record: ExportRecord
    public: bool
    notes: list[str]

    def size(self, name: str) -> int:
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def prepare_upload(
    source: str | Path, repo: str, *, public: bool = False, unverified: bool = False, trust_remote_code: bool = False
) -> Upload:
    """What `push` would send. Of a run its verified adapter is exported first, or the merged model without one.

    Raises UsageError for a name that the hub does not take and for an export that is not verified (unless
    `unverified`), RunError for a folder that is neither run nor export, or that holds an access token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r}: no name of a repository ({one_line(error)}); wanted owner/name") from None
    folder = exported_folder(source, trust_remote_code=trust_remote_code)
    record = read_record(folder)
    if record.status != "verified" and not unverified:
        raise UsageError(
            f"{folder}: {UNVERIFIED} ({record.status}); export it again with verification, or add --unverified to send "
            "it all the same"
        )
    shared = published(record)
    files: dict[str, bytes | Path] = {
        CARD_FILE: card_text(shared).encode(),
        RECORD_FILE: shared.model_dump_json(indent=1).encode(),
    }
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.name in files:
            continue
        # A link may point out of the folder.
        if path.is_file() and not path.is_symlink() and any(fnmatch(path.name, pattern) for pattern in UPLOADED):
            files[path.name] = path
        else:
            left_out.append(path.name)
    _refuse_secrets(files)
    return Upload(repo, files, left_out, shared, public, _notes(shared))


def exported_folder(source: str | Path, *, trust_remote_code: bool = False) -> Path:
    """`source` where it is an export, or the export of the run in it, which is written where there is none yet."""
    path = Path(source).expanduser()
    if (path / RECORD_FILE).is_file():
        return path
    if not RunFolder.is_run(path):
        raise RunError(f"{path}: neither a run nor an export; give the folder of `parley train` or `parley export`")
    run = RunFolder.open(path, trust_remote_code=trust_remote_code)
    target = "merged" if run.model.is_dir() else "adapter"
    folder = run.path / EXPORTS / target
    if not (folder / RECORD_FILE).is_file():
        return export(run.path, target, trust_remote_code=trust_remote_code)[0].folder
    if folder.stat().st_mtime < run.weights.stat().st_mtime:
        raise RunError(f"{folder}: older than the run's weights; remove it, so that it is exported again")
    return folder


def _refuse_secrets(files: dict[str, bytes | Path]) -> None:
    for name, content in files.items():
        if not name.endswith(WEIGHTS):
            found = SECRETS.search(content if isinstance(content, bytes) else content.read_bytes())
            if found is not None:
                raise RunError(f"{name}: holds what looks like an access token or a key; take it out before sending")


def _notes(record: ExportRecord) -> list[str]:
    notes = []
    if record.base is not None and "/" not in record.base and record.target in ("adapter", "vllm", "mlx", "gguf-lora"):
        notes.append(f"the base is {record.base}, which is not on the hub: others cannot load the adapter without it")
    return notes


def push(upload: Upload, *, token: str | None = None, api: HfApi | None = None) -> str:
    """Send `upload` in one commit; returns the address of the repository, which is made where it does not exist.

    `api`: another server's; `token` for the one that `hf auth login` keeps.

    Raises UsageError where the repository is public and `upload` is not, RunError where the hub refuses or cannot be
    reached; then nothing was committed.
    """
    api = api or HfApi(token=token, library_name="parley")
    try:
        _check_visibility(api, upload)
        where = api.create_repo(upload.repo, private=not upload.public, exist_ok=True)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in upload.files.items()
        ]
        message = f"{upload.record.name} of {upload.record.run}, exported by Parley"
        api.create_commit(where.repo_id, operations, commit_message=message)
    except LocalTokenNotFoundError:
        raise RunError("not logged in to the hub; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise RunError(f"{upload.repo}: {_refusal(error)}") from None
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RunError(f"{upload.repo}: the hub cannot be reached ({one_line(error)}); nothing was sent") from None
    return str(where)


def _check_visibility(api: HfApi, upload: Upload) -> None:
    try:
        private = api.model_info(upload.repo).private
    except RepositoryNotFoundError:
        return
    if not private and not upload.public:
        raise UsageError(f"{upload.repo}: exists and is public; add --public, or choose another name")


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        return "the hub does not accept the token; run `hf auth login`, or set HF_TOKEN to one that may write"
    if status == HTTPStatus.FORBIDDEN:
        return "the token may not write there; choose a repository of your own, or a token that may write"
    return f"the hub answers {status} ({one_line(error.server_message or error)})"
