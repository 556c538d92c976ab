"""A GGUF file with a Modelfile for Ollama.

Ollama 0.30 and later run GGUF files in llama.cpp's server, with the file's own Jinja template. But `ollama create`
compares that template with some that it knows, and where fewer than 100 edits are between them it takes its own Go
version instead (Ollama's server/model.go and template/template.go). The Modelfile cannot forbid it: a comment in the
template does.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from parley.errors import ModelError
from parley.exporting.gguf.architectures import architecture_of, context_length
from parley.exporting.gguf.exporter import GgufExporter
from parley.exporting.gguf.vocabulary import Vocabulary
from parley.exporting.trained_model import TrainedModel
from parley.inference.prompts import end_of_answer_ids

LEAST_OLLAMA = "0.30.0"  # the first that runs the GGUF's own template
MODELFILE = "Modelfile"
REPLACED_BELOW = 100  # edits between a template and one that Ollama knows
UNUSED_CHARACTER = "⁂"
"""In none of Ollama's templates, so that each one in a template is an edit."""
GUARD = f"{{# {UNUSED_CHARACTER * (REPLACED_BELOW + 20)} So far from Ollama's own templates, this one is kept. #}}"
LEAST_CONTEXT = 4096  # tokens; what Ollama gives every model at least


class OllamaExporter(GgufExporter):
    target = "ollama"
    description = "A GGUF file and a Modelfile with the stop tokens and sampling of the run."

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        if not trained.tokenizer.chat_template:
            raise ModelError(
                f"{trained.name}: it has no chat template, and Ollama would make one up; use --to gguf, with a program "
                "that completes text"
            )
        super().check(trained, quant)
        modelfile(trained, "model.gguf")

    def write(self, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        super().write(trained, folder, quant)
        # A run's name may hold what a Modelfile cannot quote.
        file = next(folder.glob("*.gguf")).rename(folder / f"model-{quant}.gguf")
        (folder / MODELFILE).write_text(modelfile(trained, file.name), encoding="utf-8")

    def command(self, trained: TrainedModel, place: Path) -> str:
        name = ollama_name(trained.name)
        return f"ollama create {name} -f {shlex.quote(str(place / MODELFILE))} && ollama run {name}"

    def _vocabulary(self, trained: TrainedModel) -> Vocabulary:
        vocabulary = super()._vocabulary(trained)
        assert vocabulary.chat_template is not None
        return dataclasses.replace(vocabulary, chat_template=guarded(vocabulary.chat_template))


def guarded(template: str) -> str:
    """`template` with a comment that keeps Ollama from replacing it; it renders the same."""
    # Jinja removes the newline after a comment (trim_blocks), which would be the template's own.
    newline = "\n" if template.startswith("\n") else ""
    return f"{GUARD}{newline}{template}"


def ollama_name(name: str) -> str:
    """`name` as Ollama takes names of models: letters, digits, dots, dashes and underscores, up to 80."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return kept.strip("._-").lower()[:80] or "tuned"


def modelfile(trained: TrainedModel, file: str) -> str:
    """The Modelfile of the GGUF `file` beside it. Raises ModelError for a text that a Modelfile cannot hold.

    Written as https://docs.ollama.com/modelfile documents it.
    """
    settings = trained.settings.generation
    longest = context_length(trained.config, architecture_of(trained.config, trained.base_name))
    context = min(longest, max(LEAST_CONTEXT, trained.settings.model.max_seq_length))
    parameters: list[tuple[str, object]] = [
        ("temperature", settings.temperature),
        ("top_p", settings.top_p),
        ("top_k", settings.top_k),
        ("min_p", settings.min_p),
        ("repeat_penalty", settings.repetition_penalty),
        ("num_predict", settings.max_new_tokens),
        ("num_ctx", context),
    ]
    if settings.repetition_penalty != 1:  # of the whole context, as in transformers, not of the last 64 tokens
        parameters.append(("repeat_last_n", -1))
    if settings.seed is not None:
        parameters.append(("seed", settings.seed))
    ends = end_of_answer_ids(trained.generation_config.eos_token_id, trained.tokenizer)
    stops = [trained.tokenizer.convert_ids_to_tokens(token) for token in ends] + settings.stop
    parameters += [("stop", quoted(stop)) for stop in dict.fromkeys(stops)]
    lines = [f"FROM ./{file}", f"REQUIRES {LEAST_OLLAMA}"]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    if trained.settings.data.system:
        lines.append(f"SYSTEM {quoted(trained.settings.data.system)}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """`text` as a value in a Modelfile. Raises ModelError where its syntax has no way to write it.

    There are no escapes: a value ends at the first end of line behind its quotes, and Ollama drops what is not
    printable (its parser/parser.go).
    """
    if not all(c.isprintable() or c == "\n" for c in text) or '"""' in text or text.endswith('"'):
        raise ModelError(f"Ollama: a Modelfile cannot hold the text {text!r}; change it in the run's run.yaml")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
