"""What `bind` refuses: everything that the fused step would compute differently from transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from parley.models.families import FAMILIES, family_of
from parley.train_step.bind import Unsupported, bind, read_weights

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip


def adapted(model_type: str = "llama", build: Callable[..., nn.Module] | None = None, **config: Any) -> PeftModel:
    build = build or AutoModelForCausalLM.from_config
    model = build(AutoConfig.for_model(model_type, **SIZES | config))
    targets = ["qkv_proj" if model_type == "phi3" else "q_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(target_modules=targets))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_declared_family_is_bound(model_type: str) -> None:
    model = adapted(model_type)
    assert family_of(model.config) is FAMILIES[model_type]
    assert len(bind(model).layers) == 1


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "activation gelu_pytorch_tanh"),
        ({"rope_parameters": DYNAMIC}, "rotary embeddings of type dynamic"),
        ({"rope_parameters": LONGROPE}, "rotary embeddings of type longrope"),
        ({"model_type": "gemma"}, "no fused step for the gemma family"),
        ({"model_type": "olmo"}, "no fused step for the olmo family"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop 0.1"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "activation gelu"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_models_it_computes_differently_are_refused(config: dict[str, Any], reason: str) -> None:
    config = dict(config)
    model_type = config.pop("model_type", "llama")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | config))
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(Unsupported, match=f"^{reason}$"):
        bind(model)


def test_dropout_of_attention_does_not_matter_for_inference() -> None:
    assert len(read_weights(adapted(attention_dropout=0.1)).layers) == 1


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE])
def test_inference_refuses_rotary_embeddings_that_depend_on_the_length(rope: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="rotary embeddings"):
        read_weights(adapted(rope_parameters=rope))


class ScaledLlama(LlamaForCausalLM):
    """As a checkpoint with code of its own may be: the family's name, another forward pass."""


@pytest.mark.parametrize("architecture", [ScaledLlama, LlamaForSequenceClassification])
def test_a_class_that_is_not_the_family_s_is_refused(architecture: type[nn.Module]) -> None:
    with pytest.raises(Unsupported, match=f"{architecture.__name__} is not LlamaForCausalLM"):
        bind(adapted(build=architecture))


@pytest.mark.parametrize(("model_type", "module"), [("mistral", "self_attn.o_proj"), ("qwen2", "mlp.down_proj")])
def test_a_bias_that_the_family_does_not_have_is_refused(model_type: str, module: str) -> None:
    model = adapted(model_type)
    layer = model.get_base_model().model.layers[0]
    linear = layer.get_submodule(module)
    linear = linear.base_layer if "down" in module else linear
    linear.bias = nn.Parameter(torch.ones(linear.out_features), requires_grad=False)
    with pytest.raises(Unsupported, match=f"a bias on {module}"):
        bind(model)


def quantised(model: PeftModel) -> Linear4bit:
    """The first layer's o_proj as a 4-bit one."""
    linear = Linear4bit(32, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    model.get_base_model().model.layers[0].self_attn.o_proj = linear
    return linear


@pytest.mark.parametrize("take", [bind, read_weights])
def test_4_bit_weights_in_the_layout_of_cpu_inference_are_refused(take: Callable[[nn.Module], Any]) -> None:
    model = adapted()
    linear = quantised(model)
    take(model)
    linear.weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes sets when it has reordered the weight
    with pytest.raises(Unsupported, match="4-bit weights in the layout of CPU inference"):
        take(model)


@pytest.mark.parametrize("take", [bind, read_weights])
def test_4_bit_rows_that_end_within_a_byte_are_refused(take: Callable[[nn.Module], Any]) -> None:
    model = adapted()
    linear = Linear4bit(33, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    model.get_base_model().model.layers[0].self_attn.o_proj = linear
    with pytest.raises(Unsupported, match="4-bit weights with 33 input features, an odd number"):
        take(model)


def test_an_adapter_that_is_all_frozen_is_refused() -> None:
    model = adapted()
    model.requires_grad_(False)
    with pytest.raises(Unsupported, match="all adapter weights are frozen"):
        bind(model)


def test_weights_that_are_trained_beside_the_adapters_are_refused_by_name() -> None:
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(Unsupported, match=r"model\.norm\.weight is trained"):
        bind(model)


def test_switched_off_merged_and_several_adapters_are_refused() -> None:
    model = adapted()
    with model.disable_adapter(), pytest.raises(Unsupported, match="switched off"):
        bind(model)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(Unsupported, match="several adapters"):
        bind(model)
    model = adapted()
    model.merge_adapter()
    with pytest.raises(Unsupported, match="merged"):
        bind(model)
