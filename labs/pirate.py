# %% [markdown]
# # A model learns to talk like a pirate
#
# In this lab you load a chat model, talk to it, fine-tune it on conversations with a pirate, and talk to it again. Run
# the cells one after another (editors that know `# %%` show them as cells; `labs/pirate.ipynb` is the same as a
# notebook), or all at once:
#
#     python labs/pirate.py
#
# By default the lab runs on a very small model that comes with Parley, on any machine, in about a minute. For a real
# model, change the two lines below. With a GPU of 8 GB, for example:
#
#     MODEL = "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"
#     DATA = "Peyton3995/dolly-15k-mistral-pirate"

# %%
MODEL = "parley-demo"
DATA = "parley-demo-pirate"

# %% [markdown]
# ## The settings, all in one place
#
# - **LoRA** freezes the model's weights and adds a pair of small matrices to each projection. `r` is their inner
#   dimension, the rank; their product is scaled by `lora_alpha / r`. About 1% of the weights, or less, is trained.
# - **Batch 2 x 4**: eight conversations make one optimizer step. They are processed two at a time, so that memory is
#   that of two.
# - **Learning rate**: rises for 5 steps, then decays linearly to zero. A tiny model tolerates a higher one.
# - **Temperature 1.5 with min_p 0.1**: varied answers, but no token whose probability is below a tenth of the
#   likeliest one's.

# %%
import parley
from parley.models.device import pick_device

TINY = MODEL == "parley-demo"
STEPS = 200 if TINY else 1000

config = parley.RunConfig.create(
    {
        "output": "runs/pirate-lab",
        "model": {"name": MODEL, "max_seq_length": 2048, "dtype": "auto"},
        "data": {"source": DATA},
        "lora": {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "use_rslora": False},
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "warmup_steps": 5,
            "max_steps": STEPS,
            "learning_rate": 1e-3 if TINY else 2e-4,
            "weight_decay": 0.01,
            "lr_scheduler_type": "linear",
            "gradient_checkpointing": not TINY,
            "seed": 3407,
        },
        "generation": {"max_new_tokens": 512, "temperature": 1.5, "min_p": 0.1, "seed": 3407},
    }
)
config.output.mkdir(parents=True, exist_ok=True)
device = pick_device(config.model.device)

# %% [markdown]
# ## 1. Load the model
#
# `dtype: auto` is bf16 where the GPU supports it, fp16 on older ones, fp32 on a CPU. A checkpoint saved in 4 bits stays
# in 4 bits. Some chat templates write today's date. Parley pins it, so that the model sees the same tokens tomorrow.

# %%
from parley.data.render import pin_date

model, tokenizer = parley.load_model(config.model)
pin_date(tokenizer, config.data.date)
print(f"{MODEL}: {model.num_parameters():,} parameters, {model.dtype}, on {model.device}")

# %% [markdown]
# ## 2. Chat with it
#
# A chat model reads one long text. Its **chat template** writes the turns into that text, each between control tokens.
# Below is the prompt for "Hello!", and then the answer, streamed as it is generated. Keys and values of past tokens are
# cached (the KV cache), so that each new token costs one step instead of a pass over the whole text.

# %%
SYSTEM = "You are a helpful assistant."

hello = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello!"}]
print(tokenizer.apply_chat_template(hello, tokenize=False, add_generation_prompt=True))


def talk(*questions: str) -> None:
    """One conversation: every question is asked with all that was said before it."""
    session = parley.ChatSession(model, tokenizer, config.generation, system=SYSTEM)
    for question in questions:
        print(f"\nyou:   {question}\nmodel: ", end="")
        for piece in session.say(question):
            print(piece, end="", flush=True)
    print()


talk("Hello!", "What is the opposite of hot?")

# %% [markdown]
# ## 3. Attach LoRA adapters
#
# From here on the model's weights are frozen and the adapter is trained. Its B matrices start at zero: right now the
# model answers as before.

# %%
from parley.models.adapters import trainable_summary

model = parley.attach_lora(model, config.lora, seed=config.training.seed)
print(trainable_summary(model))

# %% [markdown]
# ## 4. Load the data
#
# Rows in Dolly's format: an instruction, sometimes a context to answer from, and a response, here a pirate's.

# %%
from parley.data.sources import read_rows

rows = read_rows(config.data.source, config.data)
print(f"{len(rows):,} rows; the first:")
print({name: rows[0][name] for name in ("instruction", "context", "response")})

# %% [markdown]
# ## 5. Turn rows into conversations
#
# System, user and assistant turns. The user turn is the context, a blank line, and the instruction; empty parts are
# left out. `parley train` does this itself (it recognises the columns); this is all there is to it. Some rows are held
# out;
# step 9 uses them.

# %%
from datasets import Dataset


def to_conversation(row: dict) -> dict:
    question = "\n\n".join(part for part in (row["context"], row["instruction"]) if part)
    turns = [("system", SYSTEM), ("user", question), ("assistant", row["response"])]
    return {"messages": [{"role": role, "content": text} for role, text in turns if text]}


conversations = Dataset.from_list([to_conversation(row) for row in rows])
parts = conversations.train_test_split(test_size=64, seed=config.training.seed)
print(f"{len(parts['train']):,} conversations to train on, {len(parts['test'])} set aside")

# %% [markdown]
# ## 6. Tokens and the mask
#
# The model learns what the assistant says, not what users say. Only the assistant's tokens count towards the loss,
# including the token that ends the turn: without it the model would not learn to stop. `render` returns token ids and
# mask in one pass; a label of -100 means that a token is not supervised. Conversations over the maximum length are
# dropped.
#
# Always look at this before you train. Supervised tokens are coloured; most failed fine-tuning can be seen here.

# %%
from rich.console import Console

from parley.data.preview import pieces, to_terminal

console = Console()
rendered = parley.render(tokenizer, parts["train"][0]["messages"])
console.print(to_terminal(pieces(tokenizer, rendered)))
print(f"{sum(rendered.mask)} of {len(rendered.input_ids)} tokens are learned")


def to_tokens(conversation: dict) -> dict:
    rendered = parley.render(tokenizer, conversation["messages"])
    labels = [token if learned else -100 for token, learned in zip(rendered.input_ids, rendered.mask, strict=True)]
    return {"input_ids": rendered.input_ids, "labels": labels}


tokens = parts.map(to_tokens, remove_columns=["messages"])
tokens = tokens.filter(lambda row: len(row["input_ids"]) <= config.model.max_seq_length)
for name, part in tokens.items():
    print(f"{name}: {len(part):,} conversations, {sum(map(len, part['input_ids'])):,} tokens")

# %% [markdown]
# ## 7. Before training: memory, answers, held-out loss
#
# The trainer is TRL's with Parley's masks. `sft_config` turns the settings into its arguments and reports what it
# chose: 8-bit AdamW saves memory on a GPU, fused AdamW is the fast one on a CPU.
#
# **Held-out loss** is the mean negative log-likelihood per token of answers that the model has not seen. The questions
# below are answered greedily (temperature 0), so that only training can change the answers.

# %%
from transformers import PrinterCallback

from parley.config import GenerationSection
from parley.inference.generate import generate
from parley.training.arguments import sft_config
from parley.training.callbacks import EventLog, ProgressLine
from parley.training.resource_usage import ResourceMeter, device_name, memory_peak, memory_total

QUESTIONS = ["Hello!", "What is the opposite of hot?", "What is 12 plus 7?", "Who are you?"]
GREEDY = GenerationSection(temperature=0, min_p=0, max_new_tokens=64)


def answers() -> list[str]:
    asked = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in QUESTIONS]
    return generate(model, tokenizer, asked, GREEDY)


args, notes = sft_config(config, config.output / "checkpoints", device)
print(*notes, sep="\n")
log = EventLog(config.output / "events.jsonl", device)
trainer = parley.SFTTrainer(
    model=model,
    args=args,
    train_dataset=tokens["train"],
    eval_dataset=tokens["test"],
    processing_class=tokenizer,
    callbacks=[log, ProgressLine(console, log)],
)
trainer.remove_callback(PrinterCallback)

answers_before, loss_before = answers(), trainer.evaluate()["eval_loss"]
meter, total = ResourceMeter(device), memory_total(device)
print(f"{device_name(device)}: {meter.before:.2f} of {total:.1f} GiB in use ({meter.before / total:.1%})")

# %% [markdown]
# ## 8. Train
#
# Watch the loss. It falls fast at first, while the model learns the style, and then slowly.

# %%
trainer.train()

peak = memory_peak(device)
more = peak - meter.before
print(f"trained {meter.seconds():.0f} s ({meter.seconds() / 60:.1f} min)")
print(f"peak memory {peak:.2f} GiB ({peak / total:.1%} of {total:.1f} GiB)")
print(f"of it for training {more:.2f} GiB ({more / total:.1%})")

# %% [markdown]
# ## 9. Chat again, and compare
#
# The same questions, and the same held-out loss. It must have fallen, too. If it falls on the training rows and rises
# on the held-out rows, the model is overfitting: train for fewer steps, or on more rows.

# %%
from rich.table import Table

talk("Hello!", "What is the opposite of hot?")

table = Table("", "before", "after")
loss_after = trainer.evaluate()["eval_loss"]
table.add_row("held-out loss", f"{loss_before:.3f}", f"{loss_after:.3f}")
for question, before, after in zip(QUESTIONS, answers_before, answers(), strict=True):
    table.add_row(question, before, after)
console.print(table)

# %% [markdown]
# ## 10. Save
#
# Only the adapter is written, in PEFT's format, with the tokenizer and its chat template: a few MB, to be used with the
# model it was trained on.

# %%
adapter = config.output / "adapter"
model.save_pretrained(adapter)
tokenizer.save_pretrained(adapter)
print(f"saved in {adapter}: {sum(file.stat().st_size for file in adapter.iterdir()) / 1e6:.1f} MB")

# %% [markdown]
# ## What next
#
# - Change one setting at a time and run again: `r` 4, a ten times higher learning rate, 10 steps, 1,000. What happens
#   to the held-out loss and the answers?
# - Ask about something that the data never mentions. What was kept, and what was lost?
# - Put a real model and data set into the two lines at the top.
# - The same as one command, with a report as a web page:

# %%
print(f"parley chat {adapter}")
print(f"parley train --model {MODEL} --data {DATA} --output runs/pirate")
