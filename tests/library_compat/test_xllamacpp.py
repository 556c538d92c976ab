"""llama.cpp's C functions in the wheel xllamacpp: there, with the arguments and layouts that Parley gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from parley.library_compat import xllamacpp
from parley.library_compat.xllamacpp import LlamaModel, library, quantize_rows


def test_every_function_is_exported() -> None:
    for name in [*xllamacpp._SIGNATURES, "ggml_quantize_chunk"]:
        assert getattr(library(), name)


def test_the_first_words_of_the_context_s_parameters_are_its_sizes() -> None:
    params = xllamacpp._llama().llama_context_default_params()
    assert params.words[xllamacpp._N_CTX] == 512  # llama.h: the defaults of n_ctx, n_batch and n_ubatch
    assert params.words[xllamacpp._N_BATCH] == 2048
    assert params.words[xllamacpp._N_UBATCH] == 512


def test_a_block_is_quantised_as_its_format_says() -> None:
    rows = np.arange(-32, 32, dtype=np.float32).reshape(2, 32)
    packed = quantize_rows(rows, GGMLQuantizationType.Q8_0, 34)  # a half-precision scale and 32 signed bytes
    assert packed.shape == (2, 34)
    np.testing.assert_allclose(dequantize(packed, GGMLQuantizationType.Q8_0), rows, atol=0.13)


def test_a_file_that_is_no_gguf_is_an_oserror(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF nothing")
    with pytest.raises(OSError, match=r"llama\.cpp cannot load it"):
        LlamaModel(path, length=64, threads=1)
    assert capfd.readouterr().err == ""  # its log is silent, and no line reaches a user's terminal
