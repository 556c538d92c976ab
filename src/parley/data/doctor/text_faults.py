"""Text that does not belong into a conversation: broken encodings, control tokens and templates of model families."""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"
NUL = "\0"

# UTF-8 that was decoded as Windows-1252 or Latin-1. A lead byte alone is a letter of Portuguese or French, so every
# alternative asks for its continuation bytes too: cp1252 has them at these characters, Latin-1 at U+0080 to U+00BF.
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_CONTINUATION = f"[\x80-\xbf{_CP1252}]"
_MOJIBAKE = re.compile(
    f"[ÂÃ](?:[\x80-\xa9\xac-\xba\xbc-\xbf{_CP1252}]|[\xaa\xab\xbb](?=\\w))"  # é as Ã©; «Ã» and «Â» may be quoted
    f"|â[\x80€]{_CONTINUATION}"  # quotes and dashes as â€™
    f"|ð[\x9fŸ]{_CONTINUATION}{_CONTINUATION}"  # emoji
    f"|(?:[ÐÑ]{_CONTINUATION}){{2}}"  # Cyrillic, at least two letters
    "|ï»¿|ï¿½|锟斤拷"  # the byte-order mark, U+FFFD, and U+FFFD read as GBK
    "|[\x80-\x84\x86-\x9f]"  # C1 controls are cp1252 read as Latin-1; U+0085 is a line end
)

_TURN_MARKS = re.compile(
    # Llama 3 and 4, ChatML (Qwen, Yi, SmolLM), Phi, Zephyr, GLM, gpt-oss, Granite, Cohere, fill-in-the-middle.
    r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag|eot|header_start"
    r"|header_end|finetune_right_pad(?:_id)?|reserved_special_token_\d+|im_start|im_end|im_sep|endoftext"
    r"|system|user|assistant|end|observation|tool|channel|message|start|return|call|constrain|start_of_role"
    r"|end_of_role|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|USER_TOKEN|CHATBOT_TOKEN|SYSTEM_TOKEN|fim_prefix"
    r"|fim_middle|fim_suffix|pad|endofprompt)\|>"
    r"|<(?:start_of_turn|end_of_turn|bos|eos)>"  # Gemma
    r"|\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|\[TOOL_CALLS\]"  # Llama 2, Mistral
    r"|<｜[^｜<>\n]{1,40}｜>"  # DeepSeek
)
# What processors of multimodal models put pictures, video and sound in place of.
_PLACEHOLDERS = re.compile(
    # Llama 3.2 and 4, Qwen VL and Omni, Phi vision, GLM.
    r"<\|(?:(?:vision|audio|image|video)_(?:start|end|pad|bos|eos|\d+)|image|video|audio|AUDIO|IMAGE|VIDEO"
    r"|begin_of_(?:image|audio|video)|end_of_(?:image|audio|video))\|>"
    r"|<(?:(?:image|audio|video)_soft_token|(?:start|end)_of_(?:image|audio)|image_placeholder)>"  # Gemma 3 and 3n
    r"|\[IMG\](?![^\n]{0,500}\[/IMG\])|\[IMG_(?:BREAK|END)\]"  # Pixtral; a picture of a forum has an end
    # LLaVA's, which are HTML inside of a line: at an end of the text or on a line of their own.
    r"|\A\s*<(?:image|video|audio)>|^[ \t]*<(?:image|video|audio)>[ \t]*$|<(?:image|video|audio)>\s*\Z",
    re.MULTILINE,
)
# Alpaca, and headings of the same kind; Vicuna and Anthropic where one text holds both speakers.
_HEADINGS = re.compile(
    r"^#{2,3} ?(?:Instruction|Response|Input|Human|Assistant|User|System) ?:"
    r"|\ABelow is an instruction that describes a task",
    re.MULTILINE,
)
# Two searches rather than one pattern, which would be quadratic in the lines that one speaker begins.
_USER = re.compile(r"^[ \t]*(?:USER|User|Human): |\bUSER: ", re.MULTILINE)
_ASSISTANT = re.compile(r"^[ \t]*(?:ASSISTANT|Assistant|AI): |\bASSISTANT:", re.MULTILINE)


def mojibake(text: str) -> str | None:
    """The first piece of text that was decoded with the wrong encoding, with what surrounds it."""
    return None if text.isascii() else _around(_MOJIBAKE.search(text), text)


def replacement_character(text: str) -> str | None:
    """The first U+FFFD, which a decoder writes in place of bytes that it cannot read, with what surrounds it."""
    return None if text.isascii() else _around(re.search(REPLACEMENT, text), text)


def nul(text: str) -> str | None:
    return _around(re.search(NUL, text), text) if NUL in text else None


def turn_mark(text: str) -> str | None:
    """The first control token of a known model family in `text`."""
    found = _TURN_MARKS.search(text) if "<" in text or "[" in text else None
    return found[0] if found else _edge_mark(text.strip())


def media_placeholder(text: str) -> str | None:
    """The first placeholder of a picture, a video or a sound in `text`."""
    found = _PLACEHOLDERS.search(text) if "<" in text or "[IMG" in text else None
    return found[0].strip() if found else None


def _edge_mark(text: str) -> str | None:
    """Llama 2's and Mistral's tokens at the ends of `text`: in the middle they are HTML's strike-through."""
    if text.startswith("<s>") and "</s>" not in text[:-4]:
        return "<s>"
    return "</s>" if text.endswith("</s>") and "<s>" not in text else None


def template_text(text: str) -> str | None:
    """The first heading of a known text template, such as Alpaca's, in `text`."""
    found = _HEADINGS.search(text) if "#" in text or text.startswith("Below") else None
    if found is None and ":" in text:
        user = _USER.search(text)
        found = user and _ASSISTANT.search(text, user.end())
    return found[0].strip() if found else None


def _around(found: re.Match[str] | None, text: str, characters: int = 12) -> str | None:
    return text[max(0, found.start() - characters) : found.end() + characters] if found else None
