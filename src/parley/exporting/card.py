"""README.md of an export, a model card of the hub: what it is, how it was trained, and whether it was proven.

Metadata as https://huggingface.co/docs/hub/model-cards documents it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from parley.exporting.comparison import Figures
from parley.exporting.record import ExportRecord
from parley.exporting.run_facts import RunFacts
from parley.exporting.table import figure_rows

CARD_FILE = "README.md"
UNVERIFIED = "UNVERIFIED"
"""The text in the card of an export that failed the comparison, and of one that was not compared."""
RELATIONS = {"merged": "finetune", "gguf": "quantized", "ollama": "quantized"}
"""How the export is related to its base, in the hub's terms; of those not here it is an adapter."""
LIBRARIES = {"merged": "transformers", "gguf": "gguf", "gguf-lora": "gguf", "ollama": "gguf", "mlx": "mlx"}
"""library_name on the hub; of those not here it is PEFT's."""
LOADING = {
    "adapter": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "<this repository>")',
    "merged": 'AutoModelForCausalLM.from_pretrained("<this repository>")',
    "gguf-lora": "llama-server --jinja --model <a GGUF of {base}> --lora {file}",
}
"""How a program takes the files, where no command line was kept."""


def write_card(folder: Path, record: ExportRecord) -> None:
    """Write README.md into an export's folder."""
    (folder / CARD_FILE).write_text(card_text(record), encoding="utf-8")


def card_text(record: ExportRecord) -> str:
    """The whole card of an export."""
    sections = [
        f"---\n{card_data(record).to_yaml()}\n---",
        f"# {record.run}",
        _status(record),
        _introduction(record),
        *_use(record),
    ]
    if record.training is not None:
        sections += ["## Training", *_training(record.training)]
    if record.figures is not None:
        sections.append(
            "## Compared with the trained model\n" + _table(("figure", "value"), figure_rows(record.figures))
        )
    sections.append("## Limits\n" + _limits(record))
    return "\n\n".join(sections) + "\n"


def card_data(record: ExportRecord) -> ModelCardData:
    """The card's metadata. Names that are no hub ids are left out of it: the hub refuses them."""
    facts = record.training
    base = record.base if record.base is not None and is_repo_id(record.base) else None
    adapter = record.target not in RELATIONS
    method = "sft" if facts is None else facts.training_method
    tags = ["parley", method, *(["lora"] if adapter else []), *(["ollama"] if record.target == "ollama" else [])]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else RELATIONS.get(record.target, "adapter"),
        library_name=LIBRARIES.get(record.target, "peft"),
        pipeline_tag="text-generation",
        tags=tags,
        datasets=None if facts is None else facts.dataset,
    )


def is_repo_id(name: str) -> bool:
    """Whether `name` is a repository on the hub, with its owner."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _status(record: ExportRecord) -> str:
    if record.status == "verified":
        assert record.figures is not None
        return f"Verified: read by {record.figures.program} and compared with the trained model."
    if record.figures is not None:
        return f"**{UNVERIFIED}**: it differs from the trained model: {record.figures.failure}."
    return f"**{UNVERIFIED}**: it was not compared with the trained model."


def _introduction(record: ExportRecord) -> str:
    base = "its own weights" if record.base is None else f"`{record.base}`"
    data = "" if record.training is None else f", fine-tuned on `{record.training.data}`"
    return f"{base[0].upper()}{base[1:]}{data} with Parley, exported as {record.name}."


def _use(record: ExportRecord) -> list[str]:
    file = next((name for name in record.files if name.endswith(".gguf")), f"{record.run}.gguf")
    command = record.command or LOADING.get(record.target, "").format(base=record.base, file=file)
    return [f"## Use\n    {command}"] if command else []


def _training(facts: RunFacts) -> list[str]:
    data = [("data", facts.data)]
    if facts.rows is not None:
        data += [
            ("conversations", f"{facts.rows:,}, and {facts.heldout:,} held out"),
            ("supervised tokens", f"{facts.supervised_tokens:,}"),
        ]
    sections = [_table(("setting", "value"), [*data, *facts.settings.items()])]
    scores = _scores(facts)
    if scores:
        sections.append(_table(("held-out conversations", "before", "after"), scores))
    return sections


def _scores(facts: RunFacts) -> list[tuple[str, str, str]]:
    names = {
        "heldout_loss": "loss, nats a token",
        "accuracy": "right answers",
        "style_rate": "in the style of the data",
    }
    rows = []
    for field, name in names.items():
        values = [None if scores is None else getattr(scores, field) for scores in (facts.before, facts.after)]
        if any(value is not None for value in values):
            form = "{:.4f}" if field == "heldout_loss" else "{:.0%}"
            before, after = ("" if value is None else form.format(value) for value in values)
            rows.append((name, before, after))
    return rows


def _limits(record: ExportRecord) -> str:
    lines = [f"- {note}" for note in record.notes]
    if record.base is not None:
        lines.append("- All limits of the base model hold, and its licence.")
    if record.training is not None and record.training.after is not None:
        lines.append(
            "- The figures are of conversations held out of the same data; they say nothing about other subjects."
        )
    else:
        lines.append("- No figures were measured on held-out conversations.")
    lines.append("- What the data says was not checked for truth, and the model repeats it.")
    if record.status != "verified":
        lines.append(f"- {UNVERIFIED}: its answers may differ from those of the trained model.")
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def published(record: ExportRecord) -> ExportRecord:
    """`record` without words of the data and paths of this machine, for export.json and card on the hub."""
    shared = record.model_copy(deep=True)
    shared.notes = [_without_folders(note) for note in record.notes]
    if shared.figures is not None:
        _drop_words(shared.figures)
    return shared


def _drop_words(figures: Figures) -> None:
    figures.differences = []
    if figures.failure is not None:  # it quotes the question that it found first
        figures.failure = _without_folders(re.sub(r" \((['\"]).*\1\)", "", figures.failure))


def _without_folders(text: str) -> str:
    return re.sub(r"(?<![\w.])~?/(?:[^\s/:;,]+/)+", "", text)
