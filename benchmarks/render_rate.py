"""Rate of rendering rows on one core, and whether ids and masks are right.

    python benchmarks/render_rate.py TOKENIZER_FOLDER ROWS.jsonl

ROWS has one object a line with `instruction`, `response` and optionally `context`. Prints one line of JSON: rows a CPU
second (template, encoding and mask; reading the file and the checks are not timed), one by one and in batches, and
the rate of apply_chat_template alone, which makes no mask, as a reference for the speed of the core; then how many
rows have apply_chat_template's own ids, and how many masks decode to the trimmed response and one end-of-turn token.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from time import process_time
from typing import Any

os.environ |= {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from transformers import AutoTokenizer

from parley.data.example import Example
from parley.data.render import Rendered, pin_date, render, render_many

BATCH = 1000


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    question = "\n\n".join(part for part in (row.get("context"), row["instruction"]) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["response"]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("rows", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    pin_date(tokenizer)
    with arguments.rows.open(encoding="utf-8") as lines:
        rows = [conversation(json.loads(line)) for line in lines]
    end_of_turn = render(tokenizer, [*rows[0][:1], {"role": "assistant", "content": "a"}]).input_ids[-1]

    start = process_time()
    single = [render(tokenizer, messages) for messages in rows]
    single_s = process_time() - start
    start = process_time()
    stock = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in rows]
    stock_s = process_time() - start
    start = process_time()
    batched: list[Any] = []
    for first in range(0, len(rows), BATCH):
        batched += render_many(
            tokenizer, [Example("row", messages=messages) for messages in rows[first : first + BATCH]]
        )
    batched_s = process_time() - start

    print(
        json.dumps(
            {
                "rows": len(rows),
                "rows_per_s": round(len(rows) / single_s),
                "rows_per_s_batched": round(len(rows) / batched_s),
                "apply_chat_template_rows_per_s": round(len(rows) / stock_s),
                "ids_equal": sum(ids == row.input_ids for ids, row in zip(stock, single, strict=True)),
                "masks_right": sum(
                    right_mask(tokenizer, end_of_turn, *pair) for pair in zip(rows, single, strict=True)
                ),
                "batched_equal": sum(a == b for a, b in zip(single, batched, strict=True)),
                "threads": 1,
            }
        )
    )


def right_mask(tokenizer: Any, end_of_turn: int, messages: list[dict[str, Any]], rendered: Rendered) -> bool:
    supervised = [id for id, trained in zip(rendered.input_ids, rendered.mask, strict=True) if trained]
    response = messages[-1]["content"].strip()
    expected = response + tokenizer.decode([end_of_turn]) if response else ""
    return tokenizer.decode(supervised, clean_up_tokenization_spaces=False) == expected


if __name__ == "__main__":
    main()
