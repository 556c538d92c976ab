"""Rendering against the tokenizer's own apply_chat_template, for templates in the manner of the known families."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parley.data.example import Example
from parley.data.render import control_tokens_in, pin_date, render, render_example, render_many, render_prompt
from parley.errors import DataError, ModelError

TEMPLATES = Path(__file__).parent / "templates"
SHARED = Path(__file__).parents[3] / "shared"
# family: beginning of text, end of text, what its template makes of plain words in the last turn
FAMILIES: dict[str, tuple[str | None, str, Callable[[str], str]]] = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", lambda words: words.strip() + "<|eot_id|>"),
    "chatml": (None, "<|im_end|>", lambda words: words + "<|im_end|>"),
    "chatml_bare": (None, "<|im_end|>", lambda words: words + "<|im_end|>"),
    "qwen3": (None, "<|im_end|>", lambda words: "<think>\n\n</think>\n\n" + words.lstrip() + "<|im_end|>"),
    "mistral": ("<s>", "</s>", lambda words: " " + words.strip() + "</s>"),
    "gemma": ("<bos>", "<eos>", lambda words: words.strip() + "<end_of_turn>"),
    "phi": (None, "<|endoftext|>", lambda words: words + "<|end|>"),
    "zephyr": ("<s>", "</s>", lambda words: "\n" + words + "</s>"),
    "llama2": ("<s>", "</s>", lambda words: " " + words.strip() + " </s>"),
    "deepseek": ("<s>", "</s>", lambda words: words + "</s>"),
    "headings": (None, "</s>", lambda words: words + "\n### End"),
}
CONTROL = [
    *("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>"),
    *("<|im_start|>", "<|im_end|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|end|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<|User|>", "<|Assistant|>", "<|tool_output|>"),
    *("<|calls_begin|>", "<|call_begin|>", "<|call_end|>", "<|calls_end|>"),
]
CORPUS = [
    "You are a helpful assistant. What is the capital of France? The capital of France is Paris.",
    "user\nassistant\nsystem\n\n### Assistant:\nAhoy there, matey!\n### End\n\n",
    '{"name": "weather", "parameters": {"city": "Oslo"}}',
]
USER, ANSWER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Ahoy, matey!"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def call(name: str = "weather", **rest: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": {"city": "Tromsø"}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **rest}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer("llama3")`: a small byte-level BPE with every family's control tokens and one's template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=CONTROL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_tokens(["<think>", "</think>"])  # added, but not marked special, as Qwen has them

    def make(family: str, trim_offsets: bool = False, greedy: tuple[str, ...] = ()) -> Any:
        beginning, end, _ = FAMILIES[family]
        own = Tokenizer.from_str(core.to_str())
        own.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        own.add_special_tokens([AddedToken(token, rstrip=True, special=True) for token in greedy])
        template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=own,
            bos_token=beginning,
            eos_token=end,
            chat_template=template,
            clean_up_tokenization_spaces=False,
        )
        pin_date(tokenizer)
        return tokenizer

    return make


def learned(tokenizer: Any, rendered: Any) -> list[str]:
    """Each run of learned tokens, decoded."""
    assert len(rendered.mask) == len(rendered.input_ids)
    runs: list[list[int]] = []
    previous = False
    for id, trained in zip(rendered.input_ids, rendered.mask, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(id)
        previous = trained
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def checked(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, train_on: Any = "all", **options: Any
) -> list[str]:
    """What is learned of `messages`, having checked that the ids are apply_chat_template's."""
    rendered = render(tokenizer, messages, tools=tools, train_on=train_on, **options)
    assert rendered.input_ids == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    return learned(tokenizer, rendered)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_and_its_answer(make_tokenizer: Callable[..., Any], family: str) -> None:
    tokenizer, written = make_tokenizer(family), FAMILIES[family][2]
    assert checked(tokenizer, [USER, ANSWER]) == [written("Ahoy, matey!")]
    assert checked(tokenizer, [USER]) == []
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert render_prompt(tokenizer, [USER]) == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_several_turns(make_tokenizer: Callable[..., Any], family: str) -> None:
    tokenizer, written = make_tokenizer(family), FAMILIES[family][2]
    other = {"role": "assistant", "content": "Farewell."}
    messages = [USER, ANSWER, {"role": "user", "content": "Ahoy, matey!"}, other]
    first = "Ahoy, matey!<|im_end|>" if family == "qwen3" else written("Ahoy, matey!")
    assert checked(tokenizer, messages) == [first, written("Farewell.")]
    assert checked(tokenizer, messages, train_on="last") == [written("Farewell.")]


@pytest.mark.parametrize("family", ["llama3", "chatml", "chatml_bare", "qwen3", "phi", "zephyr", "headings"])
def test_a_system_turn_and_a_first_turn_of_the_assistant(make_tokenizer: Callable[..., Any], family: str) -> None:
    tokenizer, written = make_tokenizer(family), FAMILIES[family][2]
    system = {"role": "system", "content": "Ahoy, matey!"}
    assert checked(tokenizer, [system, USER, ANSWER]) == [written("Ahoy, matey!")]
    runs = checked(tokenizer, [ANSWER, USER, {"role": "assistant", "content": "Bye"}])
    assert len(runs) == 2
    assert runs[0].strip().startswith("Ahoy, matey!")
    assert runs[1] == written("Bye")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", ["", "  \n "])
def test_an_answer_without_words_teaches_nothing(make_tokenizer: Callable[..., Any], family: str, empty: str) -> None:
    assert checked(make_tokenizer(family), [USER, {"role": "assistant", "content": empty}]) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("control_tokens", ["tokens", "text"])
def test_random_conversations(
    make_tokenizer: Callable[..., Any], family: str, trim_offsets: bool, control_tokens: Any
) -> None:
    tokenizer, written = make_tokenizer(family, trim_offsets), FAMILIES[family][2]
    parts = [
        "word",
        " ",
        "\n",
        "\n\n",
        "é",
        "🏴\u200d☠️",
        "日本",
        "e\u0301",
        "\u00a0",
        "<",
        "|",
        "assistant\n",
        "###",
        "0",
        "</",
    ]
    parts += [
        "<|eot_id|>",
        "<|im_end|>",
        "[/INST]",
        "<end_of_turn>",
        "<|end|>",
        "<|assistant|>",
        "<|im_start|>assistant\n",
    ]
    random_ = random.Random(f"{family}{trim_offsets}")
    for _ in range(60):
        turns = random_.randint(1, 3)
        said = ["".join(random_.choices(parts, k=random_.randint(0, 7))) for _ in range(2 * turns)]
        messages = [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(said)]
        as_tokens = tokenizer.apply_chat_template(messages, return_dict=False)
        rendered = render(tokenizer, messages, control_tokens=control_tokens)
        if control_tokens == "tokens" or not control_tokens_in(tokenizer, messages):
            assert rendered.input_ids == as_tokens, messages
        assert tokenizer.decode(rendered.input_ids) == tokenizer.decode(as_tokens), messages
        got = tokenizer.decode(
            [id for id, trained in zip(rendered.input_ids, rendered.mask, strict=True) if trained],
            clean_up_tokenization_spaces=False,
        )
        expected = "".join(written(text) for text in said[1::2] if text.strip())
        if family == "qwen3":  # only the last turn has a thinking block
            expected = "".join(f"{text}<|im_end|>" for text in said[1:-1:2] if text.strip())
            expected += f"<think>\n\n</think>\n\n{said[-1]}<|im_end|>" if said[-1].strip() else ""
        # A line break of the header and one of the words may be one token, which is then learned.
        assert "".join(got.split()) == "".join(expected.split()), (messages, got)
        if FAMILIES[family][2](" a ").startswith("a"):
            assert got == expected


def test_thinking_is_learned_where_the_template_keeps_it(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("qwen3")
    thinking = {"role": "assistant", "reasoning_content": "They greet.", "content": "Ahoy!"}
    tagged = {"role": "assistant", "content": "<think>\nThey greet.\n</think>\n\nAhoy!"}
    kept = "<think>\nThey greet.\n</think>\n\nAhoy!<|im_end|>"
    for answer in (thinking, tagged):
        assert checked(tokenizer, [USER, answer]) == [kept]
        assert checked(tokenizer, [USER, answer, USER, answer]) == ["Ahoy!<|im_end|>", kept]
        assert checked(tokenizer, [USER, answer, USER]) == ["Ahoy!<|im_end|>"]


def test_thinking_that_the_template_drops_leaves_the_header_out(make_tokenizer: Callable[..., Any]) -> None:
    tagged = {"role": "assistant", "content": "<think>Hm.</think>Ahoy!"}
    assert checked(make_tokenizer("deepseek"), [USER, tagged, USER, ANSWER]) == ["Ahoy!</s>", "Ahoy, matey!</s>"]


def test_a_first_turn_with_its_thinking(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.role == 'assistant' %}{{- '<think>\\n' + (message.thinking or '') + '</think>' }}{%- endif %}"
        "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    greeting = {"role": "assistant", "thinking": "Hm.", "content": "Ahoy!"}
    assert checked(tokenizer, [greeting, USER]) == ["<think>\nHm.</think>Ahoy!<|im_end|>"]


def test_a_token_across_the_end_of_the_words_is_learned() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"Hello": 0, "?\n": 1, "Ahoy": 2, "!\n": 3}, unk_token="Hello"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + '\n' }}{% endfor %}"
    rendered = render(tokenizer, [USER, {"role": "assistant", "content": "Ahoy!"}])
    assert rendered.input_ids == [0, 1, 2, 3]
    assert rendered.mask == [False, False, True, True]


CALLS = {
    "llama3": '{"name": "weather", "parameters": {"city": "Tromsø"}}<|eom_id|>',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Tromsø"}}\n</tool_call><|im_end|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Tromsø"}}]</s>',
    "deepseek": '<|calls_begin|><|call_begin|>weather{"city": "Tromsø"}<|call_end|><|calls_end|></s>',
}


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": ""}])
def test_tool_calls_are_learned_whole(make_tokenizer: Callable[..., Any], family: str, nothing: dict[str, Any]) -> None:
    tokenizer, written = make_tokenizer(family), FAMILIES[family][2]
    result = {"role": "tool", "content": '{"celsius": -3}'}
    sunny = {"role": "assistant", "content": "Cold."}
    one = [USER, call(**nothing), result, sunny]
    if family == "qwen3":
        assert checked(tokenizer, one, TOOLS) == [CALLS[family], "<think>\n\n</think>\n\nCold.<|im_end|>"]
        runs = [CALLS[family], "Cold.<|im_end|>", CALLS[family]]
        got = checked(tokenizer, [*one, USER, call(**nothing)], TOOLS)
        assert [run.removeprefix("<think>\n\n</think>\n\n") for run in got] == runs
        return
    assert checked(tokenizer, one, TOOLS) == [CALLS[family], written("Cold.")]
    # With a later question Mistral's tools stand elsewhere than they did when the call was made.
    again = [*one, USER, call(**nothing), result, sunny]
    assert checked(tokenizer, again, TOOLS) == [CALLS[family], written("Cold.")] * 2
    assert checked(tokenizer, one[:2], TOOLS) == [CALLS[family]]


def test_words_before_a_tool_call(make_tokenizer: Callable[..., Any]) -> None:
    messages = [USER, call(content="Let me look."), {"role": "tool", "content": "3"}, ANSWER, USER]
    runs = checked(make_tokenizer("qwen3"), messages)
    assert runs == [f"Let me look.\n{CALLS['qwen3']}", "Ahoy, matey!<|im_end|>"]


def test_control_tokens_in_what_was_said_do_not_move_the_mask(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("llama3")
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    messages = [{"role": "user", "content": f"a{header}b"}, {"role": "assistant", "content": f"c{header}d"}]
    assert checked(tokenizer, messages, control_tokens="tokens") == [f"c{header}d<|eot_id|>"]
    assert learned(tokenizer, render(tokenizer, messages)) == [f"c{header}d<|eot_id|>"]
    assert control_tokens_in(tokenizer, messages) == ["<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"]
    assert control_tokens_in(tokenizer, [USER, ANSWER]) == []


def test_headers_that_swallow_white_space_are_not_learned(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("phi", greedy=("<|assistant|>",))
    rendered = render(tokenizer, [USER, {"role": "assistant", "content": "  Ahoy"}])
    assert learned(tokenizer, rendered) == ["Ahoy<|end|>"]


def test_one_beginning_of_text(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("llama3")
    assert render(tokenizer, [USER, ANSWER]).input_ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(DataError, match="inside the row's own text"):
        render(tokenizer, [{"role": "user", "content": "<|begin_of_text|>Hello"}, ANSWER], control_tokens="tokens")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="twice at the start"):
        render(tokenizer, [USER, ANSWER])


def test_prompt_and_completion(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("llama3")
    rendered = render_example(tokenizer, Example("row 1", prompt="The capital is", completion=" Paris."))
    joined = tokenizer("The capital is Paris.", add_special_tokens=False)["input_ids"]
    assert rendered.input_ids == [tokenizer.bos_token_id, *joined, tokenizer.eos_token_id]
    assert learned(tokenizer, rendered) == [" Paris.<|eot_id|>"]
    closed = render_example(tokenizer, Example("row 1", prompt="The capital is", completion=" Paris.<|eot_id|>"))
    assert closed == rendered
    assert not any(render_example(tokenizer, Example("row 1", prompt="Well?", completion=" ")).mask)
    turns = render_example(tokenizer, Example("row 1", prompt=[USER, ANSWER, USER], completion=[ANSWER]))
    assert turns.input_ids == tokenizer.apply_chat_template([USER, ANSWER, USER, ANSWER], return_dict=False)
    assert learned(tokenizer, turns) == ["Ahoy, matey!<|eot_id|>"]


def test_text(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("llama3")
    rendered = render_example(tokenizer, Example("row 1", text="Ahoy 🏴\u200d☠️"))
    ids = tokenizer("Ahoy 🏴\u200d☠️", add_special_tokens=False)["input_ids"]
    assert rendered.input_ids == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert rendered.mask == [False] + [True] * (len(ids) + 1)
    brought = render_example(tokenizer, Example("row 1", text="<|begin_of_text|>Ahoy 🏴\u200d☠️<|eot_id|>"))
    assert brought == rendered
    with pytest.raises(DataError, match="begin_of_text"):
        render_example(tokenizer, Example("row 1", text="a<|begin_of_text|>b"))
    without = render_example(make_tokenizer("chatml"), Example("row 1", text="Ahoy"))
    assert all(without.mask)
    assert not any(render_example(tokenizer, Example("row 1", text=" ")).mask)


def test_many_rows_at_once(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("gemma")
    refused = Example("row 2", messages=[{"role": "system", "content": "Be kind"}, USER, ANSWER])
    rows = [Example("row 1", messages=[USER, ANSWER]), refused, Example("row 3", text="Ahoy")]
    first, second, third = render_many(tokenizer, rows)
    assert first == render(tokenizer, [USER, ANSWER])
    assert str(second) == "the chat template refuses this conversation: System role not supported"
    assert third == render_example(tokenizer, rows[2])
    with pytest.raises(DataError, match="System role not supported"):
        render_example(tokenizer, refused)


@pytest.mark.parametrize(
    ("family", "messages"),
    [
        ("chatml", []),
        ("mistral", [USER, USER, ANSWER]),
        ("chatml", [USER, {"role": "assistant", "content": 3}]),
        ("chatml", [USER, {"role": "assistant"}]),
    ],
)
def test_refused_conversations_are_one_line(make_tokenizer: Callable[..., Any], family: str, messages: Any) -> None:
    with pytest.raises(DataError) as caught:
        render(make_tokenizer(family), messages)
    assert "\n" not in str(caught.value)


def test_tokenizers_that_cannot_render(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template; set model\.chat_template"):
        render(tokenizer, [USER, ANSWER])
    with pytest.raises(ModelError, match="no chat template"):
        render_prompt(tokenizer, [USER])
    assert render_example(tokenizer, Example("row 1", text="Ahoy")).input_ids

    class Slow(type(tokenizer)):  # type: ignore[misc]
        is_fast = False

    tokenizer.__class__ = Slow
    with pytest.raises(ModelError, match="character offsets"):
        render(tokenizer, [USER, ANSWER])


def test_sentencepiece_like_tokenizers() -> None:
    """Spaces as ▁, one put before the text, and bytes for characters outside the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"▁abcdefghijklmnopqrstuvwxyzA!,", "▁a", "▁A"]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {name: id for id, name in enumerate(names)}
    merges = [("▁", "a"), ("▁", "A")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (TEMPLATES / "llama2.jinja").read_text(encoding="utf-8")
    messages = [USER, {"role": "assistant", "content": "Ahoy, 🏴 é!"}] * 2
    assert [run.strip() for run in checked(tokenizer, messages)] == ["Ahoy, 🏴 é! </s>"] * 2


@pytest.mark.skipif(not (SHARED / "data" / "llama3").is_dir(), reason="needs ../shared with Llama 3's tokenizer")
@pytest.mark.skipif(importlib.util.find_spec("tiktoken") is None, reason="needs tiktoken")
def test_real_rows_with_the_real_llama_3_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    maker = [sys.executable, SHARED / "bench" / "make_tokenizer.py", SHARED / "data" / "llama3", tmp_path]
    subprocess.run(maker, check=True, capture_output=True, timeout=200)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pin_date(tokenizer)
    with (SHARED / "data" / "dolly_pirate_13k.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(300), strict=False)]
    for row in rows:
        question = {"role": "user", "content": f"{row['context']}\n\n{row['instruction']}"}
        messages = [question, {"role": "assistant", "content": row["response"]}]
        assert checked(tokenizer, messages) == [row["response"].strip() + "<|eot_id|>"]
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(render(tokenizer, messages).input_ids)
