"""`--to vllm`: adapters that vLLM computes as PEFT does are exported, others refused."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import parley
from parley.errors import ModelError
from parley.models.vllm_adapters import max_lora_rank


def test_the_adapter_is_written_with_the_command_that_serves_it(run: Path, tmp_path: Path) -> None:
    (done,) = parley.export(run, "vllm", output=tmp_path / "out put")
    assert done.record.status == "verified", done.record.figures
    assert done.command is not None
    words = shlex.split(done.command)
    folder = str(tmp_path / "out put")
    assert words[:2] == ["vllm", "serve"]
    assert Path(words[2], "config.json").is_file()
    assert words[3:] == [
        *("--served-model-name", "llama"),
        *("--tokenizer", folder, "--chat-template", f"{folder}/chat_template.jinja"),
        *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={folder}"),
    ]
    # The card's command names neither this machine's folders nor the base's.
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    line = next(line for line in card.splitlines() if line.startswith("    vllm serve"))
    assert shlex.split(line)[2:5] == ["llama", "--served-model-name", "llama"]
    assert shlex.split(line)[5:9] == ["--tokenizer", ".", "--chat-template", "./chat_template.jinja"]
    assert line.endswith("--lora-modules tuned=.") or line.endswith("--lora-modules 'tuned=.'")


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias: all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"r": 513, "target_modules": ["q_proj"]}, "up to rank 512, got 513"),
    ],
)
def test_what_vllm_would_not_read_is_refused(
    build_run: Callable[..., Path], lora: dict[str, Any], named: str, tmp_path: Path
) -> None:
    run = build_run("llama", **lora)
    with pytest.raises(ModelError, match=f"vLLM .*{named}.*use --to merged"):
        parley.export(run, "vllm", output=tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512), (513, None)])
def test_the_rank_is_the_least_that_vllm_offers(rank: int, allowed: int | None) -> None:
    assert max_lora_rank(rank) == allowed
