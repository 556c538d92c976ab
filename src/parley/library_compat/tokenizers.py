"""tokenizers' behaviour that Parley has to know: what it raises where a file cannot be written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase, ProcessorMixin

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, folder: Path) -> None:
    """`tokenizer.save_pretrained(folder)`, which raises OSError where a file cannot be written.

    Undocumented: `Tokenizer.save`, in Rust, raises a bare Exception whose text ends with "(os error 28)". There is no
    public alternative.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # what is bare has no narrower class; all others are raised on
        code = _OS_ERROR.search(str(error))
        if type(error) is not Exception or code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder / "tokenizer.json")) from error
