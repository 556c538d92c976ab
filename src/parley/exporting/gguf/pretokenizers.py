"""llama.cpp's name for a byte-level BPE tokenizer's pre-tokenizer.

llama.cpp holds the regular expressions itself, by name, and its converter recognises a tokenizer by the hash of what it
makes of a test string. The hash knows published vocabularies alone; others are recognised by the regular expression in
their tokenizer.json. What was recognised is proven by the token ids of the verification.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from parley.errors import ModelError

# llama.cpp's test string (convert_hf_to_gguf_update.py). Its hashes are those of str() of the list of ids.
TEST_STRING = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ "
    "🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "d353350c764d8c3b39c763113960e4fb4919bea5fbf208a0e3b22e8469dc7406": "llama4",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
}

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS, _REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD, _TAIL = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = CONTRACTIONS + _WORDS + r"\p{N}" + _REST
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
TEKKEN = f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|" + r"\p{N}" + _TAIL
GPT4O = f"{_HEAD}{_UPPER}*{_LOWER}+{CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{CONTRACTIONS}?|" + r"\p{N}{1,3}" + _TAIL
# By the regular expression and whether words of the vocabulary skip the merges, which llama.cpp ties to the name.
PATTERNS = {
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "dbrx",
    (QWEN2, False): "qwen2",
    (QWEN35, False): "qwen35",
    (TEKKEN, True): "tekken",
    (GPT4O, False): "gpt-4o",
}
INEXACT = {"tekken", "pixtral", "gpt-4o", "llama4"}
"""Pre-tokenizers whose regular expressions in llama.cpp leave combining marks out, and split before them."""


def pretokenizer_name(tokenizer: Any, backend: dict[str, Any], name: str) -> str:
    """llama.cpp's name for the pre-tokenizer of `tokenizer`, whose tokenizer.json is `backend`.

    Raises ModelError for one that llama.cpp does not know, `name` in its message.
    """
    digest = sha256(str(tokenizer.encode(TEST_STRING)).encode()).hexdigest()
    # The pattern first, as it also says whether merges are skipped: without its beginning of text, Llama 3's tokenizer
    # has the hash of another one of the same regular expression, which llama.cpp does not skip them for.
    known = _by_pattern(backend) or HASHES.get(digest)
    if known is None:
        raise ModelError(
            f"{name}: its pre-tokenizer is not one that llama.cpp knows (hash {digest[:12]}); use --to merged, and a "
            "program that reads tokenizer.json"
        )
    return known


def _by_pattern(backend: dict[str, Any]) -> str | None:
    steps = _steps(backend.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        return None
    if steps[-1].get("use_regex", True):  # GPT-2's regular expression is ByteLevel's own
        digits = kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
        return "gpt-2" if kinds == ["ByteLevel"] else "smollm" if digits else None
    if kinds != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated" or steps[0]["invert"]:
        return None
    pattern = steps[0]["pattern"].get("Regex")
    return PATTERNS.get((pattern, bool(backend["model"].get("ignore_merges"))))


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]
