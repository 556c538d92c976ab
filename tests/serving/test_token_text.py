from __future__ import annotations

from typing import Any

import pytest

from parley.serving.token_text import TokenTexts

SAID = "Ahoy, naïve café – 42 °C ☕ 👩‍👩‍👧!\n\n  漢字."


@pytest.mark.parametrize("kind", ["tiny", "demo"])
def test_the_bytes_of_a_texts_tokens_are_the_texts(tiny_tokenizer: Any, kind: str) -> None:
    from transformers import AutoTokenizer

    from parley.models.demo import demo_model_path

    tokenizer = tiny_tokenizer if kind == "tiny" else AutoTokenizer.from_pretrained(demo_model_path())
    texts = TokenTexts(tokenizer)
    ids = tokenizer(SAID, add_special_tokens=False)["input_ids"]
    assert b"".join(texts.bytes_of(token) for token in ids).decode() == SAID
    assert any("\ufffd" in texts.text_of(token) for token in ids)  # some are parts of characters
    assert texts.text_of(tokenizer.eos_token_id) == tokenizer.eos_token
    assert texts.bytes_of(10**6) == b""


def test_byte_tokens_and_leading_spaces_of_other_vocabularies() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "h", "o", "▁a", "ho"]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("h", "o")], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    texts = TokenTexts(tokenizer)
    ids = tokenizer("aho a☕", add_special_tokens=False)["input_ids"]
    assert [texts.bytes_of(token) for token in ids] == [b" a", b"ho", b" a", b"\xe2", b"\x98", b"\x95"]
