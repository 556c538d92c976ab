"""One description of a run, shared by YAML files, command-line overrides and Python.

Sections mirror the pipeline: model, data, lora, training, generation. `lora` and `training` take every field of PEFT's
LoraConfig and TRL's SFTConfig under its own name; only the fields with a default of Parley's own are spelled out here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date as Date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from parley.config_keys import unknown_key, without_secrets
from parley.config_values import MAX_COUNT, MAX_RANK, CheckedPath, Count, PathText, Positive, Seed, check_values
from parley.errors import UsageError
from parley.safe_yaml import load_yaml, read_yaml_file
from parley.setting_names import translation
from parley.text import shorten_middle

DEMO_MODEL = "parley-demo"
DEMO_DATA = "parley-demo-pirate"
DEMO_PREFERENCES = "parley-demo-preferences"
DEMO_PROMPTS = "parley-demo-prompts"
BUILT_IN_REWARDS = "parley.rewards:"
_PERCENTAGE = re.compile(r"\s*([+-]?\d*\.?\d+)\s*%\s*")
GRPO_DEFAULTS = {"learning_rate": 1e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
"""Eight answers to a prompt, four prompts a step."""
PREFERENCE_LEARNING_RATE = 2e-5  # by default; at 2e-4 adapters leave the reference within some steps
LLAMA_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# The checks of parley.data.doctor that single out rows.
Droppable = Literal[
    "heldout-duplicate",
    "heldout-near-duplicate",
    "empty-answer",
    "duplicate",
    "near-duplicate",
    "control-token",
    "media-placeholder",
    "template-text",
    "mojibake",
    "replacement-character",
    "nul",
    "one-word-answer",
    "system-later",
    "repeated-role",
    "orphan-result",
    "assistant-first",
    "unanswered",
]
Overlong = Literal["drop", "error", "keep-whole-turns", "truncate", "truncate-start", "split"]


class Section(BaseModel):
    """A section whose unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class OpenSection(BaseModel):
    """A section that passes unknown fields on to the library that defines them (TRL, PEFT)."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)


class ModelSection(Section):
    name: PathText = Field(DEMO_MODEL, description="Hub id, folder, or parley-demo for the embedded model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    adapter: Literal["auto", "continue", "merge", "new"] = Field(
        "auto",
        description="Where `name` is an adapter: continue training it, merge it into its base first, or start a new "
        "one on its base. auto: continue, and with lora: null merge.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: bf16 where the GPU has it, else fp16; fp32 on CPU."
    )
    quantization: Literal["auto", "none", "nf4", "int8"] = Field(
        "auto", description="auto: as the checkpoint was saved. nf4 and int8 quantise while loading."
    )
    double_quantization: bool = Field(True, description="Quantise the NF4 scales as well.")
    max_seq_length: int = Field(2048, ge=8, le=MAX_COUNT, description="Longest conversation trained on, in tokens.")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: the GPU where there is one.")
    chat_template: CheckedPath | None = Field(None, description="A Jinja file used in place of the tokenizer's own.")
    trust_remote_code: bool = Field(False, description="Run code that the model's repository ships.")
    name_from_run: str | None = Field(None, description="In run.yaml: a local base model, seen from the run.")


class DataSection(Section):
    source: PathText = Field(DEMO_DATA, description="Hub id, file (.jsonl .json .csv .tsv .txt .parquet) or folder.")
    split: str = Field("train", description="Split of a hub data set, also in slices: train[:1000].")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "dolly", "prompt-completion", "tokens", "text"] = Field(
        "auto", description="auto: recognised by the columns."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Canonical name to the data set's own, for example {response: answer} or {messages: chat.turns}; "
        "role and content are the keys of a turn.",
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="The data set's own name of a role to the usual one: {expert: assistant}.",
    )
    bad_rows: Literal["error", "skip"] = Field(
        "skip",
        description="Rows that cannot be read or rendered: are left out, counted and written to bad_rows.jsonl of the "
        "run folder, or end the run.",
    )
    bad_rows_limit: float = Field(
        0.05,
        ge=0,
        le=MAX_COUNT,
        description="With bad_rows: skip, more bad rows than these end the run: a share below 1 (ten are always "
        "allowed), or a number.",
    )
    drop: list[Droppable] = Field(
        default_factory=list,
        description="Rows left out by what `parley inspect` finds in them, for example [duplicate, mojibake].",
    )
    system: str | None = Field(None, description="System turn given to conversations that have none.")
    train_on: Literal["all", "last", "inputs", "nothing"] | list[str] = Field(
        "all",
        description="Supervised turns: all or the last one of the assistant, inputs (every token), nothing, or the "
        "turns of a list of roles. A message's own weight wins.",
    )
    end_tokens: Literal["turn", "last", "all", "none"] = Field(
        "turn",
        description="Supervised end-of-turn tokens: of each supervised turn, of the last one, of all assistant turns.",
    )
    control_tokens: Literal["auto", "text", "tokens"] = Field(
        "auto",
        description="Control-token text inside a row. text: encoded as plain text; tokens: as control tokens; auto: "
        "text in messages, tokens in rows of text.",
    )
    template: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the chat template, for example {enable_thinking: false}."
    )
    overlong: Overlong = Field(
        "drop",
        description="Policy for rows longer than model.max_seq_length. truncate keeps their first tokens, "
        "truncate-start their last, split cuts them into rows of their own.",
    )
    date: Date = Field(Date(2024, 7, 26), description="The date that templates write in place of today's.")
    limit: Positive | None = Field(None, description="Use only the first rows.")
    streaming: bool = Field(False, description="Read rows while training; needs training.max_steps.")
    heldout: PathText | None = Field(
        None,
        description="Rows to evaluate on: a second source, or a share of `source` such as 5%, split by a hash of each "
        "conversation.",
    )
    heldout_rows: Count = Field(64, description="Rows set aside from `source` when `heldout` is not given.")

    @field_validator("heldout", mode="before")
    @classmethod
    def _heldout_is_text(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError("wanted a file, a hub id, or a share of the data with its percent sign, such as 5%")
        return value

    @property
    def heldout_share(self) -> float | None:
        """The share of `source` to hold out (5% is 0.05); None where `heldout` is a source, or not given."""
        return _share(self.heldout)

    @field_validator("heldout")
    @classmethod
    def _heldout_share_is_between(cls, value: str | None) -> str | None:
        share = _share(value)
        if share is not None and not 0 < share < 1:
            raise ValueError("a share to hold out is more than 0% and less than 100%, such as 5%")
        return value


class LoraSection(OpenSection):
    r: int = Field(16, ge=1, le=MAX_RANK, description="Rank.")
    lora_alpha: float = Field(16.0, gt=0, description="Scale: alpha / r, or alpha / sqrt(r) with use_rslora.")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: list[str] | str = Field(default_factory=lambda: list(LLAMA_PROJECTIONS))
    use_rslora: bool = False
    loftq: bool = Field(False, description="Initialise the adapter to compensate NF4 rounding (LoftQ).")


class EarlyStoppingSection(Section):
    patience: Positive = Field(3, description="Evaluations in a row without a lower held-out loss that end training.")
    min_delta: float = Field(0.0, ge=0, description="A held-out loss is lower from this difference on.")


class TrainingSection(OpenSection):
    method: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "grpo"] = Field(
        "sft",
        description="sft: imitate the answers. dpo, ipo, orpo, simpo: prefer the chosen answer of a pair to the "
        "rejected one; kto: learn from answers that are labelled one by one; grpo: learn from rewards for sampled "
        "answers.",
    )
    rewards: list[str] = Field(
        default_factory=list,
        description="grpo: reward functions, as module:function or file.py:function. They are programs: a resumed run "
        "takes them from its command line alone.",
    )
    engine: Literal["auto", "captured", "plain"] = Field(
        "auto",
        description="auto: the fused step where it supports model and options, else on a GPU transformers' modules "
        "replayed as CUDA graphs (captured), else transformers and autograd (plain).",
    )
    memory: Literal["auto", "low"] | Annotated[float, Field(gt=0, le=1e6)] = Field(
        "auto", description="auto: the device's free memory; low: as little as possible; a number: GiB in total."
    )
    shard: Literal["auto", "none", "full"] = Field(
        "auto",
        description="With several processes. full: the weights are cut over them (FSDP2), and a layer is gathered when "
        "it is used; none: each has a whole model. auto: full where a whole model does not fit, by `parley plan`.",
    )
    context_parallel: Positive | Literal["auto"] = Field(
        "auto",
        description="Processes that split each row of tokens between them, for conversations that one GPU does not "
        "hold. The number of processes is a multiple of it. auto: 1, and where by `parley plan` the longest row does "
        "not fit so, the fewest GPUs that it fits on.",
    )
    per_device_train_batch_size: Positive = 2
    gradient_accumulation_steps: Positive = 4
    max_steps: int = Field(-1, le=MAX_COUNT, description="Optimizer steps; -1: num_train_epochs decides.")
    num_train_epochs: float = Field(1.0, gt=0)
    learning_rate: float = Field(2e-4, ge=0)
    warmup_steps: float = Field(5, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    lr_scheduler_type: str = "linear"
    optim: str = Field("auto", description="auto: 8-bit AdamW on CUDA, fused AdamW elsewhere.")
    gradient_checkpointing: bool = True
    logging_steps: float = Field(1, gt=0)
    save_steps: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="auto: a checkpoint every 50 steps, or less often where saving would take over 2% of the time.",
    )
    deterministic: bool = Field(
        False, description="The same bits from run to run on a GPU too, at some cost in speed; a CPU gives them anyway."
    )
    eval_steps: float | None = Field(
        None, gt=0, description="Held-out loss every so many steps, or this share of all steps below 1; null: never."
    )
    early_stopping: EarlyStoppingSection | None = Field(
        None, description="{patience: 3, min_delta: 0.0}: end training once held-out loss no longer falls."
    )
    keep: Literal["auto", "best", "last"] = Field(
        "auto",
        description="Weights to save at the end: of the evaluation with the lowest held-out loss, or of the last step. "
        "auto: best with early_stopping, else last.",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="A step whose loss or gradient is not finite is never applied. stop: end the run there, with exit "
        "code 1; skip: continue without it.",
    )
    nonfinite_limit: Count = Field(10, description="With nonfinite: skip, more such steps than these end the run.")
    seed: Seed = 3407

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("method", "sft") == "sft":
            return values
        return (GRPO_DEFAULTS if values["method"] == "grpo" else {"learning_rate": PREFERENCE_LEARNING_RATE}) | values

    @model_validator(mode="after")
    def _rewards_are_of_grpo(self) -> TrainingSection:
        if self.rewards and self.method != "grpo":
            raise ValueError(f"rewards are read by method: grpo, and this is method: {self.method}; leave them out")
        return self

    @property
    def trusts_rewards(self) -> bool:
        """Whether all reward functions come with Parley, so that a run's folder may name them, too."""
        return all(name.startswith(BUILT_IN_REWARDS) for name in self.rewards)

    @property
    def keeps_best(self) -> bool:
        return self.keep == "best" or (self.keep == "auto" and self.early_stopping is not None)


class GenerationSection(Section):
    max_new_tokens: Positive = 512
    temperature: float = Field(1.5, ge=0, description="0: greedy.")
    min_p: float = Field(0.1, ge=0, le=1)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Count = Field(0, description="0: all tokens.")
    repetition_penalty: float = Field(1.0, gt=0)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Strings that end an answer; they are not part of it."
    )
    seed: Seed | None = None


class ReportSection(Section):
    questions: list[str] = Field(default_factory=list, description="Questions answered before and after training.")
    from_heldout: Count = Field(4, description="Further questions taken from held-out rows.")
    during_training: Count = Field(3, description="Of these questions, how many are answered at each evaluation, too.")
    max_new_tokens: Positive = 128
    examples: Count = Field(4, description="Training rows shown with their supervised tokens marked.")


class RunConfig(Section):
    output: CheckedPath = Path("runs/parley")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    lora: LoraSection | None = Field(default_factory=LoraSection, description="null: full fine-tuning.")
    training: TrainingSection = Field(default_factory=TrainingSection)
    generation: GenerationSection = Field(default_factory=GenerationSection)
    report: ReportSection = Field(default_factory=ReportSection)

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data_by_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("training")
    @classmethod
    def _steps_are_counted(cls, value: TrainingSection) -> TrainingSection:
        if value.max_steps < 1 and value.max_steps != -1:  # transformers trains one step with 0
            raise ValueError("max_steps is at least 1, or -1 for num_train_epochs; --dry-run trains nothing")
        return value

    @model_validator(mode="after")
    def _streaming_needs_max_steps(self) -> RunConfig:
        if self.data.streaming and self.training.max_steps < 1:
            raise ValueError("data.streaming has no known length: set training.max_steps")
        return self

    @model_validator(mode="after")
    def _dropping_needs_all_rows(self) -> RunConfig:
        if self.data.drop and self.data.streaming:
            raise ValueError("data.drop reads every row before training, which data.streaming does not: leave one out")
        shared = [name for name in self.data.drop if name.startswith("heldout-")]
        if shared and not self.data.heldout and not self.data.heldout_rows:
            raise ValueError(f"data.drop has {shared[0]}, and no rows are held out: set data.heldout")
        return self

    @classmethod
    def create(cls, values: dict[str, Any] | None = None, overrides: Iterable[str] = ()) -> RunConfig:
        """Validate nested `values` with `a.b=c` overrides applied. Raises UsageError in one line."""
        values = dict(values or {})  # overrides change a copy
        for override in overrides:
            _apply_override(values, override)
        check_values(values)
        foreign = [str(key) for key in values if key not in cls.model_fields]
        if (meanings := translation(foreign)) is not None:
            raise UsageError(f"these are another program's settings; here {meanings} (docs/how-to/train.md)")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError(_first_error(error)) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
        """Read a YAML file. Raises UsageError when it is missing, broken or has unknown keys."""
        return cls.create(read_yaml(path), overrides)

    def to_yaml(self) -> str:
        """Every setting but secrets, which are written nowhere."""
        return yaml.safe_dump(without_secrets(self.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _share(text: str | None) -> float | None:
    """ "5%" as 0.05; None for what is no percentage."""
    match = _PERCENTAGE.fullmatch(text or "")
    return float(match[1]) / 100 if match else None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; UsageError when there is none."""
    path = Path(path)
    if not _is_file(path):
        raise UsageError(f"{path}: no such file; give the path of a YAML file, or --model and --data")
    values = read_yaml_file(path)
    if values is not None and not isinstance(values, dict):
        raise UsageError(f"{path}: got a {type(values).__name__}, wanted keys such as model: and data:")
    return values or {}


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(
            f"--set {shorten_middle(override, 120)!r}: wanted section.key=value, for example training.max_steps=100"
        )
    value = load_yaml(text, f"--set {shorten_middle(override, 120)!r}")
    node = values
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key)
        if isinstance(child, str) and depth == 0:  # the shorthand `model: name`
            child = {"model": {"name": child}, "data": {"source": child}}.get(key)
        if not isinstance(child, dict | None):
            raise UsageError(f"--set {override!r}: {key} is {shorten_middle(repr(child), 80)}, which has no keys")
        node[key] = dict(child or {})
        node = node[key]
    node[keys[-1]] = value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _first_error(error: ValidationError) -> str:
    (path, message), *others = _errors(error)  # one line names one fault; the count is that of the others
    if error.errors()[0]["type"] == "extra_forbidden":
        return message
    more = f" (and {len(others)} more)" if others else ""
    return f"{path}: {message}{more}" if path else f"{message}{more}"


def setting_errors(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Every error of nested `values` with the dotted path of its setting, the texts those of `RunConfig.create`.

    The path is empty where settings contradict each other. Empty for values that are valid.
    """
    try:
        check_values(values)
        RunConfig.model_validate(values)
    except ValidationError as error:
        return list(dict.fromkeys(_errors(error)))
    except UsageError as error:
        path, _, message = str(error).partition(": ")
        return [(path, message)]
    return []


def _errors(error: ValidationError) -> list[tuple[str, str]]:
    """The dotted path and the text of each error."""
    found = []
    for each in error.errors():
        path = ".".join(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            section = RunConfig
            for part in each["loc"][:-1]:
                section = _section_type(section, str(part))
            found.append((path, str(unknown_key(path, section.model_fields, "the run's settings"))))
            continue
        message = each["msg"].removeprefix("Value error, ")
        found.append((path, f"got {shorten_middle(repr(each['input']), 120)}; {message}" if path else message))
    return found


def _section_type(section: Any, name: str) -> Any:
    annotation = section.model_fields[name].annotation
    sections = [part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return sections[0] if sections else annotation  # a section that may be null
