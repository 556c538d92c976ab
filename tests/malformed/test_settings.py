"""Settings that no run can begin with, or that a library would refuse late: one clear line, and no run folder.

Each is a list of `--set` overrides of a run that works. REFUSED must be an error before anything is written; ACCEPTED
must pass the checks of a dry run. What a value does once training runs is held elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parley.config import RunConfig
from parley.pipeline import dry_run, train

Outcome = Callable[..., str | None]
HUGE = 10**30
MISSING = "pip install"

# Overrides, and what the line says besides naming the setting.
REFUSED: list[tuple[str, str]] = [
    # numbers that are none, that overflow, and seeds outside 32 bits
    *((f"{key}={value}", "wanted a finite number") for value in (".inf", "-.inf", ".nan") for key in (
        "training.learning_rate", "training.weight_decay", "training.max_grad_norm", "training.warmup_steps",
        "training.num_train_epochs", "training.adam_epsilon", "training.logging_steps", "lora.lora_alpha",
        "generation.temperature", "training.memory",
    )),
    *((f"{key}={HUGE}", "wanted one of 64 at most") for key in (
        "training.max_steps", "training.seed", "training.per_device_train_batch_size", "lora.r", "data.limit",
        "model.max_seq_length", "generation.max_new_tokens", "training.save_total_limit",
    )),
    *((f"{key}=3000000000", "") for key in (
        "training.max_steps", "training.per_device_train_batch_size", "training.gradient_accumulation_steps", "lora.r",
        "data.limit", "data.heldout_rows", "model.max_seq_length", "generation.max_new_tokens", "generation.top_k",
        "report.max_new_tokens", "report.from_heldout", "report.examples", "training.per_device_eval_batch_size",
        "training.dataloader_num_workers", "training.dataset_num_proc", "training.eval_accumulation_steps",
    )),
    *((f"training.seed={value}", "training.seed") for value in (-1, 2**32, 1.5, "x", "[1]", "null")),
    *((f"generation.seed={value}", "generation.seed") for value in (-1, 2**32, 1.5)),
    *((f"training.max_steps={value}", "max_steps") for value in (0, -2, -100, 1.5, "x", "null", "[1]")),
    ("training.memory=1e300", "training.memory"),
    ("training.memory=0", "training.memory"),
    ("training.memory=x", "training.memory"),
    ("training.num_train_epochs=1e30", "from 0 to 1e+06"),
    ("training.num_train_epochs=0", "training.num_train_epochs"),
    ("training.warmup_steps=1e300", "training.warmup_steps"),
    ("training.gradient_accumulation_steps=100000000", "from 1 to 65536"),
    ("training.per_device_train_batch_size=0", "greater than or equal to 1"),
    # types of fields that only TRL names
    *((f"training.{name}=x", f"training.{name}: got 'x'") for name in (
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32", "save_total_limit",
        "dataloader_num_workers", "per_device_eval_batch_size", "neftune_noise_alpha", "label_smoothing_factor",
        "load_best_model_at_end", "greater_is_better", "eval_steps", "use_liger_kernel", "ddp_timeout",
    )),
    *((f"training.{name}=[1]", f"training.{name}: got [1]") for name in (
        "adam_epsilon", "run_name", "hub_model_id", "logging_first_step", "lr_scheduler_kwargs", "accelerator_config",
        "fsdp_config", "resume_from_checkpoint",
    )),
    ("training.max_grad_norm=null", "training.max_grad_norm: got None"),
    ("training.max_grad_norm=-1", "from 0 to"),
    ("training.label_smoothing_factor=2", "from 0 to 1"),
    ("training.neftune_noise_alpha=-5", "from 0 to"),
    ("training.eval_delay=-1", "from 0 to"),
    ("training.save_total_limit=0", "from 1 to"),
    ("training.dataloader_num_workers=100000", "from 0 to 256"),
    ("training.dataset_num_proc=-1", "from 1 to"),
    ("training.accelerator_config=x", "training"),
    ("training.accelerator_config={nonsense: 1}", "training"),
    ("training.unknown_field=1", "unknown key"),
    ("training.lr=1", "here it is training.learning_rate"),
    ("lora.rank=1", "here it is lora.r"),
    ("lora.use_rslorra=true", "did you mean 'use_rslora'?"),
    ("training.output_dir=x", "set output instead"),
    ("training.max_length=5", "set model.max_seq_length instead"),
    ("training.data_seed=3", "set training.seed instead"),
    # packages that are not installed
    ("training.use_liger_kernel=true", "pip install liger-kernel"),
    ("training.deepspeed=ds.json", "deepspeed"),
    ("training.optim=schedule_free_adamw", "pip install schedulefree"),
    ("training.optim=galore_adamw && training.optim_target_modules=[q_proj]", MISSING),
    ("training.optim=apollo_adamw && training.optim_target_modules=[q_proj]", MISSING),
    ("training.optim=lomo", "pip install lomo-optim"),
    ("training.optim=grokadamw", "pip install grokadamw"),
    ("training.optim=stable_adamw", "pip install torch-optimi"),
    ("training.optim=adamw_torch_8bit", "pip install torchao"),
    *((f"training.report_to={name}", f"pip install {name}") for name in ("wandb", "trackio", "mlflow")),
    ("training.report_to=[wandb, tensorboard]", "pip install wandb"),
    # values and combinations that TRL and transformers refuse late
    ("training.report_to=nonsense", "nonsense is not supported"),
    ("training.optim=nonsense", "not a valid OptimizerNames"),
    ("training.optim=3", "training.optim"),
    ("training.optim_args=nonsense", "training.optim"),
    ("training.adam_beta1=2", "Invalid beta parameter at index 0"),
    ("training.adam_beta1=-1", "Invalid beta"),
    ("training.adam_beta2=1.0", "Invalid beta parameter at index 1"),
    ("training.adam_epsilon=-1", "Invalid epsilon"),
    ("training.load_best_model_at_end=true", "strategy"),
    ("training.load_best_model_at_end=true && data.heldout_rows=0", "training"),
    ("training.save_strategy=best", "metric_for_best_model"),
    ("training.save_strategy=nonsense", "not a valid SaveStrategy"),
    ("training.eval_strategy=steps && data.heldout_rows=0", "set data.heldout_rows or data.heldout"),
    ("training.eval_strategy=epoch && data.heldout_rows=0", "set data.heldout_rows or data.heldout"),
    ("training.eval_on_start=true && data.heldout_rows=0", "set data.heldout_rows or data.heldout"),
    ("training.eval_strategy=steps && training.eval_steps=-3", "training.eval_steps"),
    ("training.eval_strategy=nonsense", "not a valid IntervalStrategy"),
    ("training.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
    ("training.lr_scheduler_type=cosine_warmup_with_min_lr", "min_lr"),
    ("training.lr_scheduler_type=warmup_stable_decay", "num_decay_steps"),
    ("training.lr_scheduler_type=cosine && training.lr_scheduler_kwargs={num_cycles: x}", "lr_scheduler_kwargs"),
    ("training.lr_scheduler_type=linear && training.lr_scheduler_kwargs={nonsense: 1}", "nonsense"),
    ("training.lr_scheduler_kwargs=nonsense", "lr_scheduler_kwargs"),
    ("training.lr_scheduler_type=nonsense", "not a valid SchedulerType"),
    ("training.lr_scheduler_type=7", "training.lr_scheduler_type"),
    ("training.dataloader_persistent_workers=true", "num_workers"),
    ("training.dataloader_multiprocessing_context=nonsense", "wanted fork or spawn or forkserver"),
    ("training.torch_compile_mode=nonsense", "Unrecognized mode"),
    ("training.train_sampling_strategy=nonsense", "wanted random or sequential"),
    ("training.gradient_checkpointing_kwargs={nonsense: 1}", "wanted context_fn or debug"),
    ("training.eos_token=nonsense", "wanted a token of the model"),
    ("training.truncation_mode=keep_end", "set data.overlong instead"),
    ("training.max_seq_length=5", "set model.max_seq_length instead"),
    ("training.use_cpu=true", "set model.device instead"),
    ("training.bf16_full_eval=true", "set model.dtype instead"),
    ("training.dataloader_prefetch_factor=2", "training"),
    ("training.logging_steps=1.5", "training"),
    ("training.bf16=true && training.fp16=true", "training"),
    ("training.fsdp=nonsense", "fsdp"),
    ("training.resume_from_checkpoint=/no/such", "no checkpoint there"),
    ("training.resume_from_checkpoint=~no-such-user/x", "is no user"),
    (f"training.deepspeed={'x' * 300}", "at most 4095 bytes"),
    ("training.hub_strategy=nonsense", "training"),
    ("training.debug=nonsense", "training"),
    # paths
    *((f'{key}="a\\0b"', "NUL") for key in ("output", "model.name", "model.chat_template", "data.source")),
    *((f"{key}={'x' * 300}", "at most 4095 bytes") for key in ("output", "model.name", "data.source", "data.heldout")),
    *((f"{key}={'x/' * 3000}", "at most 4095 bytes") for key in ("output", "model.name", "data.source")),
    *((f"{key}=~no-such-user/x", "is no user") for key in ("output", "model.name", "data.source", "data.heldout")),
    *((f"{key}=''", "is empty") for key in ("model.name", "data.source")),
    *((f'{key}="\\ud83d"', "that UTF-8 can hold") for key in ("output", "model.name", "data.system", "data.source")),
    ("output=/dev/null", "is no folder"),
    ("output=/dev/null/x", "cannot be written"),
    ("output=/proc/x/y", "cannot be written"),
    ("output=/", "already holds other files"),
    ("model.chat_template=/no/such", "cannot be read"),
    ("model.chat_template=/dev/zero", "no Jinja file"),
    ("model.chat_template=/", "no Jinja file"),
    ("model.name=/dev/null", "wanted a model folder"),
    ("model.name=/", "no config.json"),
    ("model.name=.", "no config.json"),
    ("data.source=/dev/zero", "neither a file nor a folder"),
    ("data.source=/no/such.jsonl", "no such file"),
    ("data.heldout=/no/such.jsonl", "no such file"),
    # sections that are not sections, keys that are not keys
    *((f"{section}={value}", section) for section in ("model", "data", "training", "generation", "report")
      for value in ("3", "[1]", "true", "null", "1.5")),
    *((f"lora={value}", "lora") for value in ("3", "[1]", "true", "x")),
    ("modle=1", "did you mean 'model'?"),
    ("model.nmae=1", "did you mean 'name'?"),
    ("qqqq=1", "it knows data, generation, lora"),
    ("training", "wanted section.key=value"),
    ("training.=1", "wanted section.key=value"),
    ("=1", "wanted section.key=value"),
    ("output.a.b=1", "not a valid path"),
    ("a.b.c.d.e=1", "unknown key"),
    (f"training.max_steps={'x' * 100_000}", "training.max_steps"),
    (f"{'x' * 100_000}=1", "unknown key"),
    ("training.max_steps=[", "not valid YAML"),
    ("training.max_steps={a: 1, a: 2}", "there twice"),
    ("training.max_steps=!!python/name:os.system", "is not read"),
    (f"data.system={'[' * 10_000}", "nested over"),
    ("data.date=2024-02-30", "out of range"),
    ("data.date=x", "data.date"),
    # LoRA
    ("lora.r=0", "lora.r"),
    ("lora.r=1.5", "lora.r"),
    ("lora.r=1000000", "lora.r"),
    ("lora.lora_alpha=0", "lora.lora_alpha"),
    ("lora.lora_dropout=1", "lora.lora_dropout"),
    ("lora.bias=x", "lora.bias"),
    ("lora.use_dora=x", "lora.use_dora"),
    ("lora.target_modules=[]", "lora.target_modules"),
    ("lora.target_modules=[nothing_proj]", "nothing_proj"),
    ("lora.target_modules=[q_proj, 3]", "lora.target_modules"),
    ("lora.init_lora_weights=nonsense", "nonsense"),
    ("lora.init_lora_weights=loftq", "lora"),
    ("lora.modules_to_save=x", "lora.modules_to_save"),
    ("lora.eva_config={rho: 2}", "leave it out"),
    ("lora.qalora_group_size=8", "without use_qalora"),
    ("lora.rank_pattern=x", "lora.rank_pattern"),
    ("lora.rank_pattern={q_proj: 0}", "lora.rank_pattern"),
    ("lora.layers_to_transform=x", "lora.layers_to_transform"),
    ("lora.layers_to_transform=[99]", "lora"),
    ("lora.trainable_token_indices=[99999]", "lora"),
    ("lora.task_type=SEQ_CLS", "lora.task_type"),
    ("lora.inference_mode=true", "decided by the run"),
    ("lora.peft_type=x", "decided by the run"),
    ("lora.base_model_name_or_path=x", "decided by the run"),
    ("lora.loftq=true", "not quantised"),
    ("lora=null && model.quantization=nf4", "cannot be trained"),
    # data, generation, report
    ("model.max_seq_length=7", "model.max_seq_length"),
    ("model.max_seq_length=100000", "positions"),
    ("model.dtype=float7", "model.dtype"),
    ("model.trust_remote_code=x", "model.trust_remote_code"),
    ("data.split=x", "unknown split"),
    ("data.columns={response: nonsense}", "nonsense"),
    ("data.columns=[1]", "data.columns"),
    ("data.streaming=true && training.max_steps=-1", "set training.max_steps"),
    ("generation.temperature=-1", "generation.temperature"),
    ("generation.temperature=hot", "generation.temperature"),
    ("generation.top_p=0", "generation.top_p"),
    ("generation.stop=x", "generation.stop"),
    ('generation.stop=[""]', "generation.stop"),
    ("report.questions=x", "report.questions"),
    ("report.questions=[3]", "report.questions"),
    (f"report.questions=[{'word ' * 3000}]", "the model's context is 2,048"),
    ("training.dataloader_drop_last=true && training.gradient_accumulation_steps=100", "fewer than the 200 of one"),
]  # fmt: skip

ACCEPTED = [
    "training.save_strategy=no",
    "training.logging_strategy=no",
    "training.adam_epsilon=1e-8",
    "training.adam_beta1=0.5",
    "training.max_grad_norm=0",
    "training.warmup_steps=0.5",
    "training.report_to=none",
    "training.report_to=[]",
    "training.optim=adafactor",
    "training.optim=paged_adamw_8bit",
    "training.optim_args=amsgrad=1",
    "training.seed=0",
    f"training.seed={2**32 - 1}",
    "training.lr_scheduler_type=cosine_with_min_lr && training.lr_scheduler_kwargs={min_lr: 1e-5}",
    "training.lr_scheduler_type=warmup_stable_decay && training.lr_scheduler_kwargs={num_decay_steps: 1}",
    "training.lr_scheduler_type=polynomial",
    "training.eval_strategy=steps && training.eval_steps=1",
    "training.dataloader_num_workers=2 && training.dataloader_persistent_workers=true",
    "training.dataloader_drop_last=true && training.gradient_accumulation_steps=1",
    "training.hub_token=hf_abcdefghijklmnopqrstuvwx",
    "training.memory=0.5",
    "lora.use_dora=true",
    "lora.target_modules=all-linear",
    "lora=null",
    "data.streaming=true",
    "data.system=''",
    "data.heldout_rows=0",
    "generation.seed=null",
    "report.questions=['[bold]x[/z]', '<|eot_id|>']",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"instruction": f"What be {n}?", "context": "", "response": f"It be {2 * n}."} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def configured(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> Callable[[str], RunConfig]:
    def create(overrides: str) -> RunConfig:
        values: dict[str, Any] = {
            "model": {"name": str(tiny_llama_folder), "device": "cpu", "max_seq_length": 64},
            "data": {"source": str(rows), "heldout_rows": 1},
            "training": {"max_steps": 1},
            "report": {"from_heldout": 0},
            "output": str(tmp_path / "runs" / "x"),
        }
        return RunConfig.create(values, overrides.split(" && "))

    return create


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[overrides[:60] for overrides, _ in REFUSED])
def test_refused_before_anything_is_written(
    configured: Callable[[str], RunConfig], outcome_of: Outcome, tmp_path: Path, overrides: str, said: str
) -> None:
    line = outcome_of(lambda: train(configured(overrides), Console(quiet=True)))
    assert line is not None
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted_by_a_dry_run(configured: Callable[[str], RunConfig], outcome_of: Outcome, overrides: str) -> None:
    assert outcome_of(lambda: dry_run(configured(overrides), Console(quiet=True))) is None


# -- YAML files --------------------------------------------------------------------------------------------------

FILES: dict[str, bytes] = {
    "missing": b"",
    "empty": b"",
    "list": b"- 1\n",
    "scalar": b"hello",
    "number": b"3",
    "true": b"true",
    "binary": bytes(range(256)),
    "utf-16": "model: x".encode("utf-16"),
    "nul": b"model: \0",
    "escape code": b"model: \x1b[2J",
    "tabs": b"\tmodel: x",
    "open list": b"model: [",
    "open map": b"{{{{",
    "open quote": b'model: "x',
    "bad indentation": b"model:\n  name: x\n dtype: auto\n",
    "colon": b"model: a: b",
    "two documents": b"model: a\n---\nmodel: b\n",
    "key twice": b"model: a\nmodel: b\n",
    "nested key twice": b"training: {max_steps: 1, max_steps: 2}\n",
    "deep list": b"[" * 50_000,
    "deep map": b"{a: " * 20_000,
    "deep indentation": b"".join(b" " * n + b"a:\n" for n in range(200)),
    "billion laughs": b"a0: &a0 [x, x]\n" + b"".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n".encode() for n in range(1, 60)
    ),
    "endless alias": b"a: &a [*a]",
    "unknown alias": b"a: *a",
    "merge of a number": b"<<: 3",
    "python object": b"!!python/object/apply:os.system [id]",
    "int tag": b"training: {max_steps: !!int x}",
    "float tag": b"training: {learning_rate: !!float x}",
    "timestamp tag": b"data: {date: !!timestamp x}",
    "bad date": b"data: {date: 2024-13-45}",
    "long number": b"training: {seed: " + b"9" * 5000 + b"}",
    "megabytes": b"#" * 1_000_000,
    "many values": b"- 1\n" * 60_000,
    "unhashable key": b"? [a]\n: b",
    "number as key": b"1: 2",
    "null as key": b"null: 2",
    "date as key": b"2024-01-01: 2",
    "equals sign": b"=",
    "percent": b"%YAML 9.9\n--- 1",
    "section is text": b"training: fast",
    "section is a list": b"generation: [1]",
}  # fmt: skip


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files_that_are_not_settings(tmp_path: Path, outcome_of_command: Outcome, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    if content:
        path.write_bytes(content)
    line = outcome_of_command("train", path, "--output", tmp_path / "run")
    assert line is not None
    assert not (tmp_path / "run").exists()


def test_yaml_files_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: &name some/model\ntraining: {save_strategy: no, learning_rate: 2e-4, gradient_checkpointing: true}\n"
        "data: {source: ~/rows.jsonl, date: 2024-07-26}\nlora: null\n"
    )
    config = RunConfig.from_yaml(path)
    assert config.training.model_dump()["save_strategy"] == "no"
    assert config.training.learning_rate == 2e-4
    assert config.data.source == str(Path.home() / "rows.jsonl")
