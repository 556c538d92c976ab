"""llama.cpp's C functions in the shared library of the wheel xllamacpp.

The wheel's Python interface is a server: it renders chats and completes them, but neither quantises nor returns logits.
The C functions called here are llama.cpp's public interface (ggml.h, llama.h); private is only that the extension
module exports them. The public alternative is a build of llama.cpp with a compiler.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@cache
def library() -> ctypes.CDLL:
    """The shared library, loaded once."""
    spec = find_spec("xllamacpp.xllamacpp")
    assert spec is not None, "the caller checks that xllamacpp is installed"
    assert spec.origin is not None
    return ctypes.CDLL(spec.origin)


@cache
def _quantize_chunk() -> ctypes._NamedFuncPointer:
    function = library().ggml_quantize_chunk
    # (type, const float * src, void * dst, start, rows, values per row, importance matrix) -> bytes written
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    function.restype = ctypes.c_size_t
    return function


def quantize_rows(rows_NK: NDArray[np.float32], quant: int, row_bytes: int) -> NDArray[np.uint8]:
    """`rows_NK` in ggml's type `quant`: (N, row_bytes). K is a multiple of the type's block."""
    assert rows_NK.dtype == np.float32
    assert rows_NK.flags.c_contiguous
    out = np.empty((rows_NK.shape[0], row_bytes), np.uint8)
    written = _quantize_chunk()(quant, rows_NK.ctypes.data, out.ctypes.data, 0, *rows_NK.shape, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out


class _Params(ctypes.Structure):
    """llama_model_params or llama_context_params, larger than either is in any release.

    llama.cpp fills it in and reads it back, by value. A struct of this size is passed in memory, so that the callee
    reads its own fields and never the rest.
    """

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_N_CTX, _N_BATCH, _N_UBATCH = 0, 1, 2  # the first words of llama_context_params
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_get": (None, [_POINTER, _POINTER]),
    "llama_log_set": (None, [_POINTER, _POINTER]),
    "llama_model_default_params": (_Params, []),
    "llama_context_default_params": (_Params, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _Params]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Params]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [_POINTER]),
    "llama_n_batch": (ctypes.c_uint32, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_POINTER, _INT]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_POINTER, _INT]),
    "llama_tokenize": (
        _INT,
        [_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, ctypes.c_bool, ctypes.c_bool],
    ),
    "llama_adapter_lora_init": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "llama_set_adapters_lora": (
        _INT,
        [_POINTER, ctypes.POINTER(_POINTER), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)],
    ),
}


@cache
def _llama() -> Any:
    """llama.cpp's functions with their types, as attributes."""
    loaded = library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


@_LOG_CALLBACK
def _ignore(level: int, text: bytes, data: int) -> None:
    pass


@contextmanager
def _quiet() -> Iterator[None]:
    """Without llama.cpp's log, of which loading a model writes 200 lines to stderr; the logger before is put back."""
    llama, callback, data = _llama(), ctypes.c_void_p(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    llama.llama_log_set(ctypes.cast(_ignore, ctypes.c_void_p), None)
    try:
        yield
    finally:
        llama.llama_log_set(callback, data)


class LlamaModel:
    """A GGUF file opened by llama.cpp, with room for `length` tokens; a LoRA GGUF on it at scale 1 where one is given.

    Raises OSError where llama.cpp refuses the file.
    """

    def __init__(self, path: Path, length: int, threads: int, lora: Path | None = None) -> None:
        llama = _llama()
        self._model = self._context = None
        with _quiet():
            self._model = llama.llama_model_load_from_file(os.fsencode(path), llama.llama_model_default_params())
            if not self._model:
                raise OSError(f"{path}: llama.cpp cannot load it")
            params = llama.llama_context_default_params()
            params.words[_N_CTX] = length
            params.words[_N_BATCH] = params.words[_N_UBATCH] = min(length, 512)
            self._context = llama.llama_init_from_model(self._model, params)
            if not self._context:
                self.close()
                raise OSError(f"{path}: llama.cpp cannot make a context of {length} tokens")
            # The words are where this release has them, or the numbers would have gone elsewhere.
            assert llama.llama_n_ctx(self._context) >= length
            assert llama.llama_n_batch(self._context) == params.words[_N_BATCH]
            llama.llama_set_n_threads(self._context, threads, threads)
            if lora is not None:
                self._attach(lora)
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(self._vocab))

    def _attach(self, lora: Path) -> None:
        adapter = _llama().llama_adapter_lora_init(self._model, os.fsencode(lora))
        if not adapter:
            self.close()
            raise OSError(f"{lora}: llama.cpp cannot load it as an adapter")
        adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert _llama().llama_set_adapters_lora(self._context, adapters, 1, scales) == 0

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; with the beginning of text, and control tokens read as such, where asked for."""
        encoded = text.encode()
        room = len(encoded) + 8  # a token has at least one byte
        out = (ctypes.c_int32 * room)()
        count = _llama().llama_tokenize(self._vocab, encoded, len(encoded), out, room, add_special, parse_special)
        assert count >= 0
        return list(out[:count])

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """(S, V): the logits at `positions` of the text `ids`."""
        llama, wanted = _llama(), set(positions)
        out = np.empty((len(positions), self.vocab_size), np.float32)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        step, row = llama.llama_n_batch(self._context), 0
        batch = llama.llama_batch_init(step, 0, 1)
        try:
            for start in range(0, len(ids), step):
                chunk = ids[start : start + step]
                self._decode(batch, chunk, start, wanted)
                for i in range(len(chunk)):
                    if start + i in wanted:
                        values = llama.llama_get_logits_ith(self._context, i)
                        out[row] = np.ctypeslib.as_array(values, (self.vocab_size,))
                        row += 1
        finally:
            llama.llama_batch_free(batch)
        return out

    def _decode(self, batch: _Batch, ids: Sequence[int], start: int, wanted: set[int]) -> None:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = start + i in wanted
        status = _llama().llama_decode(self._context, batch)
        if status != 0:
            raise OSError(f"llama.cpp cannot decode {len(ids)} tokens (status {status})")

    def ends_answers(self, token: int) -> bool:
        """Whether llama.cpp ends a generation at `token`."""
        return bool(_llama().llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free context and model; further calls do nothing."""
        llama = _llama()
        with _quiet():
            if self._context:
                llama.llama_free(self._context)
            if self._model:
                llama.llama_model_free(self._model)
        self._model = self._context = None
