"""The fused step on a GPU: Triton kernels, 4-bit weights and CUDA graphs against transformers, PEFT and autograd."""

from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from tests.gpu import models
from torch.nn import functional

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.train_step.bind import bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import MemoryPlan
from parley.train_step.slots import Slots
from parley.training.determinism import deterministic_algorithms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCABULARY = 1000


def llama(*, nf4: bool = False) -> PeftModel:
    model = models.llama(VOCABULARY, torch.bfloat16)
    return models.adapted(models.quantised(model) if nf4 else model, 0.02)


def documents(lengths: tuple[int, ...], seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = rng.integers(0, VOCABULARY, length)
        made.append(Document.from_lists(ids, np.where(rng.random(length) < 0.5, ids, IGNORE_INDEX)))
    return made


def exact_gradient(model: PeftModel, examples: list[Document]) -> tuple[float, torch.Tensor]:
    """In float32, of weights rounded to bfloat16 as the step reads them."""
    model.float()
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).bfloat16().float()
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="cuda")
            dense.weight = torch.nn.Parameter(weight, requires_grad=False)
            model.set_submodule(path, dense)
    return autograd_gradient(model, examples)


def autograd_gradient(model: PeftModel, examples: list[Document]) -> tuple[float, torch.Tensor]:
    """Through transformers, PEFT and autograd, one document at a time."""
    count = sum(example.supervised_tokens for example in examples)
    total = 0.0
    for example in examples:
        logits_LV = model(torch.tensor(example.ids_L, device="cuda").long()[None]).logits[0, :-1].float()
        target_L = torch.tensor(example.label_L[1:], device="cuda").long()
        loss = functional.cross_entropy(logits_LV, target_L, ignore_index=IGNORE_INDEX, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def fused_gradient(step: FusedStep, model: PeftModel, examples: list[Document]) -> tuple[float, torch.Tensor]:
    count = sum(example.supervised_tokens for example in examples)
    step.forward_backward(examples, count)
    step.bound.flat.expose_gradients()
    return float(step.metrics_3[0]) / count, torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize("lengths", [(3, 70, 1, 129, 64), (3500, 90, 33), (20, 2049, 3073)])
@pytest.mark.parametrize(
    "plan",
    [
        MemoryPlan(positions=4096),
        MemoryPlan(positions=4096, saved="layer_inputs", cache_matrices=False, logits_rows=50, tokens=200),
    ],
)
@pytest.mark.parametrize("nf4", [False, True])
def test_gradients(lengths: tuple[int, ...], plan: MemoryPlan, nf4: bool) -> None:
    examples, model = documents(lengths), llama(nf4=nf4)
    loss, gradient = fused_gradient(FusedStep(bind(model), plan), model, examples)
    model.zero_grad()
    wanted_loss, wanted = exact_gradient(model, examples)
    assert loss == pytest.approx(wanted_loss, rel=2e-3)
    assert float((gradient - wanted).norm() / wanted.norm()) < 0.03  # bfloat16 through three layers


def test_a_replayed_graph_reads_new_documents_weights_and_counts() -> None:
    """The same graph, replayed after everything it reads has changed, equals the eager step on a fresh model."""
    model, fresh = llama(), llama()
    graphed = FusedStep(bind(model), MemoryPlan(graph_tokens=1024, tokens=250))
    eager = FusedStep(bind(fresh), MemoryPlan())
    for seed, lengths in enumerate([(100, 20, 130), (100, 20, 130), (60, 60, 60, 60), (7, 240), (3, 3, 190)]):
        examples = documents(lengths, seed)
        results = [fused_gradient(step, m, examples) for step, m in ((graphed, model), (eager, fresh))]
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
        assert float((results[0][1] - results[1][1]).norm() / results[1][1].norm()) < 0.01
        for step in (graphed, eager):
            with torch.no_grad():
                step.bound.flat.weight_Z.add_(eager.bound.flat.grad_Z, alpha=-0.1)
    assert graphed.graphs is not None
    assert list(graphed.graphs.captured) == [256]


def test_sizes_captured_before_the_first_step_are_replayed_and_leave_the_gradient_as_it_is() -> None:
    model, fresh = llama(), llama()
    prepared, eager = (
        FusedStep(bind(model), MemoryPlan(graph_tokens=1024, tokens=1000)),
        FusedStep(bind(fresh), MemoryPlan()),
    )
    assert prepared.graphs is not None
    prepared.graphs.threshold.measure = lambda *measured: None  # type: ignore[method-assign]
    prepared.prepare_graphs(np.arange(200, 900))
    sizes = list(prepared.graphs.captured)
    assert sizes[0] == 896
    for seed, lengths in enumerate([(100, 20, 130), (400, 300), (60, 60, 60, 60)]):
        examples = documents(lengths, seed)
        results = [fused_gradient(step, m, examples) for step, m in ((prepared, model), (eager, fresh))]
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
        assert float((results[0][1] - results[1][1]).norm() / results[1][1].norm()) < 0.01
    assert list(prepared.graphs.captured) == sizes
    assert not prepared.graphs.takes(900)  # rare ones run without a graph


def test_with_deterministic_algorithms_the_passes_before_one_do_not_change_its_bits() -> None:
    """A resumed run has captured other sizes than one that was not interrupted."""
    gradients = []
    with deterministic_algorithms():
        for before in ((), ((300, 90), (100, 20, 130), (400, 500))):
            model = llama()
            step = FusedStep(bind(model), MemoryPlan(graph_tokens=1024, tokens=1000))
            step.prepare_graphs(np.arange(200, 900))
            for seed, lengths in enumerate(before):
                fused_gradient(step, model, documents(lengths, seed))
            gradients.append(fused_gradient(step, model, documents((100, 20, 130), 7))[1])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_dropout": 0.3}])
@pytest.mark.parametrize("nf4", [False, True])
def test_dora_and_dropout_are_the_same_eagerly_replayed_and_recomputed(lora: dict[str, Any], nf4: bool) -> None:
    """Masks follow from the seed, also in a replayed graph and where the backward pass computes them again."""
    gradients, examples = [], documents((100, 20, 130))
    for plan in (
        MemoryPlan(),
        MemoryPlan(graph_tokens=1024, tokens=1000),
        MemoryPlan(saved="layer_inputs", cache_matrices=False, mlp_rows=64),
    ):
        model = models.llama(VOCABULARY, torch.bfloat16)
        model = models.adapted(models.quantised(model) if nf4 else model, 0.02, **lora)
        step = FusedStep(bind(model), plan)
        step.compile()
        for _ in range(4):
            torch.manual_seed(3)
            loss, gradient = fused_gradient(step, model, examples)
        gradients.append(gradient)
    for gradient in gradients[1:]:
        assert float((gradient - gradients[0]).norm() / gradients[0].norm()) < 0.02
    torch.manual_seed(4)
    _, other = fused_gradient(step, model, examples)
    same = float((other - gradients[0]).norm() / gradients[0].norm()) < 0.02
    assert same == ("use_dora" in lora)
    if "use_dora" in lora:
        model.zero_grad()
        wanted_loss, wanted = exact_gradient(model, examples)
        assert loss == pytest.approx(wanted_loss, rel=2e-3)
        assert float((gradients[0] - wanted).norm() / wanted.norm()) < 0.03


def test_compiling_ahead_launches_nothing_and_leaves_the_gradient_as_it_is() -> None:
    """The dry passes share the buffers, matrices and graphs of the real ones."""
    examples = documents((100, 20, 130))
    for plan in (
        MemoryPlan(graph_tokens=1024, tokens=250),
        MemoryPlan(saved="layer_inputs", cache_matrices=False, mlp_rows=64),
    ):
        results = []
        for ahead in (False, True):
            model = llama()
            step = FusedStep(bind(model), plan)
            if ahead:
                step.compile()
                assert not step.bound.flat.grad_Z.any()
                assert not step.metrics_3.any()
            results.append([fused_gradient(step, model, examples) for _ in range(2)][-1])
        assert results[0][0] == results[1][0]
        assert torch.equal(results[0][1], results[1][1])


def test_every_kernel_of_a_pass_is_compiled_ahead() -> None:
    triton = pytest.importorskip("triton")
    from parley.train_step.kernels import attention, nf4, pointwise
    from parley.train_step.kernels import cross_entropy as loss
    from parley.train_step.kernels import lora as adapters
    from parley.train_step.kernels import precompile as compiling
    from parley.train_step.kernels import rms_norm as norm

    for module in (adapters, attention, loss, nf4, norm, pointwise):
        for kernel in vars(module).values():
            if isinstance(kernel, compiling.Kernel):
                kernel.function.device_caches.clear()
    step = FusedStep(bind(llama()), MemoryPlan(graph_tokens=1024, tokens=1000))
    step.compile()
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["fn"].name)
    try:
        for lengths in ((100, 20, 130), (3, 7), (999,)):
            examples = documents(lengths)
            step.forward_backward(examples, 100)
            step.forward_only(examples)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert compiled == []


def test_sums_by_the_forward_half_of_a_graph_are_those_of_the_eager_pass() -> None:
    """As a preference loss measures its reference, between two steps whose weights differ."""
    model, fresh = llama(), llama()
    graphed = FusedStep(bind(model), MemoryPlan(graph_tokens=1024, tokens=1000))
    eager = FusedStep(bind(fresh), MemoryPlan())
    assert graphed.graphs is not None
    graphed.graphs.threshold.measure = lambda *measured: None  # type: ignore[method-assign]
    graphed.prepare_graphs(np.arange(200, 900))
    for seed, lengths in enumerate([(100, 20, 130), (400, 300)]):
        examples = documents(lengths, seed)
        slots = Slots([np.full(d.supervised_tokens, i, dtype=np.int64) for i, d in enumerate(examples)], len(examples))
        assert graphed.graphs.forward(graphed._pack(examples)) is not None
        wanted = eager.forward_sums(examples, slots)
        torch.testing.assert_close(graphed.forward_sums(examples, slots), wanted, rtol=1e-2, atol=1e-2)
        for step in (graphed, eager):
            with torch.no_grad():
                step.bound.flat.weight_Z.add_(0.01)
