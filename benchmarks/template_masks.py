"""Whether masks and ids are right under many chat templates.

    python benchmarks/template_masks.py FOLDER_OR_FILE... [--adversarial 150] [--only NAME] [--verbose]

Each Jinja file is given to a byte-level tokenizer whose control tokens are those that the template names, and renders
23 conversations. What is right is found without Parley's renderer, from `apply_chat_template` alone: every message has
words that occur nowhere else, a turn starts where the template stops when it is asked for the turn, and it ends with
the last control token that the template writes with and without the messages after it. Repeated texts and control
tokens in what somebody said are compared with the same conversation in words of the same length. Then random
conversations, full of control tokens and forged turns: nothing may be supervised that the assistant did not say.

Prints one line of JSON: templates, conversations, wrong masks, ids that differ, refusals by the template itself and by
Parley alone, and the same for the random conversations. With --refusals also which cases which templates refuse, as
docs/templates.md has it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from parley.data.render import pin_date, render
from parley.errors import DataError

Messages = list[dict[str, Any]]
CONTROL = re.compile(
    r"<\|[^<>|\s{}'+]+\|?>|<[^<>|\s{}'+/]+\|>|<｜[^<>{}'+]+｜>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|<SPECIAL_\d+>"
)
ALWAYS = ["<s>", "</s>", "<pad>", *(f"<|{role}|>" for role in ("user", "assistant", "system", "tool", "end"))]
OPENING = re.compile(
    r"START_OF_TURN|START_ACTION|(CHATBOT|USER|SYSTEM)_TOKEN|im_start|start_header|start_of"
    r"|<\|(user|assistant|system)(_start)?\||<\|(start|turn)|observation|\[INST|[<｜|](User|Assistant)|human|model[|]>|begin_|tool_result|SPECIAL_1[01]"
)
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added tokens that are not special, as Qwen has them
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}


def words(number: int) -> str:
    """Words that no other message has."""
    return f"Qx{number:03d}jv zk{number:03d}wp"


class Talk:
    """Builds a conversation whose messages have words of their own."""

    def __init__(self) -> None:
        self.messages: Messages = []
        self.calls = 0

    def say(self, role: str, content: str | None = None, **more: Any) -> Talk:
        number = len(self.messages)
        self.messages.append({"role": role, "content": words(number) if content is None else content, **more})
        return self

    def user(self, content: str | None = None) -> Talk:
        return self.say("user", content)

    def answer(self, content: str | None = None, think: bool = False) -> Talk:
        more = {"reasoning_content": words(500 + len(self.messages))} if think else {}
        return self.say("assistant", content, **more)

    def call(self, content: str = "", count: int = 1, think: bool = False, arguments: Any = None) -> Talk:
        calls = []
        for _ in range(count):
            self.calls += 1
            given = arguments or {"city": words(700 + self.calls)}
            function = {"name": "weather", "arguments": given}
            calls.append({"type": "function", "id": f"call{self.calls:05d}", "function": function})
        more = {"reasoning_content": words(500 + len(self.messages))} if think else {}
        return self.say("assistant", content, tool_calls=calls, **more)

    def results(self, *contents: str | None) -> Talk:
        ids = [call["id"] for call in self.messages[-1]["tool_calls"]]
        for id, content in zip(ids, contents, strict=True):
            self.say("tool", content, tool_call_id=id, name="weather")
        return self


def cases(fake: str, token: str) -> Iterator[tuple[str, Talk, bool]]:
    """Name, conversation and whether tools are offered. `fake` is a forged turn, `token` a control token."""
    system = "system"
    yield "plain", Talk().user().answer(), False
    yield "system", Talk().say(system).user().answer(), False
    yield "multi-turn", Talk().user().answer().user().answer().user().answer(), False
    yield "system, multi-turn", Talk().say(system).user().answer().user().answer(), False
    yield "assistant first", Talk().answer().user().answer(), False
    yield "two answers", Talk().user().answer().answer(), False
    yield "ends with the user", Talk().user().answer().user(), False
    yield "tools offered", Talk().user().answer(), True
    yield "call last", Talk().user().call(), True
    yield "call and result", Talk().user().call().results(None).answer(), True
    yield "words and call", Talk().user().call(words(90)).results(None).answer(), True
    yield "two calls", Talk().user().call(count=2).results(None, None).answer(), True
    yield "calls in a row", Talk().user().call().results(None).call().results(None).answer(), True
    yield "question after a call", Talk().user().call().results(None).answer().user().answer(), True
    yield "result last", Talk().user().call().results(None), True
    yield "reasoning", Talk().user().answer(think=True), False
    yield "reasoning twice", Talk().user().answer(think=True).user().answer(think=True), False
    yield "reasoning and call", Talk().user().call(think=True).results(None).answer(think=True), True
    yield "empty answer", Talk().user().answer("").user().answer(), False
    yield "white space", Talk().user(f"  {words(0)}\n\n").answer(f"\n {words(1)} é🏴 \n"), False
    arguments = {"city": words(701), "days": 3, "exact": True, "of": [1.5, {"k": words(702)}], "none": None}
    yield "arguments", Talk().user().call(arguments=arguments).results('{"weather": "Qx900jv"}').answer(), True
    yield "forged turns", Talk().user(f"a{fake}b").answer(f"c{fake}d").user(f"e{token}f").answer(f"g{token}h"), False
    yield "repeated", Talk().user(words(7)).answer(words(7)).user(words(7)).answer(words(7)), False


def tokenizer_for(template: str) -> Any:
    """One token a byte, and the control tokens that the template names."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in control_names(template)])
    core.add_tokens(PLAIN)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    pin_date(tokenizer)
    return tokenizer


def control_names(template: str) -> list[str]:
    return sorted({*CONTROL.findall(template), *ALWAYS})


def characters(tokenizer: Any, rendered: Any) -> tuple[str, list[bool]]:
    """The row's text, and for each character whether it is supervised."""
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    data, mask = b"", []
    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    for id, supervised in zip(rendered.input_ids, rendered.mask, strict=True):
        piece = added[id].encode() if id in added else bytes([byte_of[tokenizer.convert_ids_to_tokens(id)]])
        data += piece
        mask += [supervised] * len(piece)
    text, per_character, at = data.decode(), [], 0
    for character in text:
        per_character.append(mask[at])
        at += len(character.encode())
    return text, per_character


def bytes_to_unicode() -> dict[int, str]:
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Reference:
    """What is right, from `apply_chat_template` alone."""

    def __init__(self, tokenizer: Any, messages: Messages, tools: Any) -> None:
        self.tokenizer, self.messages, self.tools = tokenizer, messages, tools
        self.control = re.compile(
            "|".join(map(re.escape, sorted(control_names(tokenizer.chat_template), key=len)[::-1]))
        )
        self.text = self.write(messages)

    def write(self, messages: Messages, prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=self.tools, add_generation_prompt=prompt, tokenize=False
        )

    def tried(self, messages: Messages, prompt: bool = False) -> str | None:
        try:
            return self.write(messages, prompt)
        except Exception:  # noqa: BLE001 - templates fail in any way
            return None

    def marks(self, index: int) -> list[str]:
        """The words of a message."""
        message = self.messages[index]
        said = json.dumps([message["content"], message.get("reasoning_content"), message.get("tool_calls")])
        return re.findall(r"Qx\d{3}jv|zk\d{3}wp", said)

    def occurrences(self, index: int) -> list[tuple[int, int]]:
        return sorted(
            (found.start(), found.end()) for mark in self.marks(index) for found in re.finditer(mark, self.text)
        )

    def faults(self, mask: list[bool], right: list[bool] | None) -> Iterator[str]:
        for index, message in enumerate(self.messages):
            for start, end in self.occurrences(index):
                wanted = message["role"] == "assistant"
                if any(mask[at] != wanted for at in range(start, end)):
                    yield f"turn {index} ({message['role']}): {self.text[start:end]!r} is {'not ' * wanted}supervised"
            if message["role"] == "assistant":
                yield from self.edges(index, mask, right)
        allowed = [self.occurrences(i) for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        for start, end in runs(mask):
            if not any(start <= a and b <= end for spans in allowed for a, b in spans):
                yield f"supervised without words of an assistant: {self.text[start:end]!r}"

    def edges(self, index: int, mask: list[bool], right: list[bool] | None) -> Iterator[str]:
        spans = self.occurrences(index)
        if not spans:
            return
        first, last = spans[0][0], spans[-1][1]
        start, end = first, last
        while start and mask[start - 1]:
            start -= 1
        while end < len(mask) and mask[end]:
            end += 1
        prompted = self.tried(self.messages[:index], prompt=True) if index else None
        before = self.tried(self.messages[:index]) if index else None
        if prompted is not None and prompted != before and self.text.startswith(prompted) and start != len(prompted):
            yield f"turn {index} starts with {self.text[start:last]!r}, wanted {self.text[len(prompted) : last]!r}"
        head = self.text[start:first]
        if index == 0:
            question = [{"role": "user", "content": "Hm"}]
            before, prompted = self.tried(question), self.tried(question, prompt=True)
        if prompted is not None and before is not None and prompted.startswith(before) and prompted != before:
            opening = self.control.match(prompted[len(before) :])
            if opening and opening[0] in head:
                yield f"turn {index} has its header supervised: {head!r}"
        wanted = self.closings(index, spans[-1])
        if right is not None and wanted:
            wanted.add(next((at for at in range(last, len(right)) if not right[at]), len(right)))
        ends = {len(self.text[:right].rstrip()) for right in wanted}
        later = [m["role"] for m in self.messages[index + 1 :] if m["role"] != "tool"]
        next_is_assistant = later[:1] == ["assistant"]
        if wanted and len(self.text[:end].rstrip()) not in ends and not (next_is_assistant and min(wanted) <= end):
            ways = [self.text[last:right] for right in sorted(wanted)]
            yield f"turn {index} ends with {self.text[last:end]!r}, wanted {ways}"

    def closings(self, index: int, last: tuple[int, int]) -> set[int]:
        """Where a turn may end whose last words are at `last`: after what the template writes of it whatever follows,
        or after all the control tokens before one that opens another turn."""
        mark = self.text[slice(*last)]
        if index + 1 < len(self.messages):
            other = self.tried(self.messages[: index + 1])
        else:
            calls = self.messages[index].get("tool_calls") or []
            results = [{"role": "tool", "content": "Hm", "tool_call_id": call["id"]} for call in calls]
            other = self.tried([*self.messages, *(results or [{"role": "user", "content": "Hm"}])])
        if other is None or mark not in other:
            return set()
        tail, whole = other[other.rfind(mark) + len(mark) :], self.text[last[1] :]
        pairs = enumerate(zip(tail, whole, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(tail), len(whole)))
        for text in (tail, whole):  # no half control tokens
            common = next((t.start() for t in self.control.finditer(text) if t.start() < common < t.end()), common)
        said = [start for i in range(len(self.messages)) for start, _ in self.occurrences(i) if start >= last[1]]
        limit = min([self.opening(whole), *(start - last[1] for start in said)])
        ends = set()
        for stop in (min(common, limit), limit):
            closings = list(self.control.finditer(whole, 0, stop))
            ends.add(last[1] + (closings[-1].end() if closings else len(whole[:stop].rstrip())))
        return ends

    def opening(self, text: str) -> int:
        """Where the first control token stands that opens a turn."""
        return next((token.start() for token in self.control.finditer(text) if OPENING.search(token[0])), len(text))


def runs(mask: list[bool]) -> list[tuple[int, int]]:
    edges = [at for at in range(len(mask) + 1) if (at and mask[at - 1]) != (at < len(mask) and mask[at])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def same_length(text: str, number: int) -> str:
    """Words of their own, as long as `text`."""
    return words(number).ljust(len(text), "o")[: len(text)]


def check(tokenizer: Any, name: str, messages: Messages, tools: Any) -> Iterator[str]:
    """Faults of one conversation; the first word says of which kind."""
    try:
        reference = Reference(tokenizer, messages, tools)
    except Exception as error:  # noqa: BLE001
        yield f"refused: {error}"
        return
    said = name in ("forged turns", "repeated")
    try:
        rendered = render(tokenizer, messages, tools=tools)
    except DataError as error:
        yield f"parley: {error}"
        return
    text, mask = characters(tokenizer, rendered)
    if text != reference.text:
        yield "ids: other text"
        return
    ids = tokenizer(reference.text, add_special_tokens=False)["input_ids"]
    if name != "forged turns" and rendered.input_ids != ids:
        yield "ids: differ"
    if said:  # the same turns in other words of the same length have the same mask
        other = [m | {"content": same_length(m["content"], number)} for number, m in enumerate(messages)]
        plain_text, plain = characters(tokenizer, render(tokenizer, other, tools=tools))
        if len(plain_text) != len(text):
            yield "skipped: the template changes the words"
            return
        if plain != mask:
            yield f"mask: {[text[slice(*run)] for run in runs(mask)]} for {[text[slice(*run)] for run in runs(plain)]}"
        return
    right = None
    if "{% generation" in tokenizer.chat_template.replace("{%-", "{%"):
        right = witness(tokenizer, messages, tools)
        yield from witnessed(text, mask, right)
    for fault in reference.faults(mask, right):
        yield f"mask: {fault}"


def witness(tokenizer: Any, messages: Messages, tools: Any) -> list[bool]:
    """The mask that the template itself marks with {% generation %}."""
    marked = tokenizer.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
    marks = SimpleNamespace(input_ids=marked["input_ids"], mask=[bool(mark) for mark in marked["assistant_masks"]])
    return characters(tokenizer, marks)[1]


def witnessed(text: str, mask: list[bool], right: list[bool]) -> Iterator[str]:
    """Nothing may be supervised that the template does not mark, and no words that it marks may be missing.

    Templates mark more than that: headers, turns without words, a line break after the end of a turn.
    """
    for start, end in runs([ours and not theirs for ours, theirs in zip(mask, right, strict=True)]):
        if text[start:end].strip() and text[start:end] != "<|tool_response>":  # by which Gemma 4 ends a turn of calls
            yield f"mask: {text[start:end]!r} is supervised, the template does not mark it"
    for start, end in runs([theirs and not ours for ours, theirs in zip(mask, right, strict=True)]):
        if re.search(r"Qx\d{3}jv|zk\d{3}wp", text[start:end]):
            yield f"mask: {text[start:end]!r} is not supervised, the template marks it"


def forged(tokenizer: Any) -> str:
    """The end of a turn and the start of an assistant's, as the template writes them."""
    for first in ([{"role": "user", "content": "qq"}], [{"role": "user", "content": "qq"}] * 2):
        try:
            text = tokenizer.apply_chat_template(first, add_generation_prompt=True, tokenize=False)
            return text[text.index("qq") + 2 :] or "[/INST]"
        except Exception:  # noqa: BLE001
            continue
    return "</s>"


def adversarial(tokenizer: Any, count: int, seed: str) -> Iterator[str]:
    """Random conversations whose other messages hold a mark that must not be supervised."""
    source = random.Random(seed)
    names, fake = control_names(tokenizer.chat_template), forged(tokenizer)
    junk = [*names, *PLAIN, fake, fake, "\n", " ", "é", "assistant", "\n\n", "###", '{"a": "b"}', "<", "|>", "0", "Hi"]
    for _ in range(count):
        talk, mark = Talk(), "Qx000jv"

        def mess(mark: str = "") -> str:
            left, right = ("".join(source.choices(junk, k=source.randint(0, 4))) for _ in range(2))
            return f"{left}{mark}{right}"

        tools = source.random() < 0.4
        if source.random() < 0.3:
            talk.say("system", mess(mark))
        for _ in range(source.randint(1, 3)):
            talk.user(mess(mark))
            if tools and source.random() < 0.6:
                talk.call(arguments={"city": mess()}).results(mess(mark))
            talk.answer(mess())
        offered = [TOOL] if tools else None
        try:
            text = tokenizer.apply_chat_template(talk.messages, tools=offered, tokenize=False)
        except Exception:  # noqa: BLE001
            yield "refused"
            continue
        try:
            got, mask = characters(tokenizer, render(tokenizer, talk.messages, tools=offered))
        except DataError as error:
            yield f"parley: {error}"
            continue
        if got != text:
            yield "ids: other text"
        elif any(mask[at] for found in re.finditer(mark, text) for at in range(*found.span())):
            yield f"mask: {json.dumps(talk.messages, ensure_ascii=False)}"
        else:
            yield "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--adversarial", type=int, default=150)
    parser.add_argument("--only", default="")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--refusals", action="store_true", help="a Markdown table of what templates refuse themselves")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    files = [file for path in arguments.paths for file in (sorted(path.rglob("*.jinja")) if path.is_dir() else [path])]
    unique = {file.read_bytes(): file for file in reversed(files) if arguments.only in file.name}
    counts: Counter[str] = Counter(templates=len(unique))
    refused: dict[str, list[str]] = {}
    report: Callable[..., None] = print if arguments.verbose else lambda *_: None
    for data, file in sorted(unique.items(), key=lambda item: item[1].name):
        tokenizer = tokenizer_for(data.decode("utf-8"))
        fake = forged(tokenizer)
        token = next((name for name in control_names(data.decode()) if name in fake), "</s>")
        for name, talk, tools in cases(fake, token):
            counts["conversations"] += 1
            kinds = set()
            for fault in check(tokenizer, name, talk.messages, [TOOL] if tools else None):
                kinds.add(fault.split(":")[0])
                if fault.startswith("refused"):
                    refused.setdefault(file.stem, []).append(name)
                report(f"{file.name}: {name}: {fault}")
            counts.update(kinds)
        for outcome in adversarial(tokenizer, arguments.adversarial, file.name):
            counts[f"adversarial {outcome.split(':')[0]}"] += 1
            if outcome[:4] in ("mask", "parl", "ids:"):
                report(f"{file.name}: adversarial {outcome}")
    print(json.dumps(counts))
    if arguments.refusals:
        print_refusals(refused)


def print_refusals(refused: dict[str, list[str]]) -> None:
    """A row for each set of cases that the same templates refuse."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, names in refused.items():
        groups.setdefault(tuple(dict.fromkeys(names)), []).append(name)
    print("| cases | templates |\n| --- | --- |")
    for names, templates in sorted(groups.items(), key=lambda group: len(group[0])):
        print(f"| {len(names)}: {', '.join(names)} | {', '.join(templates)} |")


if __name__ == "__main__":
    main()
