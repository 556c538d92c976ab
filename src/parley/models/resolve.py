"""Resolve a model's name to a local folder: folders as they are, hub ids downloaded.

All later steps read local files only, so network errors occur, and are explained, in this module alone.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from parley.config import DEMO_MODEL, ModelSection
from parley.config_keys import nearest
from parley.errors import ModelError, one_line
from parley.models.demo import demo_model_path
from parley.models.json_files import read_json_object

CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
ADAPTER_CONFIG = "adapter_config.json"
RUN_FILE = "run.yaml"
RUNS = "runs"  # where runs are written by default
MOST_ADAPTERS = 8  # on one base; each but the last is merged
IGNORED_FILES = ["*/*", "consolidated*"]  # subfolders and duplicates of the weights


def model_folder(section: ModelSection, *, weights: bool = True) -> Path:
    """The folder that holds the model or adapter called `section.name`.

    The network is not used for a folder, nor for a name that can only be a path. Of a hub id the configuration and
    tokenizer files are downloaded, and the weights too where `weights` is true. Raises ModelError.
    """
    if section.name == DEMO_MODEL:
        return demo_model_path()
    folder = local_folder(section.name)
    if folder is not None:
        return run_weights(folder) or folder
    if not weights:
        return _download(section, CONFIG_FILES)
    folder = _download(section, [*CONFIG_FILES, "*.safetensors"])
    return folder if any(folder.glob("*.safetensors")) else _download(section, [*CONFIG_FILES, "*.bin"])


def run_weights(folder: Path) -> Path | None:
    """Where the weights of a run's folder are: the whole model, or its adapter; None for a folder that is no run.

    Raises ModelError for a run that has saved none.
    """
    if not (folder / RUN_FILE).is_file() or (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
        return None
    for place, file in ((folder / "model", "config.json"), (folder / "adapter", ADAPTER_CONFIG)):
        if (place / file).is_file():
            return place
    raise ModelError(f"{folder}: this run has no trained weights yet; finish it first: parley train --resume {folder}")


def local_folder(name: str) -> Path | None:
    """`name` as a folder, or None when it is a hub id. Raises ModelError for a path that does not exist.

    `runs/x` is a path, and so is owner/name where a folder `owner` is here: a mistyped path must not fetch the model
    that a stranger has put on the hub under that name.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
        is_file = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~ of an unknown user, a null character
        raise ModelError(f"{one_line(name, 80)}: neither a path nor a hub id ({one_line(error, 80)})") from None
    if is_file:
        raise ModelError(f"{name}: got a file, wanted a model folder with config.json, or a hub id")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelError(f"{name}: no such folder; give a model folder, or a hub id such as owner/model") from None
    first, slash, _ = name.partition("/")
    if slash and (first == RUNS or Path(first).is_dir()):
        raise ModelError(_no_such_folder(name, Path(first)))
    return None


def _no_such_folder(name: str, parent: Path) -> str:
    """The message for a path of two parts, naming the folder beside it that is spelled most like it."""
    if not parent.is_dir():
        return f"{name}: no such folder here; {parent}/ is where runs are written, and no folder of that name is here"
    others = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    similar = nearest(name.partition("/")[2], others) if others else None
    meant = f"; did you mean {parent / similar}?" if similar else "; for a model of the hub go to another folder"
    return f"{name}: no such folder in {parent}/, which is here{meant}"


def adapter_base(folder: Path, section: ModelSection) -> ModelSection | None:
    """For an adapter's folder, `section` with the name of its base model; None for a model's folder.

    A base that begins with a dot is relative to the adapter's folder. Raises ModelError where adapter_config.json
    cannot be read or names no base.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    saved = read_json_object(path)
    base, revision = saved.get("base_model_name_or_path"), saved.get("revision")
    if not base:
        raise ModelError(f"{path}: names no base_model_name_or_path; write the model it was trained on there")
    for key, value in (("base_model_name_or_path", base), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{path}: {key} is {one_line(repr(value), 60)}, wanted a text")
    if "\0" in base:
        raise ModelError(f"{path}: base_model_name_or_path {one_line(base, 60)!r} is neither a path nor a hub id")
    if base.startswith("."):
        base = str((folder / base).resolve())
    return section.model_copy(update={"name": base, "revision": revision})


def adapter_chain(section: ModelSection) -> tuple[list[ModelSection], ModelSection]:
    """The adapters that `section.name` means, the one nearest to the base first, and their base.

    An adapter may be trained on a base that is an adapter itself. Raises ModelError for a chain that does not end.
    """
    adapters: list[ModelSection] = []
    folders: list[Path] = []
    while True:
        folder = model_folder(section, weights=False)
        base = adapter_base(folder, section)
        if base is None:
            return adapters, section
        if folder in folders or len(folders) == MOST_ADAPTERS:
            reason = "is its own base" if folder in folders else f"is based on more than {MOST_ADAPTERS} other adapters"
            raise ModelError(f"{folder}: the adapter {reason}; correct base_model_name_or_path in {ADAPTER_CONFIG}")
        folders.append(folder)
        adapters.insert(0, section)
        section = base


def _download(section: ModelSection, patterns: list[str]) -> Path:
    name, revision = section.name, section.revision
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED_FILES)
    except GatedRepoError:
        raise ModelError(
            f"{name}: this model is gated; accept its terms at "
            f"https://huggingface.co/{name}, then `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{name}: the hub has no revision {revision!r}; correct model.revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: no such folder here and no such model on the hub; correct model.name, or, if it is private, "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}: not downloaded yet, and the hub cannot be reached ({one_line(error.__cause__ or error)}); "
            "connect this machine (and unset HF_HUB_OFFLINE), or set model.name to a folder"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"{name}: the hub answered {one_line(error)}; try again later") from None
    except OSError as error:  # connections, certificates, disks
        raise ModelError(f"{name}: cannot be downloaded ({one_line(error)}); correct that, or give a folder") from None
    return Path(folder)
