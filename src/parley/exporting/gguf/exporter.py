"""The merged model as one GGUF file, for llama.cpp, Ollama, LM Studio and others."""

from __future__ import annotations

import os
import shlex
from math import prod
from pathlib import Path

from gguf import size_label

from parley.exporting.comparison import Marks
from parley.exporting.gguf.architectures import architecture_of, check_tensors, context_length, rope_parameters
from parley.exporting.gguf.convert import fallbacks, model_tensors, write_gguf, written_names
from parley.exporting.gguf.pretokenizers import INEXACT
from parley.exporting.gguf.quantization import SCHEMES, byte_shape
from parley.exporting.gguf.vocabulary import Vocabulary, model_name, read_vocabulary
from parley.exporting.llama_cpp import LlamaCppReader
from parley.exporting.reader import Reader
from parley.exporting.reference import Reference
from parley.exporting.trained_model import TrainedModel
from parley.inference.prompts import end_of_answer_ids, template_end_of_turn

_16_BIT = Marks(flips=0.005, mean_kl=0.005, worst_kl=0.2, loss=0.01, answers=0.9)
MARKS = {
    "f32": _16_BIT.model_copy(update={"mean_kl": 0.001}),  # llama.cpp keeps keys and values in 16 bits
    "f16": _16_BIT,
    "bf16": _16_BIT,
    "q8_0": Marks(flips=0.01, mean_kl=0.01, worst_kl=0.5, loss=0.02),
    "q6_k": Marks(flips=0.02, mean_kl=0.02, worst_kl=1.0, loss=0.03),
    "q5_k_m": Marks(flips=0.04, mean_kl=0.05, worst_kl=2.0, loss=0.06),
    "q5_0": Marks(flips=0.05, mean_kl=0.08, worst_kl=3.0, loss=0.1),
    "q4_k_m": Marks(flips=0.06, mean_kl=0.12, worst_kl=4.0, loss=0.15),
    "q4_0": Marks(flips=0.1, mean_kl=0.25, worst_kl=6.0, loss=0.25),
}


def threads() -> int:
    return os.cpu_count() or 1


class GgufExporter:
    target = "gguf"
    description = "The merged model as one GGUF file, quantised or not, for llama.cpp and what is built on it."
    quants = tuple(SCHEMES)
    default_quant = "q8_0"

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        config, name = trained.config, trained.base_name
        architecture = architecture_of(config, name)
        self._vocabulary(trained)
        check_tensors(architecture, written_names(architecture, trained.weights), config.num_hidden_layers, name)

    def size(self, trained: TrainedModel, quant: str | None) -> int:
        assert quant is not None
        config = trained.config
        architecture = architecture_of(config, trained.base_name)
        tensors = model_tensors(architecture, config, trained.weights, SCHEMES[quant])
        return sum(prod(byte_shape(tensor.shape, tensor.quant)) for tensor in tensors)

    def write(self, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        assert quant is not None
        config = trained.config
        architecture = architecture_of(config, trained.base_name)
        if (length := context_length(config, architecture)) < config.max_position_embeddings:
            trained.notes.append(
                f"GGUF: llama.cpp has no sliding window for {config.model_type}; the context is {length:,} tokens, for "
                "which it makes no difference"
            )
        vocabulary = self._vocabulary(trained)
        if vocabulary.pre in INEXACT:
            trained.notes.append(
                f"GGUF: llama.cpp's pre-tokenizer {vocabulary.pre} splits text with combining marks otherwise than "
                "tokenizer.json"
            )
        if rope_parameters(config)["rope_type"] == "longrope":
            trained.notes.append(
                f"GGUF: with a context over {config.original_max_position_embeddings:,} tokens llama.cpp takes "
                "longrope's long factors for short texts too"
            )
        for (wanted, got), count in fallbacks(architecture, config, trained.weights, SCHEMES[quant]).items():
            trained.notes.append(
                f"GGUF: {count} matrices are {got} instead of {wanted}, as their rows are no multiple of its block of "
                "values; llama.cpp's own quantizer does the same"
            )
        write_gguf(
            folder / f"{trained.name}-{quant}.gguf",
            architecture,
            config,
            trained.weights,
            vocabulary,
            SCHEMES[quant],
            general_metadata(trained),
            threads(),
        )

    def open(self, trained: TrainedModel, folder: Path, reference: Reference) -> Reader:
        return LlamaCppReader(next(folder.glob("*.gguf")), longest(trained, reference), threads())

    def marks(self, trained: TrainedModel, quant: str | None) -> Marks:
        assert quant is not None
        return MARKS[quant]

    def command(self, trained: TrainedModel, place: Path) -> str | None:
        return shlex.join(["llama-server", "--jinja", "--model", str(next(place.glob("*.gguf")))])

    def _vocabulary(self, trained: TrainedModel) -> Vocabulary:
        return read_vocabulary(trained.tokenizer, trained.config.vocab_size, end_ids(trained), trained.base_name)


def general_metadata(trained: TrainedModel) -> dict[str, str | int]:
    """What programs show of a file: names, size and base, by their keys under general.*."""
    shapes = trained.weights.shapes()
    written = written_names(architecture_of(trained.config, trained.base_name), trained.weights)
    found: dict[str, str | int] = {
        "type": "model",
        "name": model_name(trained.name, trained.tokenizer),
        "basename": trained.base_name.rsplit("/")[-1],
        "finetune": trained.name,
        "size_label": size_label(sum(prod(shapes[name]) for name in written), 0, 0, 0),
    }
    if trained.adapters:
        owner, _, base = trained.base_name.rpartition("/")
        found |= {"base_model.count": 1, "base_model.0.name": base}
        if owner:
            found |= {
                "base_model.0.organization": owner,
                "base_model.0.repo_url": f"https://huggingface.co/{trained.base_name}",
            }
    return found


def end_ids(trained: TrainedModel) -> list[int]:
    """The tokens that end answers, the chat template's first."""
    ends = end_of_answer_ids(trained.generation_config.eos_token_id, trained.tokenizer)
    own = template_end_of_turn(trained.tokenizer)
    return sorted(ends, key=lambda token: token != own)


def longest(trained: TrainedModel, reference: Reference) -> int:
    """Tokens of the context that the samples need."""
    samples = reference.samples
    prompts = max((len(ids) for ids in reference.prompt_ids), default=0) + samples.answer_tokens
    rows = max((len(row.input_ids) for row in samples.rows), default=0)
    return min(max(prompts, rows) + 8, trained.config.max_position_embeddings)
