"""Llama (arXiv 2307.09288, 2407.21783). Biases are a switch of the configuration, for attention and MLP apart."""

from parley.models.families.family import ModelFamily

LLAMA = ModelFamily(
    model_type="llama",
    members="Llama 2, 3, 3.1, 3.2, 3.3",
    architecture="LlamaForCausalLM",
    biases=frozenset(
        {
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        }
    ),
)  # fmt: skip
