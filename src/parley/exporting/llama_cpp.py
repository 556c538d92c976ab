"""llama.cpp as a reader of GGUF files: its tokenizer, its Jinja engine, its logits and its greedy answers.

Templates and answers come from the server inside the wheel xllamacpp, as its users' do; logits from llama.cpp itself.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xllamacpp
from torch import Tensor

from parley.errors import ModelError, one_line
from parley.exporting.samples import Prompt, ScoredRow
from parley.library_compat.xllamacpp import LlamaModel

LONGEST = 4096
"""Tokens of a context: rows are scored up to here."""
TIMEOUT_S = 600


class LlamaCppReader:
    """A GGUF file in llama.cpp, with a LoRA GGUF on it where one is given.

    Raises ModelError where llama.cpp refuses a file.
    """

    def __init__(self, path: Path, length: int, threads: int, lora: Path | None = None) -> None:
        self.path, self.lora, self.length, self.threads = path, lora, min(length, LONGEST), threads
        try:
            self._model = LlamaModel(path, self.length, threads, lora)
        except OSError as error:
            raise ModelError(f"{one_line(error)}; the export is of no use to it") from None

    @property
    def program(self) -> str:
        return f"llama.cpp (xllamacpp {xllamacpp.__version__})"

    @cached_property
    def _server(self) -> Any:
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx, params.n_parallel = self.length, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.use_jinja, params.warmup, params.verbosity = True, False, 0
        if self.lora is not None:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(self.lora), 1.0
            params.lora_adapters = [adapter]
        return xllamacpp.Server(params)

    def _rendered(self, prompt: Prompt) -> str:
        """The prompt as the server's template engine writes it, without the beginning of text that it adds itself."""
        request = urllib.request.Request(
            f"{self._server.listening_address}/apply-template",
            json.dumps(prompt.as_json).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return str(json.load(response)["prompt"])
        except OSError as error:
            raise ModelError(f"{self.path.name}: llama.cpp cannot run the chat template ({one_line(error)})") from None

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self._model.tokenize(self._rendered(prompt), add_special=True, parse_special=True)

    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Tensor]:
        for row in rows:
            kept = [position for position in row.positions if position < self.length]
            yield torch.from_numpy(self._model.logits(row.input_ids[: self.length], kept))

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return [self._answer(prompt, max_new_tokens) for prompt in prompts]

    def _answer(self, prompt: Prompt, max_new_tokens: int) -> str:
        request = {"prompt": self._rendered(prompt), "temperature": 0, "max_tokens": max_new_tokens}
        response = self._server.handle_completions(request)
        if "choices" not in response:  # an error of the server counts as another answer, and is shown as one
            return f"(llama.cpp: {one_line(json.dumps(response))})"
        return str(response["choices"][0]["text"])

    def ends_answers(self, token: int) -> bool:
        return self._model.ends_answers(token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._model.close()
        vars(self).pop("_server", None)
