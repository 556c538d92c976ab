"""What a run of a configuration decides before it loads weights: its path, its passes, and what they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from parley.config import LoraSection, RunConfig
from parley.errors import ModelError
from parley.models.adapter_files import read_adapter_fields
from parley.models.device import DTYPES, pick_dtype
from parley.models.load import load_config
from parley.models.resolve import adapter_chain, model_folder
from parley.train_step.bind import Unsupported, bind
from parley.train_step.captured_step import check_captured
from parley.training.arguments import sft_config
from parley.training.captured_trainer import unsupported_captured_option
from parley.training.fused_trainer import unsupported_option
from parley.training.optimizer_memory import state_bytes
from parley.training.plan.cached_model import cached_meta_model
from parley.training.plan.device import PlanDevice
from parley.training.plan.memory import (
    Batches,
    MemoryEstimate,
    base_and_trained_bytes,
    captured_estimate,
    fused_estimate,
    joint_estimate,
    plain_estimate,
)
from parley.training.plan.several_gpus import LinkCost, link_cost, share_of
from parley.training.plan.step_time import describe_basis, earlier_rate, model_work, step_seconds
from parley.training.prepare_training import planned_steps

# What transformers' code raises on fake tensors in families whose course depends on values.
UNCOUNTED = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError)
GPU_OPTIMIZER, CPU_OPTIMIZER = "adamw_8bit", "adamw_torch_fused"  # of optim: auto, as in arguments.sft_config
TOKENIZER_BYTES = 20 * 2**20  # beside the weights in each folder; 17 MB for a vocabulary of 128,256


@dataclass(frozen=True)
class Data:
    """Tokens of the rows: of each, or of the longest alone for a stream, whose `rows` are unknown."""

    length_N: np.ndarray
    rows: int | None


class Planner:
    """A configuration with its model on the meta device, and what the run would decide from them."""

    def __init__(self, config: RunConfig, data: Data, device: PlanDevice) -> None:
        self.config, self.data, self.device = config, data, device
        wanted = config.training.context_parallel
        self.ranks = 1 if wanted == "auto" else wanted  # `context_ranks` comes first where it matters
        self.notes: list[str] = []
        lora = _started_adapter(config)
        training = config.training.model_copy()
        if training.optim == "auto":
            training.optim = GPU_OPTIMIZER if device.type == "cuda" else CPU_OPTIMIZER
        values = config.model_copy(update={"training": training})
        # Arguments are checked as for a CPU: those for a GPU cannot be made where there is none.
        self.args, _ = sft_config(values, config.output / "checkpoints", torch.device("cpu"))
        self.dtype = self._weight_dtype()
        self.state_bytes = state_bytes(self.args.optim, 4 if config.lora is not None else self.dtype.itemsize)
        self.model_config = load_config(config.model)
        self.model = cached_meta_model(self.model_config, config.model, self.dtype, lora)
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.work = model_work(self.model, self.model_config)
        self.parameters = self.work.matrix_weights + self._vocabulary_weights()
        self.whole_step = Batches(
            data.length_N,
            config.training.per_device_train_batch_size,
            config.training.gradient_accumulation_steps,
            config.model.max_seq_length,
        )
        self.batches = share_of(self.whole_step, device.count, self.ranks)
        self.bound, self.not_fused_because = self._bind()

    def _weight_dtype(self) -> torch.dtype:
        name = self.config.model.dtype
        if self.config.lora is None and name == "auto":
            return torch.float32
        if name != "auto":
            return DTYPES[name]
        if self.device.type == "cpu":
            return pick_dtype("auto", torch.device("cpu"))
        return torch.bfloat16 if self.device.bf16 else torch.float16

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of autocast, as arguments.precision decides."""
        fields = self.config.training.model_dump()
        if fields.get("fp16"):
            return torch.float16
        if "bf16" in fields:
            return torch.bfloat16 if fields["bf16"] else None
        if self.device.type == "cpu":
            return None
        return torch.bfloat16 if self.device.bf16 else torch.float16

    def _vocabulary_weights(self) -> int:
        matrices = {id(m.weight): m.weight.numel() for m in self._ends() if m is not None}
        return sum(matrices.values())

    def _ends(self) -> tuple[Any, Any]:
        return self.model.get_input_embeddings(), self.model.get_output_embeddings()

    def _bind(self) -> tuple[Any, str | None]:
        if self.config.training.engine != "auto":
            return None, f"engine: {self.config.training.engine}"
        if self.ranks > 1:
            return None, f"rows are split over {self.ranks} GPUs"
        if (reason := unsupported_option(self.args)) is not None:
            return None, reason
        try:
            bound = bind(self.model, self.device.type)
        except Unsupported as reason:
            return None, str(reason)
        if self.compute_dtype == torch.float16:
            return None, "fp16"
        if self.compute_dtype == torch.bfloat16 and bound.dtype != torch.bfloat16:
            return None, f"{bound.dtype} weights trained in bfloat16"
        return bound, None

    def estimates(self) -> list[MemoryEstimate]:
        """The path that the run takes, then the others that it could take, with whole weights and with sharded ones."""
        taken = self.taken()
        others: list[MemoryEstimate] = []
        if not self._must_shard:
            others += [self._joint(1)] if self.ranks > 1 else self._paths()
        if self._may_shard:
            others.append(self._joint(self.device.count))
        return [taken, *(estimate for estimate in others if estimate != taken)]

    def taken(self) -> MemoryEstimate:
        """The path that the run takes. With shard: auto, weights are sharded where only that fits."""
        if self._must_shard:
            return self._joint(self.device.count)
        whole = self._taken_whole()
        if whole.fits(self.device) or not self._may_shard:
            return whole
        sharded = self._joint(self.device.count)
        return sharded if sharded.fits(self.device) else whole

    @property
    def _may_shard(self) -> bool:
        return self.device.count > 1 and self.config.training.shard != "none"

    @property
    def _must_shard(self) -> bool:
        return self._may_shard and self.config.training.shard == "full"

    def _taken_whole(self) -> MemoryEstimate:
        """The path that the run takes with whole weights on each GPU."""
        if self.ranks > 1:
            return self._joint(1)
        if self.bound is not None:
            return self._fused(self.config.training.memory)
        estimate = next(iter(self._captured()), None) or self._plain()
        assert estimate is not None, "a plan without any path is an error"
        return estimate

    def _paths(self) -> list[MemoryEstimate]:
        """Every path with whole weights."""
        choices = dict.fromkeys((self.config.training.memory, "auto", "low"))
        fast = [self._fused(choice) for choice in choices] if self.bound is not None else self._captured()
        plain = self._plain()
        return fast if plain is None else [*fast, plain]

    def _joint(self, parts_of_weights: int) -> MemoryEstimate:
        checkpointing = bool(self.config.training.gradient_checkpointing)
        try:
            return joint_estimate(
                self.model, self.batches, self.state_bytes, self.compute_dtype, checkpointing, self.device,
                parts_of_weights,
            )  # fmt: skip
        except UNCOUNTED as error:
            raise ModelError(
                f"{self.config.model.name}: its memory on several GPUs cannot be planned ({type(error).__name__})"
            ) from None

    def _fused(self, memory: Any) -> MemoryEstimate:
        return fused_estimate(self.model, self.bound, memory, self.batches, self.state_bytes, self.device)

    def _captured(self) -> list[MemoryEstimate]:
        """The captured path's, where a run that has no fused step would take it."""
        engine = self.config.training.engine
        if engine == "plain" or (engine == "auto" and self.device.type != "cuda"):
            return []
        if unsupported_captured_option(self.args) is not None or self.compute_dtype == torch.float16:
            return []
        try:
            check_captured(self.model, self.batches.max_length)
        except Unsupported:
            return []
        try:
            return [captured_estimate(self.model, self.batches, self.state_bytes, self.compute_dtype, self.device)]
        except UNCOUNTED as error:
            self.notes.append(f"the captured path could not be counted for this model ({type(error).__name__})")
            return []

    def _plain(self) -> MemoryEstimate | None:
        checkpointing = bool(self.config.training.gradient_checkpointing)
        try:
            return plain_estimate(
                self.model, self.batches, self.state_bytes, self.compute_dtype, checkpointing, self.device
            )
        except UNCOUNTED as error:
            kind = type(error).__name__
            if self.bound is None:
                raise ModelError(
                    f"{self.config.model.name}: its memory cannot be planned ({kind}); --dry-run shows data and steps"
                ) from None
            self.notes.append(f"the plain path could not be counted for this model ({kind})")
            return None

    @property
    def steps(self) -> int:
        training = self.config.training
        return training.max_steps if self.data.rows is None else planned_steps(training, self.data.rows)

    @property
    def tokens(self) -> int:
        """Of the whole run: rows times their mean length; for a stream, at most."""
        return int(self.steps * self.whole_step.rows_per_step * float(self.data.length_N.mean()))

    def time(self, taken: MemoryEstimate) -> tuple[float, str]:
        """Seconds of training, and where they come from."""
        rate = earlier_rate(self.config, self.device.name) if self.device.count == 1 else None
        basis = describe_basis(rate, self.device.name)
        if rate is not None:
            return self.tokens / rate[0], basis
        rows = -(-self.whole_step.rows_per_step * self.ranks // self.device.count)
        one = step_seconds(
            self.work, self.data.length_N, rows, taken.path, taken.passes, taken.recompute, self.device.name
        )
        link = self.link(taken)
        # Attention of a part of a row still reads the keys of all of it.
        one = one / self.ranks + (link.seconds_a_step if link is not None else 0.0)
        return self.steps * one, basis

    def link(self, taken: MemoryEstimate) -> LinkCost | None:
        """What several GPUs send each other in a step."""
        if self.device.count == 1:
            return None
        sharded = taken.memory == "sharded"
        reduce_scatter = 0 if self.config.lora is not None else 0.5
        gathers = taken.passes * (2 + reduce_scatter)  # of the weights, in the forward and in the backward pass
        kv = self.model_config.get_text_config().to_dict()
        heads = kv.get("num_key_value_heads") or kv.get("num_attention_heads") or 1
        size = kv.get("head_dim") or kv["hidden_size"] // kv["num_attention_heads"]
        tokens = float(self.data.length_N.mean()) * self.batches.rows_per_step
        ranks = self.ranks
        split = (ranks - 1) / ranks * tokens * 2 * heads * size * 2 * self.work.layers  # keys and values in 16 bits
        return link_cost(
            self.device.name,
            self.device.count,
            gradient_bytes=0 if sharded and self.config.lora is None else 4 * self.trained,
            gathered_bytes=int(gathers * base_and_trained_bytes(self.model)) if sharded else 0,
            context_bytes=int(split * (2 + taken.recompute)),
        )

    def disk(self) -> dict[str, int]:
        """What the run writes, and the weights that it reads."""
        full = self.config.lora is None
        weights = (self.parameters * self.dtype.itemsize if full else self.trained * 4) + TOKENIZER_BYTES
        checkpoint = weights + int(self.trained * self.state_bytes)
        saved = 0 if self.args.save_strategy == "no" else int(self.steps // max(self.args.save_steps, 1)) + 1
        # One more than are kept: a new checkpoint is whole before the oldest is removed.
        kept = min(saved, (self.args.save_total_limit or saved) + 1)
        read = weight_file_bytes(self.config)
        found = {"trained weights": weights, "checkpoints": kept * checkpoint}
        return found if read is None else {"weights of the base model, read": read, **found}


def weight_file_bytes(config: RunConfig) -> int | None:
    """Bytes of the base model's safetensors files; None where they are not here.

    Raises ModelError for a file whose header is damaged.
    """
    _, base = adapter_chain(config.model)
    folder = model_folder(base, weights=False)
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError):
            raise ModelError(f"{base.name}: {path.name} is damaged; download it again") from None
        total += path.stat().st_size
    return total or None


def _started_adapter(config: RunConfig) -> LoraSection | None:
    """The adapter that training begins with: a new one, or the ranks and modules of the one that it continues."""
    adapters, _ = adapter_chain(config.model)
    if config.lora is None or not adapters or config.model.adapter in ("merge", "new"):
        return config.lora
    fields = read_adapter_fields(model_folder(adapters[-1]))
    return config.lora.model_copy(
        update={"r": fields.r, "target_modules": fields.target_modules, "lora_alpha": fields.lora_alpha}
    )
