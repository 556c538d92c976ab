"""Runs that are stopped, killed or short of disk: nothing is lost, and resumed they end where undisturbed ones do."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from parley.config import RunConfig
from parley.errors import RunError, UsageError
from parley.pipeline import RunResult, train
from parley.training.json_lines import read_events
from parley.training.run_folder import RunFolder

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"What be {n}?", "completion": f"It be {2 * n}, arr."} for n in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def configured(
    tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """`configured("training.max_steps=4")`: settings of six steps into a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")

    def create(*overrides: str, output: Path | None = None) -> RunConfig:
        values: dict[str, Any] = {
            "model": {"name": str(tiny_llama_folder), "device": "cpu", "max_seq_length": 64},
            "data": {"source": str(rows), "heldout_rows": 2},
            "training": {"max_steps": 6, "gradient_accumulation_steps": 1, "learning_rate": 0.01, "save_steps": 2},
            "report": {"from_heldout": 1, "max_new_tokens": 4},
            "output": str(output or folder / f"run-{len(list(folder.iterdir()))}"),
        }
        return RunConfig.create(values, overrides)

    return create


@pytest.fixture(scope="module")
def whole(configured: Callable[..., RunConfig]) -> RunResult:
    """The undisturbed run."""
    return train(configured(), QUIET)


class Pressing(Console):
    """A console that sends this process signals when a line that begins with `at` is printed."""

    def __init__(self, at: str, *numbers: int) -> None:
        super().__init__(file=io.StringIO(), force_terminal=False, width=200)
        self.at, self.numbers = at, numbers

    def print(self, *objects: Any, **kwargs: Any) -> None:
        super().print(*objects, **kwargs)
        if objects and str(objects[0]).startswith(self.at):
            for number in self.numbers:
                os.kill(os.getpid(), number)


def adapter(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def steps_of(folder: RunFolder) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    exact = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "mean_token_accuracy")
    return [{name: event[name] for name in exact} for event in events if event["event"] == "step"]


def assert_same(resumed: RunResult, whole: RunResult) -> None:
    ours, theirs = adapter(resumed.folder), adapter(whole.folder)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert steps_of(resumed.folder) == steps_of(whole.folder)
    assert [step.loss for step in resumed.report.steps] == [step.loss for step in whole.report.steps]
    assert resumed.report.after == whole.report.after
    assert resumed.report.before == whole.report.before
    assert resumed.report.answers == whole.report.answers
    assert resumed.report.resources.tokens == whole.report.resources.tokens
    assert resumed.report.resources.supervised_tokens == whole.report.resources.supervised_tokens


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_it_and_the_run_resumes_exactly(
    configured: Callable[..., RunConfig], whole: RunResult, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    stopped = train(configured(), Pressing("step 3/", number))
    assert stopped.interrupted
    assert stopped.signal == number
    assert f"{number.name} received; the step is finished and saved" in capfd.readouterr().err
    assert (stopped.folder.checkpoints / "checkpoint-3" / "manifest.json").is_file()
    assert not stopped.folder.adapter.exists()
    assert not (stopped.folder.path / "run.lock").exists()
    notes = stopped.report.notes[-1]
    assert notes == f"stopped by {number.name} after step 3; to continue: {stopped.folder.resume_command}"
    assert handlers == [
        signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ]
    assert_same(stopped.resume(QUIET), whole)


def test_sigusr1_saves_and_training_continues(configured: Callable[..., RunConfig], whole: RunResult) -> None:
    result = train(configured("training.save_total_limit=9"), Pressing("step 3/", signal.SIGUSR1))
    assert not result.interrupted
    saved = sorted(path.name for path in result.folder.checkpoints.iterdir() if path.is_dir())
    assert saved == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]
    assert_same(result, whole)


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_whole(
    configured: Callable[..., RunConfig], whole: RunResult
) -> None:
    config = configured()
    with pytest.raises(KeyboardInterrupt):
        train(config, Pressing("step 3/", signal.SIGINT, signal.SIGINT))
    folder = RunFolder(config.output)
    assert [path.name for path in folder.checkpoints.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert_same(train(resume=config.output, console=QUIET), whole)


def test_a_stop_before_the_first_step_leaves_nothing(configured: Callable[..., RunConfig]) -> None:
    config = configured()
    with pytest.raises(KeyboardInterrupt):
        train(config, Pressing("optimizer: ", signal.SIGTERM))
    assert not config.output.exists()


def test_a_stop_after_the_last_step_leaves_the_rest_to_resuming(
    configured: Callable[..., RunConfig], whole: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured()
    save = RunFolder.save_weights

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "save_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    monkeypatch.setattr(RunFolder, "save_weights", save)
    assert_same(train(resume=config.output, console=QUIET), whole)


def test_a_stop_in_the_report_leaves_each_evaluation_once(
    configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(configured("training.eval_steps=3"), QUIET)
    config = configured("training.eval_steps=3")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("parley.pipeline.write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, QUIET)
    resumed = train(resume=config.output, console=QUIET)
    assert_same(resumed, undisturbed)
    evaluated = [
        [(event["step"], event["eval_loss"]) for event in read_events(result.folder.events) if event["event"] == "eval"]
        for result in (resumed, undisturbed)
    ]
    assert evaluated[0] == evaluated[1]
    assert [step for step, _ in evaluated[0]] == [0, 3, 6, 6]


def test_a_run_in_a_folder_that_cannot_be_written_is_refused_in_one_line(
    configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = train(configured(), Pressing("step 3/", signal.SIGINT))
    opened = os.open

    def refused(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("run.lock"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\); make it writable, or copy"):
        stopped.resume(QUIET)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    configured: Callable[..., RunConfig], whole: RunResult
) -> None:
    config = configured()
    folder = RunFolder.create(config)
    folder.events.write_text('{"event": "start", "step": 0, "max_steps": 6}\n{"event": "step", "st')
    folder.unlock()
    said = Console(file=io.StringIO(), width=200)
    assert_same(train(resume=config.output, console=said), whole)
    assert "continues at its first step, as no checkpoint was written" in said.file.getvalue()  # type: ignore[attr-defined]


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(
    configured: Callable[..., RunConfig], whole: RunResult
) -> None:
    stopped = train(configured(), Pressing("step 5/", signal.SIGINT))
    broken = stopped.folder.checkpoints / "checkpoint-5" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-9])
    said = Console(file=io.StringIO(), width=200)
    assert_same(train(resume=stopped.folder.path, console=said), whole)
    text = said.file.getvalue()  # type: ignore[attr-defined]
    assert "checkpoint-5 is damaged (adapter_model.safetensors has " in text
    assert "continues after step 4" in text
    assert "step 0/" not in text


def test_steps_and_saving_may_change_and_are_written_down(configured: Callable[..., RunConfig]) -> None:
    stopped = train(configured(), Pressing("step 3/", signal.SIGINT))
    config = stopped.folder.config
    config.training.max_steps, config.training.save_steps = 8, 1
    said = Console(file=io.StringIO(), width=200)
    result = train(config, said, resume=stopped.folder.path)
    assert [step.step for step in result.report.steps] == list(range(1, 9))
    output = said.file.getvalue()  # type: ignore[attr-defined]
    assert "training.max_steps: 6 before, 8 from here on" in output
    assert output.count("the learning rate follows the schedule of the new number of steps from here on") == 1
    assert stopped.folder.config.training.max_steps == 8
    with pytest.raises(UsageError, match=r"is finished; --set training.max_steps=N"):
        train(resume=stopped.folder.path, console=QUIET)
    config.training.learning_rate = 1.0
    with pytest.raises(UsageError, match=r"training.learning_rate was 0.01 and cannot become 1.0"):
        train(config, QUIET, resume=stopped.folder.path)


def test_fewer_steps_than_a_run_has_taken_are_refused(configured: Callable[..., RunConfig]) -> None:
    stopped = train(configured(), Pressing("step 3/", signal.SIGINT))
    config = stopped.folder.config
    config.training.max_steps = 2
    with pytest.raises(UsageError, match=r"max_steps: got 2, and .* has taken 3 steps already; give more"):
        train(config, QUIET, resume=stopped.folder.path)
    assert not (stopped.folder.path / "run.lock").exists()
    config.training.max_steps = 3
    assert [step.step for step in train(config, QUIET, resume=stopped.folder.path).report.steps] == [1, 2, 3]


def test_settings_changed_in_run_yaml_itself_are_refused_too(configured: Callable[..., RunConfig]) -> None:
    stopped = train(configured(), Pressing("step 3/", signal.SIGINT))
    file = stopped.folder.config_file
    file.write_text(file.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    with pytest.raises(UsageError, match=r"learning_rate was 0.01 and is 0.02"):
        stopped.resume(QUIET)
    assert not (stopped.folder.path / "run.lock").exists()


def test_training_into_an_unfinished_run_names_the_resume_command(configured: Callable[..., RunConfig]) -> None:
    stopped = train(configured(), Pressing("step 1/", signal.SIGINT))
    with pytest.raises(RunError, match=rf"unfinished run; continue it with {stopped.folder.resume_command}"):
        train(configured(output=stopped.folder.path), QUIET)


def test_a_stopped_run_answers_with_its_last_checkpoint(
    configured: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    stopped = train(configured(), Pressing("step 3/", signal.SIGINT))
    opened = RunFolder.open(stopped.folder.path)
    assert opened.weights.name == "checkpoint-3"
    assert f"the run has not finished; checkpoint-3 is used (to continue: {opened.resume_command})" in caplog.text
    model, tokenizer = opened.load()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, stopped.model.eval()(input_ids=ids).logits)
    for entry in json.loads(opened.golden.read_text()):
        assert tokenizer.apply_chat_template(entry["messages"], return_dict=False) == entry["input_ids"]
    shutil.rmtree(opened.checkpoints)
    with pytest.raises(
        RunError, match="did not finish, and no checkpoint is whole; to train it: parley train --resume"
    ):
        RunFolder.open(stopped.folder.path)


def test_a_finished_run_that_is_extended_and_stopped_answers_with_its_last_checkpoint(
    configured: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    finished = train(configured("training.max_steps=4"), QUIET)
    assert RunFolder.open(finished.folder.path).weights == finished.folder.adapter
    config = finished.folder.config
    config.training.max_steps = 8
    shutil.rmtree(finished.folder.checkpoints / "checkpoint-4")  # from before the saved weights on
    stopped = train(config, Pressing("step 6/", signal.SIGTERM), resume=finished.folder.path)
    assert stopped.interrupted
    opened = RunFolder.open(finished.folder.path)
    assert opened.weights.name == "checkpoint-6"
    assert "the run has not finished; checkpoint-6 is used" in caplog.text
    with pytest.raises(RunError, match="unfinished run; continue it with"):
        train(configured(output=stopped.folder.path), QUIET)
    again = stopped.resume(QUIET)
    assert RunFolder.open(finished.folder.path).weights == again.folder.adapter
    saved = load_file(again.folder.checkpoints / "checkpoint-8" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter(again.folder).items())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of at most `size` bytes in this process: writing more raises EFBIG, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Filling(Console):
    """A console that lowers the largest file's size when a line that begins with `at` is printed."""

    def __init__(self, at: str, limit: int) -> None:
        super().__init__(file=io.StringIO(), force_terminal=False)
        self.at, self.limit = at, limit

    def print(self, *objects: Any, **kwargs: Any) -> None:
        if objects and str(objects[0]).startswith(self.at):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, hard))


@pytest.mark.parametrize(
    ("size", "at"),
    [(20_000, "the adapter, in safetensors"), (90_000, "the optimizer, in torch.save"), (100, "the event log")],
)
def test_a_file_that_cannot_be_written_leaves_the_last_checkpoint_whole(
    configured: Callable[..., RunConfig], whole: RunResult, size: int, at: str
) -> None:
    config = configured()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with largest_file(unlimited), pytest.raises(RunError) as caught:
        train(config, Filling("step 3/", size))
    text = str(caught.value)
    assert "\n" not in text
    assert "checkpoint-2 is whole: free space, then parley train --resume" in text
    assert caught.value.exit_code == 1
    folder = RunFolder(config.output)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["checkpoint-2"]
    assert_same(train(resume=config.output, console=QUIET), whole)


def test_a_disk_that_fails_before_any_checkpoint_gives_a_run_in_the_temporary_folder(
    configured: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = configured("training.save_steps=5")

    class FullEvents(Console):
        def print(self, *objects: Any, **kwargs: Any) -> None:
            if str(objects[0]).startswith("step 1/"):
                events = config.output / "events.jsonl"
                events.unlink()
                events.symlink_to(full)

    with pytest.raises(RunError, match=r"disk full at step 2 .*the weights are whole in") as caught:
        train(config, FullEvents(file=io.StringIO(), force_terminal=False))
    rescued = Path(str(caught.value).split("whole in ")[1].split(",")[0])
    assert RunFolder.open(rescued).load()[0].peft_config
    assert json.loads((rescued / "golden.json").read_text())
