from __future__ import annotations

import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from parley.cli import main as main_module
from parley.cli import train as train_module
from parley.cli.terminal import importing

COMMANDS = list(main_module.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_each_command_on_a_line_of_80_columns(
    parley: Callable[..., Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = parley(*arguments)
    assert ended.code == 0
    listed = [line.strip("│ ").split(maxsplit=1) for line in ended.out.splitlines() if line.startswith("│ ")]
    commands = [(words[0], words[1]) for words in listed if words[0] in COMMANDS]
    assert [name for name, _ in commands] == COMMANDS
    assert all(said.endswith(".") for _, said in commands)
    assert "parley demo" in ended.out


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from parley.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert process.returncode == 0, process.stderr
    assert min(seconds) < 0.5  # of processor time, which other programs do not stretch as they do the clock's


def test_each_command_has_an_example_or_no_arguments(parley: Callable[..., Any]) -> None:
    for command in COMMANDS:
        ended = parley(command, "--help")
        assert ended.code == 0
        assert "Example: parley" in ended.out or command in ("demo", "doctor")


def test_a_closed_stdout_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python starts without one after `>&-`, as some schedulers do."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as end:
        main_module.main(["--version"])
    assert end.value.code == 0


def test_version(parley: Callable[..., Any]) -> None:
    from parley import __version__

    assert parley("--version").out == f"parley {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "Did you mean 'train'?; parley --help"),
        (["train", "--modle", "x"], "No such option: --modle"),
        (["inspect"], "Missing argument 'DATA'; parley inspect --help"),
        (["inspect", "rows.jsonl", "--row", "2"], "name the model with --model"),
        (["inspect", "rows.jsonl", "--model", "m", "--row", "0"], "--row"),
        (["chat", "--temperature", "hot"], "--temperature"),
        (["train"], "give a YAML file, or --model and --data"),
        (["train", "absent.yaml"], "absent.yaml: no such file"),
        (["train", "--data", "d", "--set", "training"], "wanted section.key=value"),
        (["train", "--data", "d", "--set", "data.formt=text"], "did you mean 'format'?"),
        (["train", "--data", "d", "--set", "data.limit=-3"], "data.limit: got -3"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(parley: Callable[..., Any], arguments: list[str], said: str) -> None:
    ended = parley(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("parley: error: ")
    assert said.lower() in ended.err.lower()
    assert ended.err.count("\n") == 1


def test_a_long_error_stays_one_line(parley_process: Callable[..., Any]) -> None:
    ended = parley_process("train", "x" * 200 + ".yaml")
    assert ended.code == 2
    assert ended.err == (
        f"parley: error: {'x' * 200}.yaml: no such file; give the path of a YAML file, or --model and --data\n"
    )


def test_what_looks_like_markup_is_printed_as_it_is(parley: Callable[..., Any]) -> None:
    assert "[bold]rows[/bold].yaml" in parley("train", "[bold]rows[/bold].yaml").err


def test_faults_of_parley_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(train_module, "run_config", fail)
    with pytest.raises(ZeroDivisionError):
        main_module.main(["train", "--data", "d"])


def test_ctrl_c_is_one_line_and_exit_code_130(parley: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "run_config", interrupt)
    ended = parley("train", "--data", "d")
    assert (ended.code, ended.err) == (130, "parley: stopped\n")


def test_the_collector_runs_again_after_imports_that_fail() -> None:
    """Off, memory would grow for as long as the command runs."""
    with importing():
        assert not gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
