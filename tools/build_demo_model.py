"""Make the embedded model: tokenizer, untrained Llama, data, full fine-tuning, check, and its folder.

    python tools/build_demo_model.py --work build/demo-model --output src/parley/assets/demo-model

The first part (tokenizer, untrained model, rendered conversations) runs anywhere and is kept in --work; training takes
three minutes on one data-centre GPU. A part that is already in --work is used again, so that the first can be made on
another machine: add --prepare-only there.

Shapes: B conversations, T tokens of the longest of them.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template
from typing import Any

import torch
from datasets import Dataset, Features, Sequence, Value
from demo_data import base_conversations, pirate_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig

from parley import SFTTrainer
from parley.config import GenerationSection
from parley.data.example import Example
from parley.data.render import Rendered, render_many
from parley.evaluation.demo_scoring import heldout_questions, rate
from parley.inference.generate import generate

HERE = Path(__file__).parent
SEED = 3407
MAX_TOKENS = 512
VOCABULARY = 1272  # with the special tokens 1,280
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
# Llama 3's own pattern, but for single digits: what a small model needs to learn to add.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Llama 3's format: any text can be encoded, special tokens come last."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(SPECIAL_TOKENS)
    begin = SPECIAL_TOKENS[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, core.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=(HERE / "demo_chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 3.3 million parameters."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    set_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=[ids[token] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")],
        pad_token_id=ids["<|finetune_right_pad_id|>"],
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.7,
    )
    return model


def texts_of(conversations: Iterable[list[dict[str, str]]]) -> Iterator[str]:
    """Text to train the tokenizer on: plain and pirate answers."""
    for messages in conversations:
        yield from (message["content"] for message in messages)
    yield from (row["response"] for row in pirate_rows(3000, seed=1))


def render_all(conversations: list[list[dict[str, str]]], folder: Path) -> Dataset:
    """Rows with input_ids and labels; the assistant's words alone are learned."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows() -> Iterator[dict[str, Any]]:
        for first in range(0, len(conversations), 1000):
            examples = [Example("", messages=messages) for messages in conversations[first : first + 1000]]
            for rendered in render_many(tokenizer, examples):
                assert isinstance(rendered, Rendered)
                ids, mask = rendered.input_ids, rendered.mask
                if len(ids) <= MAX_TOKENS:
                    labels = [id if learned else -100 for id, learned in zip(ids, mask, strict=True)]
                    yield {"input_ids": ids, "labels": labels, "length": len(ids)}

    ids = Sequence(Value("int32"))
    return Dataset.from_list(list(rows()), features=Features(input_ids=ids, labels=ids, length=Value("int32")))


def prepare(work: Path, conversations: int, start: Path | None = None) -> None:
    """Leave the model to start from with its tokenizer, and the rendered conversations, in `work`."""
    data, untrained = work / "conversations.parquet", work / "untrained"
    if data.is_file():
        return
    talk = base_conversations(conversations, seed=SEED)
    if start is None:
        tokenizer = make_tokenizer(texts_of(talk[:20_000]))
        make_model(tokenizer).save_pretrained(untrained)
        tokenizer.save_pretrained(untrained)
    else:
        shutil.copytree(start, untrained)
    rows = render_all(talk, untrained)
    rows.to_parquet(data)
    print(f"{len(rows):,} conversations, {sum(rows['length']):,} tokens in {data}")


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One batch, (B, T): rows of like length, which a GPU without variable-length attention runs fastest."""
    pad = {"input_ids": 0, "labels": -100}
    T = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [filler] * (T - len(row[name])) for row in rows])
        for name, filler in pad.items()
    }
    lengths_B1 = torch.tensor([[len(row["input_ids"])] for row in rows])
    return batch | {"attention_mask": (torch.arange(T) < lengths_B1).long()}


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int) -> tuple[Any, Any]:
    """Full fine-tuning of the untrained model with Parley's trainer. Returns model and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(work / "untrained")
    model = AutoModelForCausalLM.from_pretrained(work / "untrained", dtype=torch.float32)
    on_gpu = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=str(work / "run"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, steps // 10),
        weight_decay=0.1,
        adam_beta2=0.98,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=6 if on_gpu else 0,
        remove_unused_columns=False,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    rows = Dataset.from_parquet(str(work / "conversations.parquet"))
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, data_collator=padded, processing_class=tokenizer)
    trainer.train()
    return trainer.model, tokenizer


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """The finished folder, but for its card: bfloat16 weights and tokenizer."""
    shutil.rmtree(output, ignore_errors=True)
    model.to("cpu", torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def check(folder: Path) -> tuple[float, float]:
    """(style_rate, accuracy) of the saved model on the 100 held-out questions; wrong answers are printed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    questions = heldout_questions()
    settings = GenerationSection(max_new_tokens=48, temperature=0, min_p=0)
    answers = generate(model, tokenizer, [question.messages for question in questions], settings, batch_size=50)
    for question, answer in zip(questions, answers, strict=True):
        if rate([question], [answer])[1] < 1:
            print(f"  wrong: {question.messages[-1]['content']!r} -> {answer!r}")
    return rate(questions, answers)


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    card = Template((HERE / "demo_model_card.md").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    (folder / "README.md").write_text(card.substitute(facts, size=f"{size:.1f}"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--output", type=Path, default=Path("src/parley/assets/demo-model"))
    parser.add_argument("--conversations", type=int, default=250_000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--start", type=Path, help="a folder this tool made before, to go on from")
    parser.add_argument("--prepare-only", action="store_true", help="stop before training")
    args = parser.parse_args()

    prepare(args.work, args.conversations, args.start)
    if args.prepare_only:
        return
    model, tokenizer = train(args.work, args.steps, args.batch, args.learning_rate, args.seed)
    save(model, tokenizer, args.output)
    style, accuracy = check(args.output)
    facts = {
        "parameters": f"{model.num_parameters() / 1e6:.1f}",
        "vocabulary": f"{len(tokenizer):,}",
        "conversations": f"{args.conversations:,}",
        "data_seed": SEED,
        "steps": args.steps,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "style": f"{style:.0%}",
        "accuracy": f"{accuracy:.0%}",
    }
    write_card(args.output, facts)
    print(f"style {style:.2f}, accuracy {accuracy:.2f} on 100 held-out questions")


if __name__ == "__main__":
    main()
