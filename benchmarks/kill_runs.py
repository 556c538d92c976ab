"""Kill training runs at random moments, resume each to its end, and compare its adapter with the undisturbed one's.

    python benchmarks/kill_runs.py --kills 100

Runs alternate between the fused step and the plain path (with dropout and NEFTune noise), on the embedded model and a
CPU. Signals take turns: SIGKILL, SIGTERM, SIGINT. Every third kill comes while a checkpoint is being written. Each
run is a process of its own, forked from one that has the libraries loaded. Prints one line a kill and a RESULT line of
JSON; exits with 1 where an adapter or a logged loss differs, a run cannot be resumed, or an exit code is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork

import parley.pipeline
from parley.cli.main import main as parley

STEPS = 12
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATHS: dict[str, list[str]] = {
    "fused": [],
    "plain": ["training.engine=plain", "lora.lora_dropout=0.1", "training.neftune_noise_alpha=5"],
}
SETTINGS = [
    "model.device=cpu",
    "data.heldout_rows=4",
    "model.max_seq_length=128",
    f"training.max_steps={STEPS}",
    "training.save_steps=3",
    "training.logging_steps=2",
    "training.eval_steps=4",
    "report.from_heldout=0",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
]


def start_arguments(path: str, rows: Path, output: Path) -> list[str]:
    changes = [item for setting in [*SETTINGS, *PATHS[path]] for item in ("--set", setting)]
    return ["train", "--model", "parley-demo", "--data", str(rows), "--output", str(output), *changes]


def write_rows(path: Path) -> Path:
    lines = [{"prompt": f"What be {n} and {n}?", "completion": f"Arr, it be {2 * n}, matey."} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def fork(arguments: list[str], log: Path) -> int:
    """Run `parley` in a child process, its output appended to `log`; returns the process id."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell put this program into background
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        parley(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_while_saving(child: int, output: Path, number: int, choice: random.Random) -> None:
    """Send a signal while one of the run's checkpoints, chosen at random, is being written."""
    wanted, seen = choice.randrange(1, STEPS // 3 + 1), set[str]()
    while not has_ended(child):
        seen.update(path.name for path in (output / "checkpoints").glob(".checkpoint-*.unfinished"))
        if len(seen) >= wanted:
            time.sleep(choice.random() * 0.03)
            break
        time.sleep(0.0005)
    os.kill(child, number)


def adapter_and_losses(output: Path) -> tuple[bytes, list[Any]]:
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    figures = [
        (e["event"], e["step"], e.get("loss"), e.get("eval_loss")) for e in events if e["event"] in ("step", "eval")
    ]
    return (output / "adapter" / "adapter_model.safetensors").read_bytes(), figures


def kill_and_resume(
    index: int, path: str, rows: Path, folder: Path, seconds: float, choice: random.Random
) -> tuple[str, str]:
    """Kill a run and resume it to its end in `folder`; what happened, and what is wrong ("" where nothing is)."""
    output, log = folder / "run", folder / "log.txt"
    folder.mkdir()
    number = SIGNALS[index % len(SIGNALS)]
    child = fork(start_arguments(path, rows, output), log)
    saving = index % 3 == (index // 3) % 3  # each signal comes while saving as often as the others
    if saving:
        kill_while_saving(child, output, number, choice)
    else:
        time.sleep(choice.random() * seconds)
        os.kill(child, number)
    code = wait(child)
    allowed = {0, -number} if number == signal.SIGKILL else {0, 128 + number}
    begun = (output / "run.yaml").is_file()
    if not begun:
        allowed.add(-number)  # while the program was starting
    happened = f"{number.name}{' while saving' if saving else ''}, exit {code}"
    if code not in allowed:
        return happened, f"exit code {code}"
    if code == 0:
        return f"{happened}, finished before", ""
    steps = sorted(int(p.name.rpartition("-")[2]) for p in (output / "checkpoints").glob("checkpoint-*"))
    happened += f", resumed after step {steps[-1] if steps else 0}" if begun else ", started again"
    arguments = ["train", "--resume", str(output)] if begun else start_arguments(path, rows, output)
    code = wait(fork(arguments, log))
    return happened, f"resuming ended with {code}: {log.read_text()[-300:]}" if code else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    choice = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="parley-kill-runs-"))
    rows = write_rows(root / "rows.jsonl")
    undisturbed, seconds = {}, {}
    for path in PATHS:
        started = time.perf_counter()
        if code := wait(fork(start_arguments(path, rows, root / path), root / f"{path}.txt")):
            sys.exit(f"the undisturbed run ended with {code}: {(root / f'{path}.txt').read_text()}")
        seconds[path] = time.perf_counter() - started
        undisturbed[path] = adapter_and_losses(root / path)
    outcomes: Counter[str] = Counter()
    for index in range(options.kills):
        path = list(PATHS)[index % len(PATHS)]
        folder = root / str(index)
        happened, wrong = kill_and_resume(index, path, rows, folder, seconds[path], choice)
        if not wrong:
            adapter, losses = adapter_and_losses(folder / "run")
            if adapter != undisturbed[path][0]:
                wrong = "another adapter"
            elif losses != undisturbed[path][1]:
                wrong = "other figures in events.jsonl"
        outcomes["wrong" if wrong else "identical"] += 1
        outcomes["finished before the signal"] += "finished before" in happened
        outcomes["while saving"] += "while saving" in happened
        print(f"{index + 1:3} {path}: {happened}: {wrong or 'identical'}", flush=True)
        if not wrong:
            shutil.rmtree(folder)
    print("RESULT " + json.dumps({"kills": options.kills, **outcomes}))
    if outcomes["wrong"]:
        sys.exit(f"{outcomes['wrong']} of {options.kills} runs did not end as the undisturbed one; see {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
