"""`evaluate_run`: measure a finished run once more, base and tuned, on its own held-out rows or on others."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback

from parley.config import RunConfig, TrainingSection
from parley.data.prepare import Prepared, prepare
from parley.errors import DataError, UsageError
from parley.evaluation.evaluate_model import evaluate_model
from parley.models.base_answers import base_obstacle
from parley.models.device import pick_device
from parley.text import print_text
from parley.training.arguments import sft_config
from parley.training.prepare_training import TrainingSetup
from parley.training.report import Scores, replace_file
from parley.training.run_folder import RunFolder
from parley.training.trainer import SFTTrainer


def evaluate_run(
    run: Path,
    data: str | None = None,
    rows: int | None = None,
    console: Console | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Scores]:
    """Scores of a run's "base" model (with an adapter) and of the trained one, "tuned".

    `data`: another source to measure on, all of it or its first `rows`; by default the run's held-out rows. A base
    that cannot be had unchanged is not measured, which is printed. Written to eval.json in the run's folder.

    Raises UsageError, RunError, ModelError or DataError in one line.
    """
    console = console or Console()
    folder = RunFolder.open(run, trust_remote_code=trust_remote_code)
    if (method := folder.config.training.method) != "sft":
        raise UsageError(
            f"{folder.path}: was trained with training.method: {method}, and parley eval measures supervised rows; its "
            f"held-out {'reward' if method == 'grpo' else 'preference accuracy'} is in report.html and events.jsonl"
        )
    config = _measured_config(folder.config, data)
    model, tokenizer = folder.load()
    prepared = _measured_rows(config, tokenizer, data, rows)
    setup = TrainingSetup(config, pick_device(config.model.device), model, tokenizer, prepared)
    # The trainer wants an output folder; nothing of an evaluation is kept there.
    with tempfile.TemporaryDirectory(prefix="parley-eval-") as scratch:
        args, _ = sft_config(config, Path(scratch), setup.device)
        trainer = SFTTrainer(
            model,
            args,
            # TRL wants a training set; nothing is trained.
            train_dataset=prepared.heldout,
            eval_dataset=prepared.heldout,
            processing_class=tokenizer,
        )
        # It would print the metrics as a dict, between the lines of the table.
        trainer.remove_callback(PrinterCallback)
        # Binding needs the adapters switched on: it is done before they are disabled for the base.
        trainer.bind_fused_step()  # while the adapter is on: binding reads it
        scores = {}
        reason = base_obstacle(model)
        if reason is None:
            with model.disable_adapter():
                scores["base"] = evaluate_model(setup, trainer, [], console).scores
        elif config.lora is not None:
            print_text(console, f"only the tuned model is measured: {reason}")
        scores["tuned"] = evaluate_model(setup, trainer, [], console).scores
    figures = {name: score.model_dump(mode="json") for name, score in scores.items()}
    replace_file(folder.path / "eval.json", json.dumps(figures, indent=1), f"parley eval {folder.path}")
    return scores


def _measured_config(config: RunConfig, data: str | None) -> RunConfig:
    """The run's settings for measuring `data`, or its own held-out rows.

    Of the training section only batch size and precision are kept: a run's loggers, hub and checkpoints are no part of
    an evaluation, and run.yaml may be a stranger's.
    """
    kept = config.training.model_dump(include={"per_device_train_batch_size", "seed", "bf16", "fp16"})
    values = config.model_dump() | {"training": TrainingSection().model_dump() | kept}
    overrides = []
    if data is not None:
        overrides = [f"data.source={json.dumps(data)}", "data.heldout=null", "data.heldout_rows=0"]
        overrides += ["data.streaming=false", "data.limit=null", "data.split=train"]
    elif config.data.streaming:
        values["training"]["max_steps"] = 1  # a stream has no length, which RunConfig requires
    return RunConfig.create(values, overrides)


def _measured_rows(config: RunConfig, tokenizer: Any, data: str | None, rows: int | None) -> Prepared:
    """Prepared data whose `heldout` rows are those to measure on."""
    prepared = prepare(config.data, tokenizer, config.model.max_seq_length)
    if data is not None:
        prepared.heldout = prepared.train
    if prepared.heldout is None:
        raise DataError(f"{config.output}: the run kept no held-out rows; give rows to measure on with --data")
    if rows is not None:
        prepared.heldout = prepared.heldout.select(range(min(rows, len(prepared.heldout))))
    return prepared
