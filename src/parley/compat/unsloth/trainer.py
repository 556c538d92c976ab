"""`UnslothTrainer` and its arguments, and patch functions of Unsloth that do nothing here."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from parley.training.sft_config import SFTConfig
from parley.training.trainer import SFTTrainer

logger = logging.getLogger(__name__)

EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass
class UnslothTrainingArguments(SFTConfig):
    """SFTConfig with a learning rate of its own for embeddings and output head, where these are trained."""

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of trained embeddings and output head; None: learning_rate."}
    )


class UnslothTrainer(SFTTrainer):
    """SFTTrainer that follows `embedding_learning_rate`."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """With an `embedding_learning_rate`, on the plain path: one group of parameters for each learning rate."""
        rate = vars(self.args).get("embedding_learning_rate")
        if rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        embeddings = [p for name, p in trained if any(part in name for part in EMBEDDINGS)]
        if not embeddings:
            logger.warning("embedding_learning_rate: neither embeddings nor output head are trained; it has no effect")
            return super().create_optimizer(model)
        others = [p for name, p in trained if not any(part in name for part in EMBEDDINGS)]
        # The fused step has one flat parameter and so one learning rate.
        self.plain_because = self.plain_because or "a learning rate of its own for embeddings"
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups: list[dict[str, Any]] = [{"params": others}, {"params": embeddings, "lr": rate}]
        self.optimizer = optimizer_class(groups, weight_decay=self.args.weight_decay, **settings)
        return self.optimizer


def PatchDPOTrainer() -> None:
    """Nothing to do: `parley.DPOTrainer` and TRL's take the models of `from_pretrained` as they are."""
    logger.warning("PatchDPOTrainer: nothing is patched here; import DPOTrainer and DPOConfig from parley")


def PatchFastRL(algorithm: str | None = None, FastLanguageModel: Any = None) -> None:
    """Nothing to do: `parley.GRPOTrainer` samples answers from the model that it trains."""
    logger.warning("PatchFastRL: nothing is patched here; import GRPOTrainer and GRPOConfig from parley")


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`trainer.train()`."""
    return trainer.train(*args, **kwargs)
