"""The arguments that hand a run to vLLM. vLLM itself is for machines with GPUs; a stand-in takes its place here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from parley.config import RunConfig
from parley.errors import UsageError
from parley.models.demo import demo_model_path
from parley.serving.vllm import find_vllm, vllm_arguments
from parley.training.run_folder import RunFolder

WHERE: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 8000,
    "max_num_seqs": 64,
    "max_model_len": 2048,
    "trust_remote_code": False,
}


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


def adapter_run(
    tmp_path: Path, name: str = "owner/model", adapter: str = "auto", module: str = "q_proj", **fields: Any
) -> RunFolder:
    """A run on the base `name` whose adapter has these fields in its settings, and matrices of `module`."""
    model = {
        "name": name,
        "adapter": adapter,
        "revision": "v2",
        "dtype": "bfloat16",
        "quantization": "nf4",
        "trust_remote_code": True,
    }
    folder = RunFolder.create(RunConfig.create({"output": str(tmp_path / "run"), "model": model}))
    folder.adapter.mkdir()
    saved = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], **fields}
    (folder.adapter / "adapter_config.json").write_text(json.dumps(saved))
    tensors = {f"base_model.model.{module}.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
    save_file(tensors, folder.adapter / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("rank", "allowed"), [(1, "8"), (8, "8"), (12, "16"), (64, "64"), (300, "320"), (512, "512")])
def test_ranks_are_those_that_vllm_takes(tmp_path: Path, rank: int, allowed: str) -> None:
    arguments = vllm_arguments(str(adapter_run(tmp_path, r=rank).path), **WHERE)
    given = options(arguments)
    assert given["--max-lora-rank"] == allowed
    assert (given["--revision"], given["--dtype"], given["--quantization"]) == ("v2", "bfloat16", "bitsandbytes")
    assert arguments[1] == "owner/model"
    assert "--chat-template" not in given


def test_the_code_of_a_repository_runs_for_the_person_at_the_keyboard_alone(tmp_path: Path) -> None:
    """What run.yaml says is data that one was given."""
    folder = adapter_run(tmp_path)
    assert "--trust-remote-code" not in vllm_arguments(str(folder.path), **WHERE)
    assert "--trust-remote-code" in vllm_arguments(str(folder.path), **{**WHERE, "trust_remote_code": True})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("r", 700, "up to rank 512, got 700"),
        ("bias", "all", "bias: all"),
        ("bias", "lora_only", "bias: lora_only"),
        ("use_dora", True, "use_dora"),
        ("lora_bias", True, "lora_bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("rank_pattern", {"q_proj": 16}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": 16}, "alpha_pattern"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("target_parameters", ["experts"], "target_parameters"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("init_lora_weights", "pissa", "init_lora_weights: pissa"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights: pissa_niter_4"),
        ("init_lora_weights", "olora", "init_lora_weights: olora"),
        ("init_lora_weights", "loftq", "init_lora_weights: loftq"),
    ],
)
def test_what_vllm_reads_wrongly_or_not_at_all_is_refused(tmp_path: Path, field: str, value: Any, named: str) -> None:
    folder = adapter_run(tmp_path, **{field: value})
    with pytest.raises(UsageError, match=f"--engine vllm .*{named}.*use --engine parley"):
        vllm_arguments(str(folder.path), **WHERE)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_matrices_that_vllm_has_no_place_for_are_refused(tmp_path: Path, module: str) -> None:
    folder = adapter_run(tmp_path, module=module)
    with pytest.raises(UsageError, match=f"--engine vllm cannot read the adapter's {module}; use --engine parley"):
        vllm_arguments(str(folder.path), **WHERE)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_what_vllm_reads_is_let_through(tmp_path: Path, init: Any) -> None:
    folder = adapter_run(tmp_path, init_lora_weights=init, use_rslora=True, rank_pattern={}, modules_to_save=None)
    assert "--enable-lora" in vllm_arguments(str(folder.path), **WHERE)


def test_an_adapters_folder_goes_with_the_base_that_it_names(tuned_run: RunFolder, tmp_path: Path) -> None:
    given = options(vllm_arguments(str(tuned_run.adapter), **WHERE))
    assert given["--lora-modules"] == f"adapter={tuned_run.adapter.resolve()}"
    assert given["--served-model-name"] == demo_model_path().name
    on_top = tmp_path / "top"
    on_top.mkdir()
    saved = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(tuned_run.adapter)}
    (on_top / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="cannot read an adapter on an adapter"):
        vllm_arguments(str(on_top), **WHERE)


@pytest.mark.parametrize("how", ["merge", "auto"])
def test_a_run_on_an_adapter_as_its_base_is_refused(tuned_run: RunFolder, tmp_path: Path, how: str) -> None:
    """Its adapter belongs on the base with the other merged into it, which vLLM cannot make."""
    folder = adapter_run(tmp_path, name=str(tuned_run.adapter), adapter=how)
    with pytest.raises(UsageError, match=r"--engine vllm cannot (merge|read an adapter on)") as caught:
        vllm_arguments(str(folder.path), **WHERE)
    assert str(caught.value).endswith("use --engine parley")
    assert "\n" not in str(caught.value)


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
        env={"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},  # this checkout's parley
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    words = ended.stdout.split()
    assert words[0] == "sesame"
    assert words[1] == "serve"
    assert "sesame" not in words[1:]
