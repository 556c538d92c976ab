"""A model cut over ranks: the gradient of one process, and bytes that no gather changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from tests.distributed.conftest import in_processes, rank

from parley.config import LoraSection, ModelSection
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.models.adapters import attach_lora
from parley.models.load import load_model
from parley.models.load_sharded import load_sharded
from parley.models.sharded_nf4 import PACKED_BYTES, SCALE_BYTES, ShardedNf4Linear, local_tensor
from parley.models.sharding import is_sharded
from parley.train_step.captured_step import CapturedStep
from parley.training.dealing import deal_documents
from parley.training.processes import joined_processes, process_count, sum_all_in_place

PASS_TOKENS = 40


def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    made = []
    for length in (31, 9, 17, 25, 12):
        ids_L = rng.integers(5, 60, length)
        made.append(Document.from_lists(ids_L, np.where(np.arange(length) > length // 2, ids_L, IGNORE_INDEX)))
    return made


def gradient(model: Any, share: list[Document], *, passes: int, checkpointing: bool) -> tuple[torch.Tensor, ...]:
    """The gradient of LoRA weights (or of all where there is no adapter) and the figures, summed over ranks."""
    model = attach_lora(model, LoraSection(), seed=1).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    step = CapturedStep(model, tokens=PASS_TOKENS)
    step.forward_backward(share, sum(document.supervised_tokens for document in documents()), passes)
    sum_all_in_place([*step.gradients, step.metrics_3])
    trained_3 = step.metrics_3.clone()
    evaluated_3 = step.forward_only(share, passes)
    sum_all_in_place([evaluated_3])
    return torch.cat([gradient.flatten() for gradient in step.gradients]), trained_3, evaluated_3


def in_ranks(count: int, work: Callable[[], Any], path: Path) -> Any:
    """What `work` returns in rank 0 of `count` joined processes."""

    def joined() -> None:
        with joined_processes():
            result = work()
        if rank() == 0:
            torch.save(result, path)

    assert in_processes(count, joined) == [0] * count
    return torch.load(path)


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {"quantization": "nf4"}),
        (3, {"quantization": "nf4", "double_quantization": False}),
        (4, {"quantization": "none"}),
    ],
    ids=["nf4", "nf4, single quantisation", "fp32"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
def test_the_gradient_of_ranks_is_that_of_one_process(
    tiny_llama_folder: Path, tmp_path: Path, count: int, settings: dict[str, Any], checkpointing: bool
) -> None:
    section = ModelSection(name=str(tiny_llama_folder), device="cpu", max_seq_length=64, **settings)

    def work() -> tuple[torch.Tensor, ...]:
        model, _ = load_sharded(section)
        assert is_sharded(model)
        share = deal_documents(documents(), process_count())[rank()]
        return gradient(model, share, passes=4, checkpointing=checkpointing)

    ours = in_ranks(count, work, tmp_path / "result.pt")
    theirs = gradient(load_model(section)[0], documents(), passes=0, checkpointing=checkpointing)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def as_bytes(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part; NaN is not equal to itself, and bytes are."""
    return local_tensor(parameter).contiguous().view(torch.uint8)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_bytes_are_those_of_bitsandbytes_after_every_gather(
    tiny_llama_folder: Path, tmp_path: Path, double: bool
) -> None:
    section = ModelSection(
        name=str(tiny_llama_folder), device="cpu", max_seq_length=64, quantization="nf4", double_quantization=double
    )

    def work() -> dict[str, Any]:
        model, _ = load_sharded(section)
        shards = {name: as_bytes(parameter).clone() for name, parameter in model.named_parameters()}
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ShardedNf4Linear)}
        gathered: dict[str, list[Any]] = {name: [] for name in layers}
        for name, layer in layers.items():  # as its forward pass sees them
            layer.register_forward_hook(
                lambda layer, *_, seen=gathered[name]: seen.append(
                    copy.deepcopy((layer.weight.detach(), layer.quant_state().as_dict(packed=False)))
                )
            )
        x_1TD = torch.linspace(-1, 1, 25 * 64).view(1, 25, 64).requires_grad_()
        for _ in range(2):
            model(inputs_embeds=x_1TD).logits.sum().backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(as_bytes(parameter), shards[name]), name
        return gathered

    # FSDP copies parameters of one type as numbers of it, and those of several types as bytes.
    assert PACKED_BYTES != SCALE_BYTES
    gathered = in_ranks(2, work, tmp_path / "result.pt")
    whole, _ = load_model(section)
    layers = {n: layer for n, layer in whole.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    assert set(layers) == set(gathered)
    for name, layer in layers.items():
        state = layer.weight.quant_state.as_dict(packed=False)
        for packed, ours in gathered[name]:
            assert torch.equal(packed.flatten(), layer.weight.data.flatten()), name
            for key in (
                "absmax",
                "quant_map",
                *(("nested_absmax", "nested_quant_map", "nested_offset") if double else ()),
            ):
                assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(state[key])), (name, key)
