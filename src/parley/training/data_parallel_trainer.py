"""Data parallel training over documents: every process reads the whole step and trains on its share of the documents.

Accelerate gives each process rows of its own, by count, and DistributedDataParallel averages what they make of them.
Here the documents of a whole optimizer step are dealt out by tokens (dealing.py), so that processes end together, and
losses and gradients are sums over all processes divided by the supervised tokens of all. Batches of other collators
keep accelerate's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from parley.data.packing import DOCUMENTS, Document, DocumentCollator
from parley.errors import UsageError
from parley.training.dealing import deal_documents
from parley.training.processes import copy_from_main, process_count, process_rank, sum_all_in_place
from parley.training.retrying_trainer import RetryingTrainer


class DataParallelTrainer(RetryingTrainer):
    """RetryingTrainer, whose processes share out the documents of each step and of each batch of an evaluation."""

    data_collator: Any
    context_parallel = 1  # processes that share each row (train_step/context_parallel.py), and so the same documents

    @property
    def deals_documents(self) -> bool:
        """Whether there are several processes, batches are documents, and accelerate does not shard the model."""
        by_accelerate = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return process_count() > 1 and isinstance(self.data_collator, DocumentCollator) and not by_accelerate

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step in this process; a share by tokens may have more, shorter ones."""
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return -(-rows // self.shares) if self.deals_documents else rows

    @property
    def shares(self) -> int:
        """Parts into which the documents of a step are dealt out."""
        return process_count() // self.context_parallel

    def own_share(self, documents: Sequence[Document]) -> Sequence[Document]:
        if not self.deals_documents:
            return documents
        return deal_documents(documents, self.shares)[process_rank() // self.context_parallel]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each parameter's gradient the sum over all processes."""
        sum_all_in_place([parameter.grad for parameter in parameters if parameter.grad is not None])

    # ---- Trainer's hooks ----

    def read_by_all(self, loader: DataLoader) -> DataLoader:
        """`loader`, with the batches of all processes in each: their documents are dealt out later."""
        if not self.deals_documents:
            return loader
        if isinstance(loader.dataset, IterableDataset):
            raise UsageError(
                f"streamed rows (data.streaming) are not dealt out to {process_count()} processes; leave streaming "
                "out, or train with one process"
            )
        sampler = loader.batch_sampler
        if isinstance(sampler, BatchSamplerShard):  # as transformers does with samplers that know their process
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        """Without DistributedDataParallel, whose hooks expect the same number of passes in every process."""
        model = super()._wrap_model(model, training, dataloader)
        if training and self.deals_documents:
            # It is prepared as for evaluation, with mixed precision alone; accelerate prepares a model once.
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            copy_from_main([parameter.data for parameter in trained if not isinstance(parameter, DTensor)])
        return model

    def get_total_train_batch_size(self, args: Any) -> int:
        size = super().get_total_train_batch_size(args)
        return size // process_count() if self.deals_documents else size

    def counted_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The part of a micro-batch that this process counts: Trainer adds up what the processes count."""
        if DOCUMENTS not in inputs or not self.deals_documents:
            return inputs
        return inputs | {DOCUMENTS: inputs[DOCUMENTS][process_rank() :: process_count()]}


def summed(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes."""
    total = tensor.clone()
    sum_all_in_place([total])
    return total
