"""What a model card says of a run: its data, its settings and its figures before and after training.

Nothing here names a path of the machine or quotes a row: cards are published.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from parley.config import DEMO_DATA, RunConfig
from parley.data.summary import DataSummary
from parley.training.report import Report, Scores
from parley.training.run_folder import RunFolder


class RunFacts(BaseModel):
    """Attributes:
    data: name of the data set: its hub id, or the name of its file.
    dataset: the same where it is a hub id.
    rows, heldout, supervised_tokens: counts of the data; None where the run kept no report.
    training_method: as run.yaml calls it.
    settings: by name, as text.
    """

    data: str
    dataset: str | None = None
    rows: int | None = None
    heldout: int | None = None
    supervised_tokens: int | None = None
    training_method: str = "sft"
    settings: dict[str, str] = Field(default_factory=dict)
    before: Scores | None = None
    after: Scores | None = None


def run_facts(run: RunFolder) -> RunFacts:
    """The facts of a finished run. What its report.json lacks is left out."""
    config = run.config
    facts = RunFacts(
        data=_data_name(config.data.source),
        dataset=_dataset(config),
        training_method=config.training.method,
        settings=_settings(config),
    )
    if run.events.is_file():  # else the weights were trained elsewhere, and run.yaml does not say how
        facts.settings |= _training_settings(config)
    try:
        report = Report.model_validate_json((run.path / "report.json").read_bytes())
        summary = DataSummary.model_validate(report.data_summary)
    except (OSError, ValidationError):
        return facts
    facts.before, facts.after = report.before, report.after
    if summary.kept:
        facts.rows, facts.heldout = summary.kept, summary.heldout
        facts.supervised_tokens = summary.supervised_tokens
    if report.steps:
        facts.settings["steps"] = f"{report.steps[-1].step:,}"
    return facts


def _data_name(source: str) -> str:
    """A hub id as it is; of a path, the last part alone."""
    return source if _is_hub_id(source) else Path(source).name


def _dataset(config: RunConfig) -> str | None:
    return config.data.source if _is_hub_id(config.data.source) else None


def _is_hub_id(source: str) -> bool:
    path = Path(source)
    relative = not source.startswith(("/", ".", "~"))
    return relative and source.count("/") == 1 and source != DEMO_DATA and not path.suffix and not path.exists()


def _settings(config: RunConfig) -> dict[str, str]:
    found: dict[str, object] = {}
    if config.lora is None:
        found["method"] = "full fine-tuning"
    else:
        lora = config.lora
        # use_dora is PEFT's own field, which the section passes on.
        kinds = (("rsLoRA", lora.use_rslora), ("DoRA", lora.model_dump().get("use_dora")))
        kind = ", ".join(name for name, used in kinds if used)
        targets = lora.target_modules
        found["method"] = f"LoRA{f' ({kind})' if kind else ''}, rank {lora.r}, alpha {lora.lora_alpha:g}"
        found["adapted layers"] = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    return {name: str(value) for name, value in found.items()}


def _training_settings(config: RunConfig) -> dict[str, str]:
    training = config.training
    found: dict[str, object] = {"base weights while training": config.model.quantization}
    if training.method != "sft":
        found["learned from"] = f"preferences ({training.method.upper()})"
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    found["batch"] = f"{batch} x {accumulation} conversations a step"
    found["learning rate"] = f"{training.learning_rate:g}, {training.lr_scheduler_type}"
    found["longest conversation"] = f"{config.model.max_seq_length:,} tokens"
    turns = {"all": "every assistant turn", "last": "the last assistant turn", "inputs": "prompts and assistant turns"}
    if isinstance(config.data.train_on, str) and config.data.train_on in turns:
        found["loss on"] = turns[config.data.train_on]
    found["seed"] = training.seed
    return {name: str(value) for name, value in found.items()}
