"""The arguments that hand a run to vLLM. vLLM itself is for machines with GPUs; a stand-in takes its place here."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from parley.config import RunConfig
from parley.errors import UsageError
from parley.models.demo import demo_model_path
from parley.serving.vllm import find_vllm, vllm_arguments
from parley.training.run_folder import RunFolder

WHERE: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, "max_num_seqs": 64, "max_model_len": 2048}


def options(arguments: list[str]) -> dict[str, str]:
    """The options that have a value."""
    return {name: value for name, value in pairwise(arguments) if name.startswith("--") and not value.startswith("--")}


def test_a_run_goes_with_adapter_template_and_defaults(tuned_run: RunFolder) -> None:
    arguments = vllm_arguments(str(tuned_run.path), **WHERE)
    given = options(arguments)
    adapter = str(tuned_run.adapter.resolve())
    assert arguments[:2] == ["serve", str(demo_model_path())]
    assert given["--served-model-name"] == "parley-demo"
    assert given["--lora-modules"] == f"pirate={adapter}"
    assert given["--max-lora-rank"] == "8"
    assert "--enable-lora" in arguments
    assert given["--tokenizer"] == adapter
    assert Path(given["--chat-template"]).read_text() == tuned_run.load()[1].chat_template
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "8000")
    assert (given["--max-num-seqs"], given["--max-model-len"]) == ("64", "2048")
    assert json.loads(given["--override-generation-config"]) == {
        "temperature": 0,
        "top_p": 1,
        "min_p": 0,
        "top_k": -1,
        "repetition_penalty": 1,
    }
    assert given["--tool-call-parser"] == "llama3_json"


def test_a_run_of_all_weights_is_a_model(calling_run: RunFolder) -> None:
    arguments = vllm_arguments(str(calling_run.path), **{**WHERE, "max_model_len": None, "max_num_seqs": None})
    given = options(arguments)
    assert arguments[1] == given["--tokenizer"] == str(calling_run.model.resolve())
    assert given["--served-model-name"] == "caller"
    assert not {"--lora-modules", "--max-lora-rank", "--max-model-len", "--max-num-seqs"} & set(given)
    assert "--enable-lora" not in arguments


def test_a_model_goes_by_its_name(tiny_llama_folder: Path) -> None:
    arguments = vllm_arguments(str(tiny_llama_folder), **WHERE)
    assert arguments[1] == str(tiny_llama_folder)
    assert options(arguments)["--served-model-name"] == tiny_llama_folder.name
    assert vllm_arguments("owner/model", **WHERE)[1] == "owner/model"


@pytest.mark.parametrize(("rank", "allowed"), [(1, "8"), (12, "16"), (64, "64"), (300, "320"), (700, None)])
def test_ranks_are_those_that_vllm_takes(tmp_path: Path, rank: int, allowed: str | None) -> None:
    model = {
        "name": "owner/model",
        "revision": "v2",
        "dtype": "bfloat16",
        "quantization": "nf4",
        "trust_remote_code": True,
    }
    folder = RunFolder.create(RunConfig.create({"output": str(tmp_path / "run"), "model": model}))
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text(json.dumps({"r": 1, "rank_pattern": {"q_proj": rank}}))
    if allowed is None:
        with pytest.raises(UsageError, match="up to rank 512, got 700"):
            vllm_arguments(str(folder.path), **WHERE)
        return
    arguments = vllm_arguments(str(folder.path), **WHERE)
    given = options(arguments)
    assert given["--max-lora-rank"] == allowed
    assert (given["--revision"], given["--dtype"], given["--quantization"]) == ("v2", "bfloat16", "bitsandbytes")
    assert arguments[1] == "owner/model"
    assert "--trust-remote-code" not in arguments  # run.yaml alone does not decide that
    assert "--trust-remote-code" in vllm_arguments(str(folder.path), **WHERE, trust_remote_code=True)
    assert "--chat-template" not in given


def test_without_vllm_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="vLLM is not installed; pip install vllm"):
        find_vllm()


def test_parley_becomes_vllm(tuned_run: RunFolder, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\nimport os, sys\nprint(os.environ['VLLM_API_KEY'], *sys.argv[1:])\n")
    program.chmod(0o755)
    ended = subprocess.run(
        [sys.executable, "-m", "parley.cli.main", "serve", tuned_run.path, "--engine", "vllm", "--api-key", "sesame"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    words = ended.stdout.split()
    assert words[0] == "sesame"
    assert words[1] == "serve"
    assert "sesame" not in words[1:]
