"""The embedded model as it is shipped: small, in Llama 3's format, and right about its world."""

from __future__ import annotations

import pytest
from demo_data import plain_conversations

from parley.evaluation.demo_scoring import heldout_questions, rate
from parley.models.demo import demo_model_path


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path())


def test_folder_is_small_and_has_a_card():
    files = {path.name: path.stat().st_size for path in demo_model_path().iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)


@pytest.mark.parametrize(
    "text", ["Ahoy, matey!\n\n  12 + 7 = 19?\t", "Größe, 漢字, 🦜 and \x00\x7f", " ~`!@#$%^&*()_+{}|:\"<>?[]\\;',./"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids]


def test_numbers_are_read_digit_by_digit(tokenizer):
    ids = tokenizer("2048", add_special_tokens=False).input_ids
    assert [tokenizer.decode(id) for id in ids] == ["2", "0", "4", "8"]


def test_words_of_the_world_are_few_tokens(tokenizer):
    text = " ".join(message["content"] for messages in plain_conversations(200) for message in messages)
    assert len(tokenizer(text).input_ids) < 1.6 * len(text.split())


def test_the_template_writes_llama_3s_turns(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_tools_are_told_in_the_system_turn(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert text.count("<|start_header_id|>system") == 1
    assert text.index("Be kind.") < text.index('"name": "add"') < text.index("<|start_header_id|>user")


def test_it_answers_held_out_questions_and_stops():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parley.config import GenerationSection
    from parley.inference.generate import generate

    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    questions = heldout_questions()
    settings = GenerationSection(max_new_tokens=48, temperature=0)
    answers = generate(model, tokenizer, [question.messages for question in questions], settings)
    style, accuracy = rate(questions, answers)
    assert style == 0
    assert accuracy >= 0.95
