"""Reports side by side, and what is refused before anything is loaded."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.distributed.conftest import in_processes

from parley.bench import worker
from parley.bench.compare import _run_in_subprocess, check, compare, table
from parley.bench.jobs import JOBS, find_job
from parley.bench.rows import as_text, read_rows, write_rows
from parley.bench.trainers import build
from parley.bench.worker import step_times, step_tokens, tokens_per_s
from parley.cli.main import main
from parley.errors import DataError, DeviceError, RunError, UsageError

KEYS = {
    *(
        "trainer",
        "job",
        "run",
        "processes",
        "tokens_per_s",
        "median_step_ms",
        "mean_step_ms",
        "first_step_s",
        "first_step_after_start_s",
    ),
    *("train_wall_s", "steps", "peak_allocated_gib", "peak_reserved_gib", "predicted_gib"),
    *("first_losses", "last_losses"),
    *("step_ms", "step_tokens", "graphs", "tokens", "losses", "grad_norms", "machine", "versions", "commit"),
}


def report(trainer: str, median: float | None, losses: list[float], run: int = 1) -> dict[str, Any]:
    return {
        "trainer": trainer,
        "run": run,
        "processes": 1,
        "tokens_per_s": 1234,
        "median_step_ms": median,
        "mean_step_ms": median,
        "first_step_after_start_s": 5.25,
        "peak_allocated_gib": None,
        "peak_reserved_gib": 1234.5,
        "losses": losses,
        "first_losses": losses[:3],
        "last_losses": losses[-2:],
    }


def row(instruction: str, response: str) -> str:
    return json.dumps({"instruction": instruction, "response": response}) + "\n"


def test_the_table_says_what_was_measured_and_nothing_else() -> None:
    reports = [
        report("parley", 10.0, [2.0, 1.0]),
        report("parley", 9.0, [2.0, 1.0], 2),
        report("trl", 30.0, [2.0, 1.1]),
    ]
    lines = table(reports).splitlines()
    assert lines[2] == "| parley | 10.0 | 10.0 | 1,234 | 5.25 |  | 1,234.5 | 2.0000, 1.0000 | 2.0000, 1.0000 |"
    assert lines[3].startswith("| parley, run 2 | 9.0 |")
    assert "3.0 times the steps per second of trl" in lines[-1]
    assert "differ by at most 9.09% at any of 2 steps" in lines[-1]


def test_the_table_of_several_processes_says_what_they_lose() -> None:
    shares = {"processes": 2, "all_reduce_share": 0.02, "waiting_share": 0.013}
    lines = table([report("parley", 10.0, [2.0]) | shares]).splitlines()
    assert "| all-reduce, share of a step | waiting for others |" in lines[0]
    assert "|  | 1,234.5 | 0.02 | 0.013 |" in lines[2]
    assert "all-reduce" not in table([report("parley", 10.0, [2.0])])


def test_tokens_of_a_second_are_those_of_the_timed_steps() -> None:
    assert tokens_per_s([0.0, 9.0, 10.0, 10.5], [1000, 1000, 30, 60, 7], skip=1) == 60
    assert tokens_per_s([0.0, 9.0], [10, 10], skip=1) is None
    assert tokens_per_s([0.0, 9.0, 10.0], [], skip=1) is None


def test_a_job_in_several_processes(tmp_path: Path, tiny_llama_folder: Path) -> None:
    source, settings, data = tmp_path / "rows.jsonl", tmp_path / "run.yaml", tmp_path / "data"
    source.write_text("".join(row(f"Say {n}", "it's " + "arr " * (n % 7)) for n in range(40)))
    job = JOBS["demo"]
    found = {}
    for count in (1, 2):  # the batch is that of each process: half of the accumulation gives the same step
        config = job.config(str(tiny_llama_folder), str(source), 4)
        config.model.device = "cpu"
        config.training.gradient_accumulation_steps = 4 // count
        settings.write_text(config.to_yaml())
        if count == 1:
            write_rows(job, config, data, 2)
        result = tmp_path / f"{count}.json"
        work = lambda result=result: worker.main("parley", "demo", str(settings), str(data), str(result))  # noqa: E731
        if count == 1:
            work()
        else:
            assert in_processes(count, work) == [0, 0]
        found[count] = json.loads(result.read_text())
    assert found[2].keys() - found[1].keys() == {"all_reduce_ms", "waiting_ms", "all_reduce_share", "waiting_share"}
    assert found[2]["processes"] == 2
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)
    assert found[2]["step_tokens"] == found[1]["step_tokens"]
    assert found[2]["all_reduce_ms"] > 0
    assert min(found[2]["waiting_ms"]) == 0
    assert len(found[2]["waiting_ms"]) == 2


def test_several_processes_are_started_by_torch_s_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **kwargs: Any) -> Any:
        commands.append(command[1:])
        (tmp_path / "result.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr("parley.bench.compare.subprocess.run", run)
    for processes in (1, 3):
        _run_in_subprocess("parley", JOBS["demo"], tmp_path / "run.yaml", tmp_path, processes)
    assert commands[0][:2] == ["-m", "parley.bench.worker"]
    assert commands[1] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", *commands[0]]


def test_the_command_asks_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("parley.bench.compare.compare", lambda *args: asked.append(args[-1]) or [])
    monkeypatch.setattr("parley.bench.compare.table", lambda reports: "")
    with pytest.raises(SystemExit):
        main(["bench", "demo", "--processes", "3"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(SystemExit):
        main(["bench", "seed", "--gpus", "all"])
    assert asked == [3, 4]


def test_tokens_of_a_step_come_from_the_running_count() -> None:
    assert step_tokens([{"num_tokens": 10.0}, {"num_tokens": 35.0, "loss": 1.0}]) == [10, 25]
    assert step_tokens([{"loss": 1.0}]) == []


def test_no_speed_is_claimed_where_none_was_measured() -> None:
    said = table([report("parley", None, [2.0]), report("trl", None, [2.0])])
    assert "times" not in said.splitlines()[-1]
    assert "| parley |  |  |" in said


def test_the_first_steps_are_left_out_of_the_median() -> None:
    assert step_times([0.0, 9.0, 10.0, 10.5, 11.5], skip=1) == {"median_step_ms": 1000.0, "mean_step_ms": 833.33}
    assert step_times([0.0, 9.0], skip=1) == {"median_step_ms": None, "mean_step_ms": None}


@pytest.mark.parametrize("name", ["parley", "parley-low", "parley-plain", "parley-5.5", "trl"])
def test_known_trainers_are_accepted(name: str) -> None:
    check(JOBS["demo"], [name])


@pytest.mark.parametrize("name", ["parlay", "parley-fast", "parley-0", "parley--3", "unsloth-2", "trl-5"])
def test_unknown_trainers_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown trainer.*parley-GIB.*unsloth"):
        check(JOBS["demo"], [name])


def test_what_is_wrong_is_said_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"unknown job 'sed'; there are demo, seed"):
        find_job("sed")
    with pytest.raises(UsageError, match="no trainer to time"):
        check(JOBS["demo"], [])
    with pytest.raises(UsageError, match="unsloth"):
        check(JOBS["demo"], ["unsloth"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_s_job_needs_one() -> None:
    with pytest.raises(DeviceError, match=r"job seed needs a GPU.*demo"):
        check(JOBS["seed"], ["parley"])


def test_long_rows_are_as_long_as_asked_and_the_same_each_time(tmp_path: Path, tiny_llama_folder: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(row("Say", f"the {n}th word") for n in range(9)))
    job = JOBS["long"]
    config = job.config(str(tiny_llama_folder), str(source), None)
    config.model.max_seq_length = 250
    short = type(job)("long", job.model, batch=1, length=250)
    for name in ("one", "two"):
        write_rows(short, config, tmp_path / name)
    rows = read_rows(tmp_path / "one")
    assert rows["input_ids"] == read_rows(tmp_path / "two")["input_ids"]
    assert len(rows) == 32
    assert all(170 <= len(ids) <= 250 for ids in rows["input_ids"])


def test_text_rows_make_the_same_ids(tmp_path: Path, tiny_tokenizer: Any, tiny_llama_folder: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(row(f"Say {n}", "it's 1 , 2 !") for n in range(9)))
    write_rows(JOBS["8b-short"], JOBS["8b-short"].config(str(tiny_llama_folder), str(source), None), tmp_path / "rows")
    rows = read_rows(tmp_path / "rows")
    again = [
        tiny_tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in as_text(rows, tiny_tokenizer)
    ]
    assert again == list(rows["input_ids"])


def test_settings_replace_the_job_s() -> None:
    config = JOBS["seed"].config("model", "rows", 3, ["lora.use_dora=true", "model.quantization=none"])
    assert config.lora is not None
    assert config.lora.model_extra == {"use_dora": True}
    assert (config.lora.r, config.model.quantization, config.training.max_steps) == (16, "none", 3)
    with pytest.raises(UsageError, match=r"unknown key 'model.quantisation'.*did you mean 'quantization'"):
        JOBS["seed"].config(None, None, None, ["model.quantisation=none"])


@pytest.mark.parametrize("name", ["parley", "trl"])
def test_full_fine_tuning_is_timed_too(name: str, tmp_path: Path, tiny_llama_folder: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(row(f"Say {n}", "it's 1 , 2 !") for n in range(9)))
    config = JOBS["demo"].config(str(tiny_llama_folder), str(source), 2, ["lora=null"])
    write_rows(JOBS["demo"], config, tmp_path / "data")
    trainer = build(name, JOBS["demo"], config, tmp_path / "data")
    assert not isinstance(trainer.model, PeftModel)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_too_few_rows_for_a_step_are_refused(tmp_path: Path, tiny_llama_folder: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(row("Say", "it"))
    config = JOBS["seed"].config(str(tiny_llama_folder), str(source), None)
    with pytest.raises(DataError, match="1 rows are left, and a step of job seed takes 8"):
        write_rows(JOBS["seed"], config, tmp_path / "rows")
    with pytest.raises(DataError, match="1 rows are left, and a step of job seed takes 16"):
        write_rows(JOBS["seed"], config, tmp_path / "more", 2)


def test_the_demo_job_is_timed_in_processes_of_their_own() -> None:
    job = JOBS["demo"]
    ours, peer = compare(job, job.config(None, None, 3), ["parley", "trl"])
    for found in (ours, peer):
        assert found.keys() >= KEYS
        assert found["steps"] == len(found["losses"]) == 3
        assert found["first_step_after_start_s"] > found["first_step_s"]
        assert found["median_step_ms"] is None  # fewer steps than the job skips
        assert found["versions"]["trl"]
    assert ours["plain_because"] is None
    assert (ours["path"], peer["path"]) == ("fused", None)
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-4)
    assert ours["grad_norms"] == pytest.approx(peer["grad_norms"], rel=1e-2)


def test_a_trainer_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"trl failed on job demo: .*gone\.yaml: no such file"):
        _run_in_subprocess("trl", JOBS["demo"], tmp_path / "gone.yaml", tmp_path)
    assert "gone.yaml" in (tmp_path / "failed").read_text()  # for a launcher, whose own words come last
