"""Running `parley`: in this process (`parley`), or as its own (`parley_process`), as a user's shell would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of questions and answers, as Dolly writes them."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = '{{"instruction": "What be {0} and {0}?", "context": "", "response": "It be {1}, arr."}}\n'
    path.write_text("".join(row.format(n, 2 * n) for n in range(1, 13)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(tiny_llama_folder: Path, tiny_tokenizer: Any, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run whose adapter changes every answer; treat it as read-only."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from parley.config import RunConfig
    from parley.training.run_folder import RunFolder

    config = RunConfig.create(
        {
            "output": str(tmp_path_factory.mktemp("runs") / "tuned"),
            "model": {"name": str(tiny_llama_folder), "device": "cpu"},
            "data": {"source": str(rows), "heldout_rows": 4},
            "generation": {"temperature": 0, "min_p": 0, "max_new_tokens": 8},
            "report": {"max_new_tokens": 8},
        }
    )
    folder = RunFolder.create(config)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), lora)
    folder.save_weights(model, tiny_tokenizer, full=False)
    return folder


@pytest.fixture
def parley(capsys: pytest.CaptureFixture[str], usual_verbosity: None) -> Callable[..., Ended]:
    """`parley("train", "--help")` runs a command here and returns how it ended."""
    from parley.cli.main import main

    def run(*arguments: Any) -> Ended:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ended(exit_info.value.code, printed.out, printed.err)  # type: ignore[arg-type]

    return run


@pytest.fixture
def usual_verbosity() -> Iterator[None]:
    """Commands quiet the libraries of their own process, which here is everybody's."""
    import datasets
    import transformers

    before = transformers.utils.logging.get_verbosity(), datasets.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before[0])
    transformers.utils.logging.enable_progress_bar()
    datasets.utils.logging.set_verbosity(before[1])
    datasets.enable_progress_bars()


@pytest.fixture
def parley_process(tmp_path: Path) -> Callable[..., Ended]:
    """The same in a process of its own, in an empty folder."""

    def run(*arguments: Any, stdin: str = "") -> Ended:
        process = subprocess.run(
            [sys.executable, "-m", "parley.cli.main", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "80"},
            timeout=120,
        )
        return Ended(process.returncode, process.stdout, process.stderr)

    return run
