from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from parley.train_step.bind import bind
from parley.train_step.flat_parameters import OPTIMIZER_BLOCK, FlatAdapters


def llama() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=3, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config).to(torch.float32), lora)


def test_parameters_keep_their_values_and_share_the_buffer() -> None:
    parameters = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))]
    before = [parameter.detach().clone() for parameter in parameters]
    flat = FlatAdapters(parameters)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    with torch.no_grad():
        flat.weight_Z.add_(1.0)
    assert all(torch.equal(now, then + 1) for now, then in zip(parameters, before, strict=True))


def test_no_optimizer_block_spans_two_parameters() -> None:
    flat = FlatAdapters([nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(OPTIMIZER_BLOCK + 1))])
    assert all(weight.storage_offset() % OPTIMIZER_BLOCK == 0 for weight in flat.weights)
    assert flat.weight_Z.numel() == 3 * OPTIMIZER_BLOCK


def test_frozen_parameters_share_the_buffer_and_are_outside_of_what_is_optimized() -> None:
    """requires_grad=False: no optimizer state, no weight decay, not in the gradient norm, no `grad`."""
    parameters = [nn.Parameter(torch.full((3,), float(i)), requires_grad=i % 2 == 1) for i in range(4)]
    flat = FlatAdapters(parameters)
    assert flat.weight_Z.numel() == flat.grad_Z.numel() == 2 * OPTIMIZER_BLOCK
    for gradient in flat.gradients:
        gradient.fill_(1.0)
    assert float(flat.grad_Z.sum()) == 6.0
    torch.optim.AdamW([flat.weight_Z], lr=0.5, weight_decay=0.5).step()
    flat.expose_gradients()
    for index, parameter in enumerate(parameters):
        frozen = index % 2 == 0
        assert torch.equal(parameter.data, torch.full((3,), float(index))) == frozen
        assert (parameter.grad is None) == frozen
        assert flat.adapter(index, index, 1.0).trainable != frozen


def test_gradients_are_shown_where_peft_s_parameters_look() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))]
    flat = FlatAdapters(parameters)
    flat.grad_Z.fill_(4.0)
    flat.expose_gradients()
    assert [parameter.grad.sum().item() for parameter in parameters if parameter.grad is not None] == [16.0, 12.0]


def test_saving_and_loading_through_peft_is_exact(tmp_path: Path) -> None:
    model = llama()
    bound = bind(model)
    with torch.no_grad():
        bound.flat.weight_Z.normal_()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in bound.flat.parameters)

    other = llama()
    again = bind(other)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    for ours, theirs in zip(again.flat.parameters, bound.flat.parameters, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        again.flat.weights, bound.flat.weights, strict=True
    ):  # loading wrote into the buffer, not beside it
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_binding_twice_keeps_what_was_learned() -> None:
    model = llama()
    with torch.no_grad():
        bind(model).flat.weight_Z.fill_(0.5)
    second = bind(model).flat
    assert second.weights[0].unique().tolist() == pytest.approx([0.5])
