"""`evaluate`: measure a finished run once more, base and tuned, on its own held-out rows or on others."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console
from transformers import PrinterCallback

from parley.data.prepare import prepare
from parley.errors import DataError
from parley.models.device import pick_device
from parley.road.examination import examine
from parley.road.loading import Ready
from parley.training.arguments import sft_config
from parley.training.report import Scores
from parley.training.run_folder import RunFolder
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
    if data is not None:
        config.data.heldout = data
    if rows is not None:
        config.data.heldout_rows = rows
    model, tokenizer = folder.load()
    prepared = prepare(config.data, tokenizer, config.model.max_seq_length)
    if prepared.heldout is None:
        raise DataError(f"{run}: the run kept no rows aside to measure on; give some with --data")
    ready = Ready(config, pick_device(config.model.device), model, tokenizer, prepared)
    with tempfile.TemporaryDirectory(prefix="parley-eval-") as scratch:
        args, _ = sft_config(config, Path(scratch), ready.device)
        trainer = SFTTrainer(
            model,
            args,
            train_dataset=prepared.heldout,
            eval_dataset=prepared.heldout,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        scores = {}
        if not full:
            with model.disable_adapter():
                scores["base"] = examine(ready, trainer, console).scores
        scores["tuned"] = examine(ready, trainer, console).scores
    figures = {name: score.model_dump(mode="json") for name, score in scores.items()}
    (folder.path / "eval.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return scores
