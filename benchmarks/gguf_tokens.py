"""Token ids of llama.cpp against the tokenizer's own, on every row of a data file and on hard strings.

    python benchmarks/gguf_tokens.py --tokenizer FOLDER --data rows.jsonl

FOLDER holds a tokenizer with a chat template. It is written into a GGUF file with a tiny model and read back by
llama.cpp. Compared are every text of a row, as plain text and with control tokens read as such, and the conversation as
llama.cpp's own template engine renders it. Exits 1 where an id differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from parley.config import DataSection
from parley.data.control_tokens import control_tokens
from parley.data.date import pin_date
from parley.data.prepare import read_examples
from parley.data.render import render_prompt
from parley.evaluation.questions import last_question
from parley.exporting.gguf.architectures import architecture_of
from parley.exporting.gguf.convert import write_gguf
from parley.exporting.gguf.quantization import SCHEMES
from parley.exporting.gguf.vocabulary import read_vocabulary
from parley.exporting.llama_cpp import LlamaCppReader
from parley.exporting.merge import merged_weights
from parley.exporting.samples import Prompt
from parley.exporting.weights import CheckpointWeights
from parley.library_compat.xllamacpp import LlamaModel

HARD_STRINGS = Path(__file__).parents[1] / "tests" / "exporting" / "hard_strings.json"
CONTEXT = 8192


def write_model(tokenizer: Any, folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    weights, path = merged_weights(config, CheckpointWeights(folder), []), folder / "model.gguf"
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), [], "model")
    print(f"pre-tokenizer {vocabulary.pre}, {len(vocabulary.tokens):,} tokens")
    write_gguf(
        path, architecture_of(config, "model"), config, weights, vocabulary, SCHEMES["f16"], {"type": "model"}, 2
    )
    return path


def texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)


def compare_texts(model: LlamaModel, tokenizer: Any, texts: list[str], name: str) -> int:
    different = 0
    for special in (False, True):
        wanted = tokenizer(texts, add_special_tokens=False, split_special_tokens=not special).input_ids
        got = [model.tokenize(text, add_special=False, parse_special=special) for text in texts]
        wrong = [index for index in range(len(texts)) if got[index] != wanted[index]]
        kind = "control tokens read as such" if special else "plain text"
        print(f"{name}, {kind}: {len(texts) - len(wrong):,} of {len(texts):,} have the same ids")
        for index in wrong[:3]:
            print(f"  {texts[index][:80]!r}: {got[index][:12]} where the tokenizer has {wanted[index][:12]}")
        different += len(wrong)
    return different


def compare_prompts(reader: LlamaCppReader, tokenizer: Any, data: Path) -> int:
    control, same, count = control_tokens(tokenizer).pattern, 0, 0
    _, examples = read_examples(DataSection(source=str(data)))
    for example in examples:
        question = last_question(example)
        if question is None or any(control.search(str(message)) for message in question.messages):
            continue
        count += 1
        same += reader.prompt_ids(Prompt(question.messages)) == render_prompt(tokenizer, question.messages)
    print(f"prompts by llama.cpp's template engine: {same:,} of {count:,} have the same ids")
    return count - same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    pin_date(tokenizer)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    texts = ["\n".join(texts_of(row)) for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        path = write_model(tokenizer, Path(scratch))
        model = LlamaModel(path, CONTEXT, threads=2)
        hard = json.loads(HARD_STRINGS.read_text(encoding="utf-8"))
        different = compare_texts(model, tokenizer, hard, "hard strings")
        different += compare_texts(model, tokenizer, texts, "rows")
        model.close()
        with LlamaCppReader(path, CONTEXT, threads=2) as reader:
            different += compare_prompts(reader, tokenizer, options.data)
    print(f"{time.perf_counter() - started:.0f} s")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
