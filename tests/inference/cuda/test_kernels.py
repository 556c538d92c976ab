"""The decoder's Triton kernels against plain PyTorch, at odd sizes: on a GPU as they are, elsewhere interpreted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from parley.config import GenerationSection
from parley.inference.cpu.runner import EagerRunner
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.interface import DecodeRequest
from parley.inference.linear import DecodeLinear
from parley.inference.sampling import SamplingFeatures, advance, sample
from parley.inference.slot_state import NUM_SAMPLED, RunningRequest, SlotState
from parley.inference.step_runner import InFlightSteps, StepOutputs
from parley.train_step import reference_ops as reference
from parley.train_step.fused_linear import DenseWeight, FusedLinear
from parley.train_step.nf4 import Nf4Weight
from parley.train_step.ops import Adapter, AttentionShape, QkNorm, RopeTable

triton = pytest.importorskip("triton", reason="no Triton here")
attention = pytest.importorskip("parley.inference.cuda.kernels.decode_attention")
sampling_kernels = pytest.importorskip("parley.inference.cuda.kernels.sampling")
kernels = pytest.importorskip("parley.inference.cuda.kernels.gemv")
graphs = pytest.importorskip("parley.inference.cuda.graphs")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not triton.knobs.runtime.interpret, reason="features a GPU or TRITON_INTERPRET=1"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def projections(sizes: tuple[int, ...], columns: int, rank: int, *, packed: bool, bias: bool = False) -> DecodeLinear:
    """Projections side by side, every other one adapted where `rank` says so."""
    bases: list[Any] = []
    adapters: list[Adapter | None] = []
    for i, size in enumerate(sizes):
        weight = draw(size, columns, seed=i) / columns**0.5
        bases.append(rounded(packed_weight(weight)) if packed else DenseWeight(weight))
        adapter = Adapter(draw(rank, columns, seed=10 + i), draw(size, rank, seed=20 + i), weight[0], weight[0], 0.3)
        adapters.append(adapter if rank and i % 2 == 0 else None)
    fused = FusedLinear(bases, adapters, draw(sum(sizes), seed=30) if bias else None)
    return DecodeLinear(fused, reference, torch.float32, DEVICE)


def packed_weight(weight: torch.Tensor) -> Nf4Weight:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return Nf4Weight(made.to("cuda") if DEVICE.type == "cuda" else made._quantize("cpu"))


def rounded(weight: Nf4Weight) -> Nf4Weight:
    """With the 16 values in fp16, as the kernels take them."""
    state = weight.weight.quant_state
    state.code = state.code.half().float()
    return weight


def adapting(rows: int, ranks: int) -> Any:
    tuned = torch.tensor([1.0, 0.0, 1.0, 1.0], device=DEVICE)[:rows]
    ready = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return kernels.LoraScratch(torch.full((rows * max(ranks, 1),), torch.nan, device=DEVICE), ready, tuned)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("sizes", "columns", "rank"), [((21, 9, 9), 192, 5), ((10, 7, 7), 64, 0), ((19,), 1280, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_product(rows: int, sizes: tuple[int, ...], columns: int, rank: int, packed: bool) -> None:
    of = projections(sizes, columns, rank, packed=packed, bias=len(sizes) == 3)
    of_rows = kernels.GemvLinear(of)
    x, norm = draw(rows, columns, seed=40), kernels.RmsNorm(1 + draw(columns, seed=41) / 10, 1e-5)
    given = adapting(rows, of_rows.ranks)
    of.fuse()
    normed = functional.rms_norm(x, (columns,), norm.weight_D, norm.eps)
    wanted = of(normed, given.adapter_B[:, None])
    out = torch.full_like(wanted, torch.nan)
    kernels.gemv(of_rows, x, out, given, norm, add=False)
    assert off(out, wanted) < 1e-5
    given.ready_1.zero_()
    total = draw(*wanted.shape, seed=42)
    wanted = total.clone()
    of.add_to(wanted, x, given.adapter_B[:, None])
    kernels.gemv(of_rows, x, total, given, add=True)
    assert off(total, wanted) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("size", "columns", "rank"), [(21, 192, 5), (24, 64, 0)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("one_matrix", [False, True])
def test_gated(rows: int, size: int, columns: int, rank: int, packed: bool, one_matrix: bool) -> None:
    of = projections((2 * size,) if one_matrix else (size, size), columns, rank, packed=packed)
    assert kernels.GemvLinear.supports_gate_up(of)
    of_rows = kernels.GemvLinear.of_gate_up(of)
    x, norm = draw(rows, columns, seed=40), kernels.RmsNorm(1 + draw(columns, seed=41) / 10, 1e-5)
    given = adapting(rows, of_rows.ranks)
    of.fuse()
    both = of(functional.rms_norm(x, (columns,), norm.weight_D, norm.eps), given.adapter_B[:, None])
    wanted = torch.empty(rows, size, device=DEVICE)
    reference.glu(both, wanted, "silu")
    out = torch.full_like(wanted, torch.nan)
    kernels.gemv_swiglu(of_rows, x, out, given, norm)
    assert off(out, wanted) < 1e-5


def test_gate_and_up_with_a_bias_or_a_shared_scale_are_not_computed_here() -> None:
    assert not kernels.GemvLinear.supports_gate_up(projections((8, 8), 64, 2, packed=False, bias=True))
    assert not kernels.GemvLinear.supports_gate_up(projections((6,), 24, 2, packed=True))
    assert kernels.GemvLinear.supports_gate_up(projections((6,), 24, 2, packed=False))


def test_nf4_products_equal_bitsandbytes_own() -> None:
    """Its kernel for one row, the plain reference of ours; it takes the 16 values in fp32."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = FusedLinear([packed_weight(draw(48, 256, seed=0) / 16)], [None])
    of = DecodeLinear(linear, reference, torch.float32, DEVICE)
    x, out = draw(1, 256, seed=1), torch.empty(1, 48, device=DEVICE)
    kernels.gemv(kernels.GemvLinear(of), x, out, None, add=False)
    weight: Any = of.linear.bases[0]
    wanted = bitsandbytes.matmul_4bit(x, weight.weight.data.t(), weight.weight.quant_state)
    assert off(out, wanted) < 2**-12  # what rounding to fp16 changes of a value at most


@pytest.mark.parametrize("positions", [(70,), (5, 130, 0)])
@pytest.mark.parametrize(("heads", "kv_heads", "window", "norms"), [(6, 2, None, False), (4, 4, 9, True)])
def test_attention(positions: tuple[int, ...], heads: int, kv_heads: int, window: int | None, norms: bool) -> None:
    size, rows, length = 16, len(positions), 160
    shape = AttentionShape(heads, kv_heads, size, size**-0.5, window)
    qkv = draw(rows, shape.columns, seed=0)
    cache = draw(rows, 2, kv_heads, length, size, seed=1)
    rope = RopeTable(draw(length, size // 2, seed=2), draw(length, size // 2, seed=3))
    qk_norm = QkNorm(1 + draw(size, seed=4) / 10, 1 + draw(size, seed=5) / 10, 1e-5) if norms else None
    fields = torch.zeros(rows, 7, dtype=torch.int32, device=DEVICE)
    fields[:, 3] = torch.tensor(positions, device=DEVICE)
    buffers = attention.SplitBuffers.allocate(rows, shape, DEVICE, programs=16)
    got_cache, got = cache.clone(), torch.full((rows, heads * size), torch.nan, device=DEVICE)
    for _ in range(2):  # the counters are left as they were found
        got_cache.copy_(cache)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # the cache is read before the launch ahead has ended
        attention.decode_attention(qkv, got_cache, got, fields[:, 3], rope, shape, qk_norm, buffers)
    wanted_cache, wanted = plain_attention(qkv, cache, positions, rope, shape, qk_norm)
    assert off(got_cache, wanted_cache) < 1e-6
    assert off(got, wanted) < 1e-5


def plain_attention(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    positions: tuple[int, ...],
    rope: RopeTable,
    shape: AttentionShape,
    norms: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, with whole heads."""
    cache, outs = cache.clone(), []
    for row, position in enumerate(positions):
        q, k, v = (part[0] for part in shape.split_qkv(qkv[row : row + 1]))
        if norms is not None:
            q, k = (functional.rms_norm(x, (shape.head_dim,), w, norms.eps) for x, w in ((q, norms.q), (k, norms.k)))
        c, s = (table[position].repeat(2) for table in (rope.cos_LE, rope.sin_LE))
        q, k = (x * c + torch.cat([-x[:, shape.head_dim // 2 :], x[:, : shape.head_dim // 2]], 1) * s for x in (q, k))
        cache[row, 0, :, position], cache[row, 1, :, position] = k, v
        first = 0 if shape.window is None else max(position - shape.window + 1, 0)
        seen = cache[row, :, :, first : position + 1].repeat_interleave(shape.heads // shape.kv_heads, 1)
        keys, values = seen
        scores = torch.einsum("he,hle->hl", q, keys) * shape.scale
        outs.append(torch.einsum("hl,hle->he", scores.softmax(-1), values).flatten())
    return cache, torch.stack(outs)


@pytest.mark.parametrize("vocabulary", [131, 2500])
def test_drawing(vocabulary: int) -> None:
    """Greedy and drawn rows side by side, with min_p and penalties, over several steps; dead rows stay."""
    settings = [
        GenerationSection(temperature=0),
        GenerationSection(temperature=0, repetition_penalty=1.7),
        GenerationSection(temperature=1.3, min_p=0),
        GenerationSection(temperature=0.8, min_p=0.2, repetition_penalty=1.3),
        GenerationSection(temperature=1.0, min_p=0.05, max_new_tokens=2),
    ]
    asked = [DecodeRequest([1, 2, 3], one, frozenset({4}), seed) for seed, one in enumerate(settings)]
    features = SamplingFeatures.of(asked)
    states = []
    for device in (DEVICE, torch.device("cpu")):
        state = SlotState.zeros(len(asked) + 1, vocabulary, 3, device)
        state.admit(0, asked, 50)
        states.append(state)
    for step in range(7):
        logits = 2 * draw(len(asked) + 1, vocabulary, seed=step)
        sampling_kernels.sample_and_advance(logits, states[0])
        advance(sample(logits.cpu(), states[1], features), states[1], features)
        assert torch.equal(states[0].fields_BX[:5].cpu(), states[1].fields_BX[:5])
        assert torch.equal(states[0].token_BU[:5].cpu(), states[1].token_BU[:5])
    assert states[0].ints(NUM_SAMPLED).tolist()[:5] == [7, 7, 7, 7, 2]


class Interpreted(EagerRunner):
    """A runner whose steps are those that graphs capture, run at once."""

    def __init__(self, decoder: StaticCacheDecoder) -> None:
        super().__init__(decoder.model, decoder.cache, decoder.state)
        self.step = graphs.DecodeStep(decoder.model, decoder.cache, decoder.state, programs=4)

    def launch(self, running: list[RunningRequest], steps: int) -> InFlightSteps:
        features = SamplingFeatures.of(each.request for each in running)
        for _ in range(steps):
            self.step.run(len(running), truncation=features.truncation, logprobs=features.logprobs)
        return InFlightSteps(running, StepOutputs.of(self.state))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the graphs themselves are compared: tests/gpu")
@pytest.mark.parametrize(
    ("family", "rows"), [("llama", 2), ("qwen2", 1), ("qwen3", 1), ("phi3", 1), ("mistral", 5), ("qwen3", 5)]
)
def test_a_whole_step_is_the_plain_one(build_family: Callable[[str], Path], family: str, rows: int) -> None:
    """BaseWeight and tuned, greedy and drawn, cut and penalised rows side by side, with log-probabilities."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(build_family(family), dtype=torch.float32).to(DEVICE)
    if family != "llama":  # what differs between families is in every layer
        model.model.layers = model.model.layers[:1]
    adapted = ["q_proj", "qkv_proj", "o_proj", "gate_proj", "gate_up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=3, target_modules=adapted))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
    greedy, drawn = GenerationSection(temperature=0), GenerationSection(repetition_penalty=1.2)
    cut = GenerationSection(temperature=1.0, top_k=9, top_p=0.9)
    some = [(greedy, True), (drawn, False), (cut, False), (greedy, False), (drawn, True)]
    every = {
        slot: DecodeRequest(list(range(slot, 3 * slot + 2)), settings, frozenset(), slot, base, logprobs=2)
        for slot, (settings, base) in enumerate(some[:rows])
    }
    told = []
    for runner in (None, Interpreted):
        decoder = StaticCacheDecoder.of(model, slots=rows, length=30, eager=True)
        if runner is not None:
            decoder.runner = runner(decoder)
        decoder.admit(every)
        told.append([decoder.decode() for _ in range(3)])  # the first come with the prompts
    for wanted, got in zip(*told, strict=True):
        assert wanted.keys() == got.keys() == every.keys()
        for slot in every:
            assert got[slot][0].id == wanted[slot][0].id
            assert got[slot][0].logprob == pytest.approx(wanted[slot][0].logprob, abs=1e-3)
