"""The jobs that trainers are timed with.

demo      the embedded model on its own data: needs no GPU and no download
seed      1B, NF4, 2 x 4 conversations per step, at most 2,048 tokens each (the course's job as a user runs it)
tuned     the same conversations, 8 x 1, no checkpointing: the fastest setting of the peers on a large card
long      1B, NF4, one conversation of 32,768 tokens per step
8b        8B, NF4, 2 conversations of 4,096 tokens per step
8b-short  8B, NF4, 8 x 1 short conversations
mix       3B, NF4, LoRA r = 64, 4 x 4 conversations of uneven length, at most 4,096 tokens each; steps 10 to 150
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parley.config import DEMO_DATA, DEMO_MODEL, RunConfig
from parley.errors import UsageError

MODEL_1B = "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"
MODEL_3B = "unsloth/Llama-3.2-3B-Instruct-bnb-4bit"
MODEL_8B = "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"
DATA = "Peyton3995/dolly-15k-mistral-pirate"
MIX = "tatsu-lab/alpaca"
ROWS = 4000


@dataclass(frozen=True)
class Job:
    """One job.

    `skip`: warm-up steps that the median excludes. `length`: tokens per conversation, None for the data's own.
    `rank`: of LoRA, which is alpha, too.
    """

    name: str
    model: str
    data: str = DATA
    quantization: str = "nf4"
    batch: int = 2
    accumulate: int = 1
    max_length: int = 2048
    checkpoint: bool = True
    steps: int = 60
    skip: int = 15
    length: int | None = None
    rank: int = 16
    system: str | None = "You are an assistant"

    @property
    def needs_gpu(self) -> bool:
        return self.quantization == "nf4"

    def config(
        self, model: str | None, data: str | None, steps: int | None, overrides: Iterable[str] = ()
    ) -> RunConfig:
        """The run's settings; `model`, `data`, `steps` and `section.key=value` overrides replace the job's."""
        training: dict[str, Any] = {
            "max_steps": steps or self.steps,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_checkpointing": self.checkpoint,
            # Checkpoints would be timed as steps.
            "save_strategy": "no",
        }
        return RunConfig.create(
            {
                "model": {
                    "name": model or self.model,
                    "quantization": self.quantization,
                    "max_seq_length": self.max_length,
                },
                "data": {"source": data or self.data, "system": self.system, "limit": ROWS, "heldout_rows": 0},
                "training": training,
                "lora": {"r": self.rank, "lora_alpha": self.rank},
            },
            overrides,
        )


JOBS = {
    job.name: job
    for job in (
        Job("demo", DEMO_MODEL, DEMO_DATA, "auto", accumulate=4, checkpoint=False, system=None),
        Job("seed", MODEL_1B, accumulate=4),
        Job("tuned", MODEL_1B, batch=8, checkpoint=False),
        Job("long", MODEL_1B, batch=1, max_length=32768, steps=8, skip=3, length=32768),
        Job("8b", MODEL_8B, max_length=4096, steps=10, skip=4, length=4096),
        Job("8b-short", MODEL_8B, batch=8, steps=30, skip=10),
        Job("mix", MODEL_3B, MIX, batch=4, accumulate=4, max_length=4096, steps=150, skip=10, rank=64, system=None),
    )
}


def find_job(name: str) -> Job:
    """Raises UsageError for an unknown name."""
    if name not in JOBS:
        raise UsageError(f"unknown job {name!r}; there are {', '.join(JOBS)}")
    return JOBS[name]
