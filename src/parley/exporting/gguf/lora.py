"""The adapter alone as a GGUF file, which llama.cpp adds to a GGUF of the base.

llama.cpp computes alpha / R B A for each matrix, with one alpha in the file and each matrix's own rank. Where PEFT's
scale is another one (rsLoRA, alpha patterns), the ratio is in B.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys
from torch import Tensor

from parley.errors import ModelError
from parley.exporting.comparison import Marks
from parley.exporting.gguf.architectures import SUFFIXES, Architecture, architecture_of, check_tensors, converted
from parley.exporting.gguf.convert import whole_writes, write_gguf, written_names
from parley.exporting.gguf.exporter import MARKS, end_ids, general_metadata, longest, threads
from parley.exporting.gguf.quantization import SCHEMES
from parley.exporting.gguf.vocabulary import read_vocabulary
from parley.exporting.llama_cpp import LlamaCppReader
from parley.exporting.merge import EMBEDDING, HEAD, MergedWeights
from parley.exporting.reader import Reader
from parley.exporting.reference import Reference
from parley.exporting.trained_model import TrainedModel
from parley.models.adapter_files import read_adapter_fields

TEMPLATE_FILE = "chat_template.jinja"


class LoraGgufExporter:
    target = "gguf-lora"
    description = "The adapter alone as a LoRA GGUF file, for a GGUF of its base."
    quants: tuple[str, ...] = ()
    default_quant = None

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        architecture = architecture_of(trained.config, trained.base_name)
        if len(trained.adapters) != 1:
            raise ModelError(f"{trained.name}: is not one adapter on its base; use --to gguf")
        weights = _merged(trained)
        names = written_names(architecture, weights)
        check_tensors(architecture, names, trained.config.num_hidden_layers, trained.base_name)
        for name in weights.shapes():
            weights.factors(name)
        if weights.base.tied and weights.changes(HEAD):  # the base's GGUF has no head to add to
            raise ModelError(
                f"{trained.name}: the adapted head of a base whose head is its embedding is not written as LoRA GGUF; "
                "use --to gguf"
            )
        if weights.changes(EMBEDDING):
            raise ModelError(f"{trained.name}: an adapted embedding is not written as LoRA GGUF; use --to gguf")

    def size(self, trained: TrainedModel, quant: str | None) -> int:
        weights = _merged(trained)
        factors = (weights.factors(name) for name in weights.shapes())
        return sum(4 * (each[0].numel() + each[1].numel()) for each in factors if each is not None)

    def write(self, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        architecture = architecture_of(trained.config, trained.base_name)
        path = folder / f"{trained.name}-lora.gguf"
        writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture.arch])
        try:
            alpha = float(read_adapter_fields(trained.adapters[0]).lora_alpha)
            writer.add_type(GGUFType.ADAPTER)
            writer.add_string(Keys.Adapter.TYPE, "lora")
            writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_name(trained.name)
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, trained.base_name)
            for name, a_RK, b_NR in _matrices(trained, architecture, alpha):
                writer.add_tensor(f"{name}.lora_a", a_RK.numpy().astype(np.float32))
                writer.add_tensor(f"{name}.lora_b", b_NR.contiguous().numpy().astype(np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            with whole_writes(path):
                writer.write_tensors_to_file()
        finally:
            writer.close()
        if trained.tokenizer.chat_template:
            (folder / TEMPLATE_FILE).write_text(trained.tokenizer.chat_template, encoding="utf-8")
            trained.notes.append(
                f"LoRA GGUF: it holds no chat template; give llama.cpp {TEMPLATE_FILE} with --chat-template-file"
            )

    def open(self, trained: TrainedModel, folder: Path, reference: Reference) -> Reader:
        return LoraGgufReader(trained, next(folder.glob("*.gguf")), longest(trained, reference), folder)

    def marks(self, trained: TrainedModel, quant: str | None) -> Marks:
        return MARKS["f16"]

    def command(self, trained: TrainedModel, place: Path) -> str | None:
        return None


def _merged(trained: TrainedModel) -> MergedWeights:
    assert isinstance(trained.weights, MergedWeights)
    return trained.weights


def _matrices(trained: TrainedModel, architecture: Architecture, alpha: float) -> list[tuple[str, Tensor, Tensor]]:
    """Name in GGUF, A (R, K) and B (N, R) of every adapted matrix, as llama.cpp's scale wants them."""
    weights, table = _merged(trained), architecture.names(trained.config)
    found = []
    for name in weights.shapes():
        factors = weights.factors(name)
        if factors is None:
            continue
        a_RK, b_NR, scale = factors
        written = table.get_name(name, try_suffixes=SUFFIXES)
        assert written is not None, "check_tensors comes before"
        # Rows of B are rows of the weight: what permutes the one permutes the other.
        b_NR = converted(architecture, trained.config, name, b_NR) * (scale / (alpha / a_RK.shape[0]))
        found.append((written, a_RK.float(), b_NR.float()))
    return found


class LoraGgufReader(LlamaCppReader):
    """A LoRA GGUF on a GGUF of its base in float16, which is written for the comparison and removed again."""

    def __init__(self, trained: TrainedModel, lora: Path, length: int, scratch: Path) -> None:
        with ExitStack() as cleanup:
            folder = Path(tempfile.mkdtemp(prefix=".base-", dir=scratch))
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            config, name = trained.config, trained.base_name
            path = folder / "base.gguf"
            vocabulary = read_vocabulary(trained.tokenizer, config.vocab_size, end_ids(trained), name)
            base = _merged(trained).base
            architecture = architecture_of(config, name)
            write_gguf(
                path, architecture, config, base, vocabulary, SCHEMES["f16"], general_metadata(trained), threads()
            )
            super().__init__(path, length, threads(), lora)
            self._cleanup = cleanup.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._cleanup.close()
