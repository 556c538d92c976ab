"""`--to ollama`: a GGUF file whose own template Ollama keeps, and a Modelfile with the run's settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

import parley
from parley.errors import ModelError
from parley.exporting.export import Export
from parley.exporting.ollama import GUARD, guarded, modelfile, ollama_name, quoted
from parley.exporting.trained_model import open_run


@pytest.fixture(scope="module")
def done(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    copy = tmp_path_factory.mktemp("ollama") / "run"
    shutil.copytree(run, copy)
    text = (copy / "run.yaml").read_text(encoding="utf-8")
    text = text.replace("repetition_penalty: 1.0", "repetition_penalty: 1.1").replace("stop: []", "stop: [The End]")
    (copy / "run.yaml").write_text(text, encoding="utf-8")
    return parley.export(copy, "ollama", "f32")[0]


def test_the_gguf_is_verified_by_the_program_that_ollama_runs(done: Export) -> None:
    assert done.record.status == "verified", done.record.figures
    assert done.record.figures is not None
    assert done.record.figures.program.startswith("llama.cpp")
    assert done.record.figures.prompts_equal == done.record.figures.prompts == 4


def test_the_modelfile_has_stop_tokens_and_settings_and_no_template(done: Export) -> None:
    assert (done.folder / "Modelfile").read_text(encoding="utf-8").splitlines() == [
        "FROM ./model-f32.gguf",
        "REQUIRES 0.30.0",
        "PARAMETER temperature 1.5",
        "PARAMETER top_p 1.0",
        "PARAMETER top_k 0",
        "PARAMETER min_p 0.1",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_predict 512",
        "PARAMETER num_ctx 2048",
        "PARAMETER repeat_last_n -1",
        'PARAMETER stop "<|eot_id|>"',
        'PARAMETER stop "The End"',
    ]
    assert (done.folder / "model-f32.gguf").is_file()
    assert done.command == f"ollama create run -f {done.folder}/Modelfile && ollama run run"
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert "    ollama create run -f ./Modelfile && ollama run run" in card


def test_the_template_is_the_trained_one_and_too_far_from_any_that_ollama_knows(done: Export, run: Path) -> None:
    written = GGUFReader(done.folder / "model-f32.gguf").get_field("tokenizer.chat_template")
    assert written is not None
    template = AutoTokenizer.from_pretrained(run / "adapter").chat_template
    assert written.contents() == GUARD + template
    # Ollama's templates are ASCII but for one dash: each other character is an edit, and 100 keep a template.
    assert sum(ord(c) > 127 and c != "—" for c in GUARD) >= 100


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "\n{{ messages[0].content }}\n", "\n\n  a{% if 1 %}\nb{% endif %}"]
)
def test_the_comment_changes_nothing(tiny_tokenizer: object, template: str) -> None:
    def text(source: str) -> str:
        return tiny_tokenizer.apply_chat_template(  # type: ignore[attr-defined, no-any-return]
            [{"role": "user", "content": "Hi"}], chat_template=source, tokenize=False
        )

    assert text(guarded(template)) == text(template)


def test_the_system_turn_of_training_is_ollamas(run: Path) -> None:
    trained = open_run(run)
    trained.settings.data.system = 'You be "Ann", a pirate.'
    trained.settings.generation.seed = 7
    assert modelfile(trained, "x.gguf").splitlines()[-1] == 'SYSTEM """You be "Ann", a pirate."""'
    assert "PARAMETER seed 7" in modelfile(trained, "x.gguf").splitlines()


def test_a_run_without_template_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "adapter" / "chat_template.jinja").unlink()
    (copy / "golden.json").unlink()
    with pytest.raises(ModelError, match=r"no chat template, and Ollama would make one up; use --to gguf"):
        parley.export(copy, "ollama", "f32", verify=False)


@pytest.mark.parametrize(
    ("text", "value"), [("<|eot_id|>", '"<|eot_id|>"'), ('say "a" b', '"""say "a" b"""'), ("a\nb", '"""a\nb"""')]
)
def test_values_are_quoted(text: str, value: str) -> None:
    assert quoted(text) == value


@pytest.mark.parametrize("text", ["a\tb", 'a"', 'a"""b'])
def test_what_a_modelfile_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="a Modelfile cannot hold the text"):
        quoted(text)


@pytest.mark.parametrize(("name", "wanted"), [("Mine 2", "mine-2"), ("...", "tuned"), ("ünï_x", "n-_x")])
def test_names_are_those_that_ollama_takes(name: str, wanted: str) -> None:
    assert ollama_name(name) == wanted
