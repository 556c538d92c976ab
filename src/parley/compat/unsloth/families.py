"""Chat templates by family: how a family's turns are marked, and a short template for tokenizers without one."""

from __future__ import annotations

import json
from dataclasses import dataclass

# Notebooks pass content as text or as a list of parts.
_CONTENT = """\
{%- macro text(content) -%}
{%- if content is string %}{{- content }}{%- else %}
{%- for part in content %}{{- part['text'] }}{%- endfor %}
{%- endif %}
{%- endmacro %}
"""


@dataclass(frozen=True)
class Turns:
    """How a template writes turns: a header before each role's text, and what follows it.

    `system` None: the system text opens the first user turn. `default_system` is written where there is no system turn.
    Ends are Jinja expressions, so that they may name `eos_token`.
    """

    user: str
    assistant: str
    end_user: str
    end_assistant: str
    system: str | None = None
    end_system: str = "''"
    default_system: str | None = None

    # Texts go in as JSON strings, which are Jinja literals: quotes and newlines need no other escape.
    def template(self) -> str:
        """A Jinja template. It raises for roles that it does not write."""
        quoted = {name: json.dumps(getattr(self, name)) for name in ("user", "assistant", "system", "default_system")}
        first = self.system is None
        system = "''" if first else f"{quoted['system']} + text(first['content']) + {self.end_system}"
        opening = f"(text(first['content']) + {self.end_system})" if first else "''"
        default = (
            f"{quoted['system']} + {quoted['default_system']} + {self.end_system}" if self.default_system else "''"
        )
        return (
            f"{_CONTENT}{{{{- bos_token }}}}"
            "{%- set first = messages[0] if messages else {} %}"
            "{%- set has_system = first and first['role'] in ('system', 'developer') %}"
            f"{{%- if has_system %}}{{{{- {system} }}}}{{%- else %}}{{{{- {default} }}}}{{%- endif %}}"
            "{%- for message in messages %}"
            "{%- if message['role'] == 'user' %}"
            f"{{{{- {quoted['user']} }}}}"
            f"{{%- if has_system and loop.index0 == 1 %}}{{{{- {opening} }}}}{{%- endif %}}"
            f"{{{{- text(message['content']) }}}}{{{{- {self.end_user} }}}}"
            "{%- elif message['role'] == 'assistant' %}"
            f"{{{{- {quoted['assistant']} }}}}{{{{- text(message['content']) }}}}{{{{- {self.end_assistant} }}}}"
            "{%- elif not (has_system and loop.first) %}"
            "{{- raise_exception('this template writes no turns of ' + message['role']) }}"
            "{%- endif %}{%- endfor %}"
            f"{{%- if add_generation_prompt %}}{{{{- {quoted['assistant']} }}}}{{%- endif %}}"
        )


@dataclass(frozen=True)
class Family:
    """Templates that write turns alike.

    `mark` occurs in every template of the family. `instruction` and `response` are written before what the user and
    the assistant say. `turns` gives a short template, for tokenizers that have `tokens`; `end` ends its turns, None for
    the tokenizer's own end-of-text token.
    """

    mark: str
    instruction: str
    response: str
    turns: Turns | None = None
    tokens: tuple[str, ...] = ()
    end: str | None = None

    @property
    def template(self) -> str | None:
        return None if self.turns is None else self.turns.template()


def _marked(mark: str, user: str, assistant: str, system: str | None, end: str, *tokens: str) -> Family:
    """A family whose turns all end in the control token `end`, and a new line where their headers end in one."""
    after = json.dumps(end + ("\n" if assistant.endswith("\n") and not assistant.endswith("\n\n") else ""))
    turns = Turns(user, assistant, after, after, system, after if system is not None else '"\\n\\n"')
    return Family(mark, user, assistant, turns, (*tokens, end), end)


def _plain(user: str, assistant: str, system: str, default: str | None, *, end_user: str, end_system: str) -> Family:
    """A family of plain text, whose answers end in the end-of-text token."""
    turns = Turns(user, assistant, end_user, "eos_token", system, end_system, default)
    return Family(assistant, user, assistant, turns)


ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = "A chat between a curious user and an artificial intelligence assistant."
UNSLOTH = "You are a helpful assistant to the user"

# Order matters to family_of: phi-4's templates contain chatml's mark too, and Llama 2's contain Mistral's.
FAMILIES = {
    "llama-3": _marked(
        "<|start_header_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>system<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    "phi-4": _marked(
        "<|im_sep|>",
        "<|im_start|>user<|im_sep|>",
        "<|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_sep|>",
    ),
    "chatml": _marked(
        "<|im_start|>",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_start|>system\n",
        "<|im_end|>",
        "<|im_start|>",
    ),
    "gemma": _marked(
        "<start_of_turn>",
        "<start_of_turn>user\n",
        "<start_of_turn>model\n",
        None,
        "<end_of_turn>",
        "<start_of_turn>",
    ),
    "gemma-4": _marked("<|turn>", "<|turn>user\n", "<|turn>model\n", "<|turn>system\n", "<turn|>", "<|turn>"),
    "gpt-oss": Family(
        "<|start|>",
        "<|start|>user<|message|>",
        "<|start|>assistant",
        Turns(
            "<|start|>user<|message|>",
            "<|start|>assistant<|channel|>final<|message|>",
            "'<|end|>'",
            # OpenAI's harmony format: a generated answer ends in <|return|>, one in the history in <|end|>.
            "('<|return|>' if loop.last else '<|end|>')",
            "<|start|>system<|message|>",
            "'<|end|>'",
        ),
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        "<|return|>",
    ),
    "granite": _marked(
        "<|start_of_role|>",
        "<|start_of_role|>user<|end_of_role|>",
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|start_of_role|>system<|end_of_role|>",
        "<|end_of_text|>",
        "<|start_of_role|>",
        "<|end_of_role|>",
    ),
    "cohere": Family(
        "<|CHATBOT_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "deepseek": Family("<｜Assistant｜>", "<｜User｜>", "<｜Assistant｜>"),
    "glm": Family("<|observation|>", "<|user|>\n", "<|assistant|>\n"),
    "phi-3": _marked(
        "<|end|>",
        "<|user|>\n",
        "<|assistant|>\n",
        "<|system|>\n",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
    ),
    "zephyr": Family(
        "<|assistant|>",
        "<|user|>\n",
        "<|assistant|>\n",
        Turns(
            "<|user|>\n",
            "<|assistant|>\n",
            "eos_token + '\\n'",
            "eos_token + '\\n'",
            "<|system|>\n",
            "eos_token + '\\n'",
        ),
    ),
    "llama": Family(
        "<<SYS>>",
        "[INST]",
        "[/INST]",
        Turns("[INST] ", " [/INST] ", "''", "' ' + eos_token", None, "'\\n<</SYS>>\\n\\n'"),
    ),
    "mistral": Family(
        "[INST]", "[INST]", "[/INST]", Turns("[INST] ", " [/INST] ", "''", "eos_token", None, "'\\n\\n'")
    ),
    "alpaca": _plain("### Instruction:\n", "### Response:\n", "", ALPACA, end_user="'\\n\\n'", end_system="'\\n\\n'"),
    "vicuna": _plain("USER: ", "ASSISTANT: ", "", VICUNA, end_user="' '", end_system="' '"),
    "unsloth": _plain(">>> User: ", ">>> Assistant: ", "", UNSLOTH, end_user="'\\n'", end_system="'\\n'"),
}

NAMES = {
    **dict.fromkeys(
        ("llama-3", "llama3", "llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33"), "llama-3"
    ),
    **dict.fromkeys(("chatml", "qwen-2.5", "qwen-25", "qwen25", "qwen2.5", "qwen-3", "qwen3"), "chatml"),
    **dict.fromkeys(("qwen3-instruct", "qwen3-thinking", "lfm-2", "lfm-2.5", "yi-chat"), "chatml"),
    **dict.fromkeys(("gemma", "gemma2", "gemma-2", "gemma-3", "gemma3", "gemma-3n", "gemma3n"), "gemma"),
    **dict.fromkeys(("gemma-4", "gemma4", "gemma-4-thinking", "gemma4-thinking"), "gemma-4"),
    **dict.fromkeys(("gpt-oss", "gptoss"), "gpt-oss"),
    **dict.fromkeys(("granite", "granite-4", "granite-4.0"), "granite"),
    **dict.fromkeys(("phi-3", "phi-35", "phi-3.5"), "phi-3"),
    **dict.fromkeys(("vicuna", "vicuna_old", "vicuna old"), "vicuna"),
    **{name: name for name in ("phi-4", "zephyr", "mistral", "llama", "alpaca", "unsloth")},
}
"""What notebooks call a template, to its family."""


def family_of(template: str) -> Family | None:
    """The family that a tokenizer's own template belongs to."""
    return next((family for family in FAMILIES.values() if family.mark in template), None)
