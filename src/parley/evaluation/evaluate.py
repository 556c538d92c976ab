"""`evaluate`: measure a finished run once more, base and tuned, on its own held-out rows or on others."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback

from parley.config import RunConfig
from parley.data.prepare import Prepared, prepare
from parley.errors import DataError
from parley.evaluation.evaluation import evaluate_model
from parley.models.adapters import base_obstacle
from parley.models.device import pick_device
from parley.text import print_text
from parley.training.arguments import sft_config
from parley.training.report import Scores
from parley.training.run_folder import RunFolder
from parley.training.setup import TrainingSetup
from parley.training.trainer import SFTTrainer


def evaluate(
    run: Path, data: str | None = None, rows: int | None = None, console: Console | None = None
) -> dict[str, Scores]:
    """Scores of a run's "base" model (with an adapter) and of what it became, "tuned".

    `data`: another source to measure on, all of it or its first `rows`; by default the run's held-out rows.
    Written to eval.json in the run's folder. Raises RunError, ModelError or DataError in one line.
    """
    console = console or Console()
    folder = RunFolder.open(run)
    config = folder.config
    full = config.lora is None
    model, tokenizer = folder.load()
    config.report.questions, config.report.from_heldout = [], 0  # scores only
    prepared = _measured_on(config, tokenizer, data, rows)
    setup = TrainingSetup(config, pick_device(config.model.device), model, tokenizer, prepared)
    with tempfile.TemporaryDirectory(prefix="parley-eval-") as scratch:
        args, _ = sft_config(config, Path(scratch), setup.device)
        trainer = SFTTrainer(
            model,
            args,
            train_dataset=prepared.heldout,
            eval_dataset=prepared.heldout,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.bind_fused_step()
        scores = {}
        reason = base_obstacle(model)
        if reason is None:
            with model.disable_adapter():
                scores["base"] = evaluate_model(setup, trainer, console).scores
        elif not full:
            print_text(console, f"only the tuned model is measured: {reason}")
        scores["tuned"] = evaluate_model(setup, trainer, console).scores
    figures = {name: score.model_dump(mode="json") for name, score in scores.items()}
    (folder.path / "eval.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return scores


def _measured_on(config: RunConfig, tokenizer: Any, data: str | None, rows: int | None) -> Prepared:
    """Data whose `heldout` rows are measured on. From here on `config` speaks of `data`, where it is given."""
    if data is not None:
        config.data.source, config.data.heldout, config.data.heldout_rows, config.data.streaming = data, None, 0, False
    prepared = prepare(config.data, tokenizer, config.model.max_seq_length)
    if data is not None:
        prepared.heldout = prepared.train
    if prepared.heldout is None:
        raise DataError(f"{config.output}: the run kept no rows aside to measure on; give some with --data")
    if rows is not None:
        prepared.heldout = prepared.heldout.select(range(min(rows, len(prepared.heldout))))
    return prepared
