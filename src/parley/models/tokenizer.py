"""Load a model's tokenizer, choose its pad token and set the chat template that the run requests."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from parley.config import ModelSection
from parley.errors import ModelError, one_line
from parley.models.json_files import read_json_object
from parley.models.resolve import adapter_chain, model_folder

logger = logging.getLogger(__name__)

MAX_TEMPLATE_BYTES = 2**20  # the longest published template has 30 KB

VOCABULARY_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
]
GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""transformers' own tag around what the assistant says."""
_SYNTAX = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
# Tokens that published models reserve for padding or never generate, best first.
PAD_CANDIDATES = [
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|reserved_special_token_0|>",
    "<|endoftext|>",
]


def read_tokenizer(folder: Path, section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Raises ModelError when it is missing or cannot be read."""
    if not has_tokenizer(folder):
        raise ModelError(
            f"{section.name}: {folder} has no tokenizer (looked for {', '.join(VOCABULARY_FILES)}); "
            "copy the tokenizer files of the model beside its weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # tokenizers raises bare Exceptions; trust_remote_code runs code that may raise any
        raise ModelError(
            f"{section.name}: the tokenizer in {folder} cannot be read ({one_line(error)}); download its files again"
        ) from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{section.name}: model_max_length in tokenizer_config.json is "
            f"{one_line(repr(tokenizer.model_max_length), 60)}, wanted a number"
        )
    _choose_pad_token(tokenizer, section.name)
    if section.chat_template is not None:
        tokenizer.chat_template = _read_template(section.chat_template)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int, name: str) -> None:
    """Raises ModelError where `tokenizer` has ids past the last of the model's embeddings."""
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= embeddings:
        raise ModelError(
            f"{name}: the tokenizer's {one_line(token, 40)!r} has the id {last:,} and the model {embeddings:,} "
            "embeddings; use the tokenizer that was made with the model, or resize the model's embeddings and save it"
        )


def fit_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int, section: ModelSection) -> Any:
    """`tokenizer` without special tokens that the model has no embedding for: their text is text like any other.

    Published models have such tokens where nothing writes them: <image_soft_token> of Gemma 3's text models, a pad
    token that was added to Llama 2. Raises ModelError for ids past the embedding of tokens that may occur.
    """
    outside = {id: token for id, token in tokenizer.added_tokens_decoder.items() if id >= embeddings and token.special}
    names = {token.content for token in outside.values()}
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    written = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    if names and not names & used and not any(name in written for name in names):
        logger.info("%s has no embedding for %s: left out of the tokenizer", section.name, ", ".join(sorted(names)))
        tokenizer = _without(tokenizer, names, section)
    check_vocabulary(tokenizer, embeddings, section.name)
    return tokenizer


def _without(tokenizer: PreTrainedTokenizerBase, names: set[str], section: ModelSection) -> PreTrainedTokenizerBase:
    """`tokenizer` read again from files that do not name these tokens: it has no method to remove one."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in (Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"):
            file.write_text(json.dumps(_pruned(json.loads(file.read_text(encoding="utf-8")), names)), encoding="utf-8")
        pruned = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=section.trust_remote_code
        )
    pruned.name_or_path = tokenizer.name_or_path
    _choose_pad_token(pruned, section.name)
    return pruned


def _pruned(value: Any, names: set[str]) -> Any:
    """`value` without entries that are one of `names`, or an added token of that name."""
    if isinstance(value, dict):
        return {key: _pruned(item, names) for key, item in value.items() if not _is_named(item, names)}
    if isinstance(value, list):
        return [_pruned(item, names) for item in value if not _is_named(item, names)]
    return value


def _is_named(value: Any, names: set[str]) -> bool:
    name = value.get("content") if isinstance(value, dict) else value
    return isinstance(name, str) and name in names


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError when `tokenizer` has no chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: no chat template, as in base models; set "
            "model.chat_template to a Jinja file, or start from the model's chat (Instruct) version"
        )


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Set a pad token that is in the vocabulary. Padding is masked everywhere, so any id with an embedding will do."""
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    known = [token for token in PAD_CANDIDATES if token in vocabulary]
    pad = known[0] if known else tokenizer.unk_token or tokenizer.eos_token
    if pad is None:
        raise ModelError(f"{name}: the tokenizer has no pad, unknown or end token; name one in tokenizer_config.json")
    tokenizer.pad_token = pad
    logger.info("%s has no pad token; %s is used for padding", name, pad)


def _read_template(path: Path) -> str:
    path = path.expanduser()
    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_TEMPLATE_BYTES):
        raise ModelError(f"model.chat_template: {path} is no Jinja file of at most {MAX_TEMPLATE_BYTES // 1024} KiB")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"model.chat_template: {path} cannot be read ({one_line(error)}); give the path of a Jinja file"
        ) from None
    try:
        # Parsed and not run: where it is run, its time and memory are bounded (parley.data.template).
        _SYNTAX.parse(GENERATION_TAG.sub("", template))
    except TemplateSyntaxError as error:
        raise ModelError(
            f"model.chat_template: {path} line {error.lineno}: {one_line(error)}; correct the template"
        ) from None
    except RecursionError:
        raise ModelError(f"model.chat_template: {path} is nested too deeply; correct the template") from None
    return template


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of `section.name`, without loading weights: an adapter's own, or its base's. Raises ModelError."""
    adapters, base = adapter_chain(section)
    used = adapters[:-1] if section.adapter == "new" else adapters
    base_folder = model_folder(base, weights=False)
    sources = [(model_folder(adapter, weights=False), adapter) for adapter in reversed(used)]
    folder, source = next((pair for pair in sources if has_tokenizer(pair[0])), (base_folder, base))
    tokenizer = read_tokenizer(folder, source)
    embeddings = _vocabulary_size(base_folder)
    return tokenizer if embeddings is None else fit_vocabulary(tokenizer, embeddings, source)


def _vocabulary_size(folder: Path) -> int | None:
    """The rows of a model's embedding by its config.json, where it says so; load_model checks the weights."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    fields = read_json_object(path)
    text = fields.get("text_config")
    size = (text if isinstance(text, dict) else fields).get("vocab_size")
    return size if isinstance(size, int) else None
