"""Tiny models and a tiny tokenizer, made once a session: no test needs a network or a download.

Fixtures: `tiny_tokenizer`, `tiny_llama_folder`, `family_folder` (one test per family), and `build_family` for a
folder of a family by name. Folders are shared by the whole session: copy one before changing it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run through Triton's interpreter, where Triton is there


def pytest_collection_finish() -> None:
    """Exempts what is imported by now from garbage collection.

    Each training run ends with a full collection (accelerate's), which would walk the modules of all libraries: a third
    of the time of a tiny run.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton's bindings report at exit what was not collected


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "router_aux_loss_coef": 0.1,
    },
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0},
    "gemma3": {"sliding_window_pattern": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    "granite": {"embedding_multiplier": 3, "residual_multiplier": 0.4, "logits_scaling": 2, "attention_multiplier": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
}

# Llama 3's turns without its preamble: role in a header, a blank line, the trimmed content, <|eot_id|>.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]
CORPUS = [
    "Ahoy matey! What be the colour of the sea on a clear morning? It be blue, arr.",
    "The quick brown fox jumps over the lazy dog, and 12 + 30 = 42.",
    "You are a helpful assistant who answers in one short sentence.",
    "How many apples are in the basket? There are seven apples in the basket.",
]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 384 tokens with Llama 3's special tokens and a short chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    bos = SPECIAL_TOKENS[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def family_config(family: str, tokenizer: Any) -> Any:
    """The config of a random model of `family`: 2 layers, hidden 64, 4 heads of 16 with 2 key-value heads."""
    import transformers

    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen2":  # its tokenizer class adds <|endoftext|>; real checkpoints have rows to spare, too
        shape["vocab_size"] += 16
    if family in ("mistral", "qwen3", "gemma2", "gemma3"):
        shape["head_dim"] = 16
    if family in ("mistral", "gemma2", "gemma3"):
        shape["sliding_window"] = 256
    if family in ("gemma2", "gemma3"):
        shape["query_pre_attn_scalar"] = 16
    makers = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
        "phi3": transformers.Phi3Config,
        "granite": transformers.GraniteConfig,
        "smollm3": transformers.SmolLM3Config,
        "olmo2": transformers.Olmo2Config,
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "granitemoe": transformers.GraniteMoeConfig,
        "starcoder2": transformers.Starcoder2Config,  # in no table of Parley's: it takes the plain paths
    }
    return makers[family](**shape | FAMILY_SETTINGS.get(family, {}))


@pytest.fixture(scope="session")
def build_family(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`build_family("llama")`: the folder of a saved fp32 model of random weights (seed 0) and its tokenizer."""
    built: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in built:
            import torch
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp("families") / family
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(family_config(family, tiny_tokenizer))
            model.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            built[family] = folder
        return built[family]

    return build


@pytest.fixture(scope="session")
def tiny_llama_folder(build_family: Callable[[str], Path]) -> Path:
    """Folder of a tiny fp32 Llama of random weights with `tiny_tokenizer`; treat it as read-only."""
    return build_family("llama")


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, build_family: Callable[[str], Path]) -> Path:
    """A tiny fp32 model folder of each family in turn (the folder's name is the family's)."""
    return build_family(request.param)
