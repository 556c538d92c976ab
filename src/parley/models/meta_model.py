"""A model without its weights: the modules that a run would train, on the meta device, for planning.

The modules are transformers', bitsandbytes' and PEFT's own, so that names, shapes, data types and what is trained are
those of the run. Nothing is allocated but Python objects.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from parley.config import LoraSection, ModelSection
from parley.errors import ModelError, one_line
from parley.models.adapters import attach_lora, prepare_full
from parley.models.load import MALFORMED
from parley.models.quantization import quantization_of
from parley.units import round_up

META = torch.device("meta")
ALLOCATION = 512  # bytes that torch's CUDA allocator rounds an allocation up to
BLOCK = 64  # weights of an NF4 block, which share a scale
SCALE_BLOCK = 256  # scales that share a second scale under double quantisation
PLANNABLE = ("none", "nf4", "int8")


class PlannedLinear4bit(Linear4bit):
    """Linear4bit whose forward and backward pass allocate what bitsandbytes' do: the dequantised weight."""

    def forward(self, x: Tensor) -> Tensor:
        out = _Dequantised.apply(x, self.weight, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


class PlannedLinear8bit(Linear8bitLt):
    """Linear8bitLt in the same way: its products in int32, and the weight in 16 bits for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x.new_empty(*x.shape[:-1], self.out_features, dtype=torch.int32)
        out = _Dequantised.apply(x, self.weight, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


class _Dequantised(torch.autograd.Function):
    """x W^T of a 4-bit weight, as bitsandbytes.autograd.MatMul4Bit: W is dequantised anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x = x.to(dtype)
        ctx.shape, ctx.dtype = shape, dtype
        ctx.save_for_backward(packed)
        return nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None


def meta_model(
    config: PreTrainedConfig, section: ModelSection, dtype: torch.dtype, lora: LoraSection | None, seed: int
) -> Any:
    """The model of `config` as a run would load it, with a new adapter, on the meta device; `lora` None: all weights.

    Raises ModelError for a quantization that has no plan, and what `attach_lora` and `prepare_full` raise.
    """
    saved = quantization_of(config)
    method = saved if section.quantization == "auto" else section.quantization
    if method not in PLANNABLE:
        raise ModelError(f"{section.name}: {method} weights cannot be planned; there are {', '.join(PLANNABLE)}")
    double = section.double_quantization
    if saved == "nf4":
        double = bool(vars(config)["quantization_config"].get("bnb_4bit_use_double_quant", False))
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with META:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)
        except (*MALFORMED, OSError, StrictDataclassError) as error:
            raise ModelError(f"{section.name}: config.json cannot be used: {one_line(error)}") from None
        model.name_or_path = section.name
        if method != "none":
            _quantise(model, method, dtype, double=double)
        if lora is None:
            return prepare_full(model)
        # Initial values do not matter here, and some are computed from the weights.
        plain = lora.model_copy(update={"loftq": False, "init_lora_weights": True})
        return attach_lora(model, plain, seed=seed)


def base_bytes(model: nn.Module) -> int:
    """Bytes on a GPU of every weight and buffer but the trained ones and adapters, allocations rounded up."""
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "lora_" not in name:
            tensors[id(parameter)] = parameter
            if isinstance(parameter, Params4bit):
                tensors |= {id(tensor): tensor for tensor in _state_tensors(parameter.quant_state)}
    tensors |= {id(buffer): buffer for buffer in model.buffers()}
    return sum(round_up(tensor.nbytes, ALLOCATION) for tensor in tensors.values())


def _state_tensors(state: Any) -> list[Tensor]:
    own = [state.absmax, state.code, state.offset]
    return [t for t in [*own, *(_state_tensors(state.state2) if state.state2 is not None else [])] if t is not None]


def _quantise(model: nn.Module, method: str, dtype: torch.dtype, *, double: bool) -> None:
    """Put bitsandbytes' layers in place of all linear layers but the head, as transformers does while loading."""
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            layer = _linear_4bit(module, dtype, double=double) if method == "nf4" else _linear_8bit(module)
            model.set_submodule(path, layer)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = method == "nf4", method == "int8"  # PEFT reads these
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": method == "nf4",
        "load_in_8bit": method == "int8",
        "bnb_4bit_quant_type": "nf4",
    }


def _linear_8bit(linear: nn.Linear) -> PlannedLinear8bit:
    layer = PlannedLinear8bit(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0,
        device=META,
    )  # fmt: skip
    layer.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8), requires_grad=False)
    layer.register_buffer("scale_N", torch.empty(linear.out_features), persistent=False)
    return layer


def _linear_4bit(linear: nn.Linear, dtype: torch.dtype, *, double: bool) -> PlannedLinear4bit:
    layer = PlannedLinear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype, double, "nf4", device=META
    )
    blocks = -(-linear.weight.numel() // BLOCK)
    state2 = QuantState(
        absmax=torch.empty(-(-blocks // SCALE_BLOCK)), code=torch.empty(256), blocksize=SCALE_BLOCK, dtype=torch.float32
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
        shape=linear.weight.shape, code=torch.empty(16), blocksize=BLOCK, quant_type="nf4", dtype=dtype,
        offset=torch.empty(()) if double else None, state2=state2 if double else None,
    )  # fmt: skip
    packed = torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8)
    layer.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=double, quant_type="nf4",
        bnb_quantized=True,
    )  # fmt: skip
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.empty(linear.out_features, dtype=dtype), requires_grad=False)
    return layer
