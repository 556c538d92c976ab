# %% [markdown]
# # 让模型学会海盗腔
#
# 在这个实验里，你会加载一个对话模型，和它聊天，用海盗口吻的对话微调它，然后再聊一次，听听有什么变化。
# 请依次运行每个单元格（支持 `# %%` 的编辑器会把它们显示为单元格；`labs/pirate.zh.ipynb` 是同样内容的笔记本），
# 也可以一次全部运行：
#
#     python labs/pirate.zh.py
#
# 默认使用 Parley 自带的一个很小的模型，任何机器上大约一分钟就能跑完。要换成真实的模型，只需改下面两行。
# 例如有一块 8 GB 显存的 GPU 时：
#
#     MODEL = "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"
#     DATA = "Peyton3995/dolly-15k-mistral-pirate"

# %%
MODEL = "parley-demo"
DATA = "parley-demo-pirate"

# %% [markdown]
# ## 所有设置都在这里
#
# - **LoRA** 冻结模型原有的权重，给每个投影层加上一对小矩阵。`r` 是它们的内部维度，也就是秩；两个矩阵的乘积按
#   `lora_alpha / r` 缩放。真正训练的参数只有大约 1%，甚至更少。
# - **批大小 2 x 4**：每八条对话做一次优化器更新。每次只处理两条，因此显存只按两条计算。
# - **学习率**：前 5 步升高，之后线性降到零。很小的模型可以用更高的学习率。
# - **温度 1.5 配合 min_p 0.1**：回答富于变化，但概率不到最可能词元十分之一的词元不会被采样。

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
# ## 1. 加载模型
#
# `dtype: auto` 表示：GPU 支持时用 bf16，较旧的 GPU 用 fp16，CPU 用 fp32。以 4 比特保存的模型会保持 4 比特。
# 有些对话模板会写入当天的日期。Parley 把日期固定下来，这样模型明天看到的词元和今天一样。

# %%
from parley.data.render import pin_date

model, tokenizer = parley.load_model(config.model)
pin_date(tokenizer, config.data.date)
print(f"{MODEL}: {model.num_parameters():,} parameters, {model.dtype}, on {model.device}")

# %% [markdown]
# ## 2. 和它聊天
#
# 对话模型读到的是一整段文本。**对话模板**（chat template）把每一轮对话写进这段文本，并用控制词元隔开。
# 下面先打印“Hello!”对应的提示，再流式打印模型的回答。已经处理过的词元的键和值会被缓存（KV 缓存），
# 所以每个新词元只需要计算一步，而不必重新处理整段文本。

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
# ## 3. 挂上 LoRA 适配器
#
# 从这里开始，模型的权重被冻结，只训练适配器。B 矩阵初始为零，所以此刻模型的回答和之前完全一样。

# %%
from parley.models.adapters import trainable_summary

model = parley.attach_lora(model, config.lora, seed=config.training.seed)
print(trainable_summary(model))

# %% [markdown]
# ## 4. 加载数据
#
# Dolly 格式的数据行：一条指令（instruction）、有时有一段上下文（context）、一个回答（response），这里的回答是海盗口吻。

# %%
from parley.data.sources import read_rows

rows = read_rows(config.data.source, config.data)
print(f"{len(rows):,} rows; the first:")
print({name: rows[0][name] for name in ("instruction", "context", "response")})

# %% [markdown]
# ## 5. 把数据行变成对话
#
# 系统、用户、助手三种角色。用户的话由上下文、一个空行和指令组成，空的部分省略。`parley train` 会自己完成这一步
# （它能识别列名），这里写出来的就是它做的全部事情。另外留出一部分数据不参与训练，第 9 步会用到。

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
# ## 6. 词元与掩码
#
# 模型要学的是助手说的话，而不是用户说的话。因此只有助手的词元计入损失，其中包括结束这一轮的词元：没有它，模型就学不会
# 停下来。`render` 一次返回词元编号和掩码；标签 -100 表示这个词元不计入损失。超过最大长度的对话会被丢弃。
#
# 训练之前一定要看一看这里。计入损失的词元带有颜色；大多数失败的微调在这里就能看出问题。

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
# ## 7. 训练之前：显存、回答、留出集损失
#
# 训练器是 TRL 的训练器加上 Parley 的掩码。`sft_config` 把设置转换成它的参数，并说明自动选择了什么：
# GPU 上用 8 比特 AdamW 节省显存，CPU 上用更快的融合版 AdamW。
#
# **留出集损失**是模型对没有见过的回答，平均每个词元的负对数似然。下面的问题用贪心解码（温度为 0）回答，
# 因此回答的变化只可能来自训练。

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
# ## 8. 训练
#
# 观察损失。一开始下降很快，模型在学习说话的风格；之后下降变慢。

# %%
trainer.train()

peak = memory_peak(device)
more = peak - meter.before
print(f"trained {meter.seconds():.0f} s ({meter.seconds() / 60:.1f} min)")
print(f"peak memory {peak:.2f} GiB ({peak / total:.1%} of {total:.1f} GiB)")
print(f"of it for training {more:.2f} GiB ({more / total:.1%})")

# %% [markdown]
# ## 9. 再聊一次，比较差别
#
# 同样的问题，同样的留出集损失，它也应该下降。如果训练数据上的损失下降而留出集上的损失上升，说明模型过拟合了：
# 减少训练步数，或者增加数据。

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
# ## 10. 保存
#
# 只保存适配器，采用 PEFT 的格式，连同分词器和对话模板，一共几 MB，与训练时用的基础模型配合使用。

# %%
adapter = config.output / "adapter"
model.save_pretrained(adapter)
tokenizer.save_pretrained(adapter)
print(f"saved in {adapter}: {sum(file.stat().st_size for file in adapter.iterdir()) / 1e6:.1f} MB")

# %% [markdown]
# ## 接下来
#
# - 每次只改一个设置再运行：`r` 改成 4、学习率提高十倍、训练 10 步或 1,000 步。留出集损失和回答有什么变化？
# - 问一些数据里从未提到的问题。哪些能力保留了，哪些丢失了？
# - 把最上面的两行换成真实的模型和数据集。
# - 同样的流程只用一条命令，还会生成网页报告：

# %%
print(f"parley chat {adapter}")
print(f"parley train --model {MODEL} --data {DATA} --output runs/pirate")
