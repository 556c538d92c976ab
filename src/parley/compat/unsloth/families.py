"""Chat templates as notebooks name them, by family."""

from __future__ import annotations

from dataclasses import dataclass

_LLAMA_3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
_CHATML = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Family:
    """Templates that write turns alike.

    `mark` stands in every template of the family. `instruction` and `response` are written before what the user and
    the assistant say. `template` is a short one, for tokenizers that have `tokens`; `end` ends its turns.
    """

    mark: str
    instruction: str
    response: str
    template: str | None = None
    tokens: tuple[str, ...] = ()
    end: str | None = None


FAMILIES = {
    "llama-3": Family(
        "<|start_header_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        _LLAMA_3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "phi-4": Family("<|im_sep|>", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>"),
    "chatml": Family(
        "<|im_start|>",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        _CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "gemma": Family("<start_of_turn>", "<start_of_turn>user\n", "<start_of_turn>model\n"),
    "mistral": Family("[INST]", "[INST]", "[/INST]"),
    "phi-3": Family("<|assistant|>", "<|user|>\n", "<|assistant|>\n"),
}
NAMES = {
    **dict.fromkeys(("llama-3", "llama3", "llama-3.1", "llama-31", "llama-3.2", "llama-3.3"), "llama-3"),
    **dict.fromkeys(("chatml", "qwen-2.5", "qwen-25", "qwen25", "qwen2.5", "qwen-3", "qwen3"), "chatml"),
    **dict.fromkeys(("gemma", "gemma2", "gemma-2", "gemma-3", "gemma3"), "gemma"),
    **dict.fromkeys(("mistral", "llama"), "mistral"),
    **dict.fromkeys(("phi-3", "phi-35", "phi-3.5"), "phi-3"),
    "phi-4": "phi-4",
}
"""What notebooks call a template, to its family."""


def family_of(template: str) -> Family | None:
    """The family that a tokenizer's own template belongs to."""
    return next((family for family in FAMILIES.values() if family.mark in template), None)
