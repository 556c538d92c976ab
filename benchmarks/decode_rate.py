"""How fast the decoder answers.

    python benchmarks/decode_rate.py                                     # on a CPU: the embedded model
    OMP_NUM_THREADS=1 python benchmarks/decode_rate.py --cpu-time        # the same where other processes run
    python benchmarks/decode_rate.py --model DIR --quantization nf4      # on a GPU
    python benchmarks/decode_rate.py --model DIR --against transformers  # its generate in the same run
    python benchmarks/decode_rate.py --model DIR --profile               # where a token's time goes

Prints one line for people and one RESULT line of JSON for each measurement. Tokens are counted from the call that
admits a prompt to the last token on the host, but for batches, where prompts are read before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

import parley
from parley.config import DEMO_MODEL, LLAMA_PROJECTIONS, GenerationSection, RunConfig
from parley.data.render import render_prompt
from parley.evaluation.demo_scoring import heldout_questions
from parley.inference.chat import ChatSession
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.generate import end_of_turn_ids
from parley.inference.interface import DecodeRequest

GREEDY = GenerationSection(temperature=0)
NO_ENDS: frozenset[int] = frozenset()


def report(what: str, value: float, unit: str, **more: Any) -> None:
    print(f"{what:58} {value:12,.1f} {unit}")
    print("RESULT " + json.dumps({"what": what, "value": round(value, 2), "unit": unit} | more), flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def with_adapter(model: Any) -> Any:
    """LoRA r = 16 on all projections, off its start so that it says something."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=list(LLAMA_PROJECTIONS), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return model.eval()


def prompts_of(count: int, tokens: int, vocabulary: int = 20000) -> list[list[int]]:
    rng = torch.Generator().manual_seed(tokens)
    return torch.randint(vocabulary, (count, tokens), generator=rng).tolist()


def answer(
    decoder: StaticCacheDecoder, requests: dict[int, DecodeRequest]
) -> tuple[dict[int, list[int]], float, float, float]:
    """The answers, and seconds from the start until prompts are read, until the first tokens and until the last."""
    synchronize()
    start = time.perf_counter()
    decoder.admit(requests)
    synchronize()
    read, first = time.perf_counter() - start, 0.0
    ids: dict[int, list[int]] = {slot: [] for slot in requests}
    while emitted := decoder.decode():
        first = first or time.perf_counter() - start
        for slot, tokens in emitted.items():
            ids[slot] += [token.id for token in tokens]
    return ids, read, first, time.perf_counter() - start


def rate(
    decoder: StaticCacheDecoder, rows: int, context: int, tokens: int, settings: GenerationSection, **more: Any
) -> float:
    """Tokens a second of `rows` answers of `tokens`: the median of three rounds."""
    settings = settings.model_copy(update={"max_new_tokens": tokens})
    requests = {
        slot: DecodeRequest(prompt, settings, NO_ENDS, slot, **more)
        for slot, prompt in enumerate(prompts_of(rows, context))
    }
    rates = []
    for _ in range(3):
        ids, read, _, whole = answer(decoder, requests)
        assert all(len(row) == tokens for row in ids.values())
        rates.append(rows * tokens / (whole - read if rows > 1 else whole))
    return statistics.median(rates)


def on_gpu(model: Any, quantization: str, slots: int, profile: bool) -> None:
    start = time.perf_counter()
    decoder = StaticCacheDecoder.of(model, slots=slots, length=1024)
    synchronize()
    made = time.perf_counter() - start
    decoder.warm_up()
    synchronize()
    of = f"{torch.cuda.get_device_name()}, {quantization}"
    report(f"{of}: made", made, "s")
    report(f"{of}: warmed up", time.perf_counter() - start - made, "s")
    sampled = GenerationSection(temperature=1.0, min_p=0.1)
    firsts = []
    for prompt in prompts_of(12, 200):
        settings = GREEDY.model_copy(update={"max_new_tokens": 4})
        firsts.append(1000 * answer(decoder, {0: DecodeRequest(prompt, settings, NO_ENDS, 0)})[2])
    report(
        f"{of}: first token of a 200-token prompt", statistics.median(firsts[2:]), "ms", worst=round(max(firsts[2:]), 2)
    )
    report(f"{of}: batch 1, greedy", rate(decoder, 1, 64, 512, GREEDY), "tokens/s")
    report(f"{of}: batch 1, sampled with min_p", rate(decoder, 1, 64, 512, sampled), "tokens/s")
    cut = GenerationSection(temperature=1.0, min_p=0, top_p=0.9, top_k=50)
    report(f"{of}: batch 1, sampled with top_k and top_p", rate(decoder, 1, 64, 256, cut), "tokens/s")
    for rows in (2, 4, 8, 16):
        report(f"{of}: batch {rows}", rate(decoder, rows, 64, 256, GREEDY), "tokens/s")
    for rows in (64,):
        report(f"{of}: batch {rows} at 512 to 640 of context", rate(decoder, rows, 512, 128, GREEDY), "tokens/s")
    report(f"{of}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if profile:
        for rows, context in ((1, 64), (64, 512)):
            show_kernels(decoder, rows, context)


def packed_on_gpu(model: Any, profile: bool) -> None:
    """4-bit weights without the 16-bit copies that a decoder makes where memory allows."""
    decoder = StaticCacheDecoder.of(model, slots=4, length=1024, fuse=False)
    decoder.warm_up()
    of = f"{torch.cuda.get_device_name()}, nf4 without copies"
    report(f"{of}: batch 1, greedy", rate(decoder, 1, 64, 512, GREEDY), "tokens/s")
    for rows in (2, 4):
        report(f"{of}: batch {rows}", rate(decoder, rows, 64, 128, GREEDY), "tokens/s")
    if profile:
        show_kernels(decoder, 1, 64)


def adapter_on_gpu(model: Any, quantization: str) -> None:
    decoder = StaticCacheDecoder.of(with_adapter(model), slots=64, length=1024)
    of = f"{torch.cuda.get_device_name()}, {quantization}, LoRA r = 16"
    for base in (False, True):
        voice = "base" if base else "tuned"
        report(f"{of}: batch 1, {voice}", rate(decoder, 1, 64, 256, GREEDY, base=base), "tokens/s")
    report(f"{of}: batch 64 at 512 to 576 of context", rate(decoder, 64, 512, 64, GREEDY), "tokens/s")


def show_kernels(decoder: StaticCacheDecoder, rows: int, context: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    settings = GREEDY.model_copy(update={"max_new_tokens": 100})
    decoder.admit({slot: DecodeRequest(p, settings, NO_ENDS, 0) for slot, p in enumerate(prompts_of(rows, context))})
    for _ in range(3):
        decoder.decode()
    tokens = 0
    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
        start = time.perf_counter()
        for _ in range(4):
            tokens += len(decoder.decode()[0])
        synchronize()
        wall = time.perf_counter() - start
    while decoder.decode():
        pass
    kernels = sorted(recorded.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in kernels)
    print(f"batch {rows}: {total / 1000:.2f} ms in kernels, {1000 * wall:.2f} ms in all, {tokens} tokens a row")
    for row in kernels[:18]:
        mean = row.device_time_total / row.count
        print(f"{row.device_time_total / 1000:9.3f} ms {row.count:6d} x {mean:8.2f} us  {row.key[:90]}")


def transformers_rate(model: Any, tokens: int, static: bool) -> float:
    ids = torch.tensor(prompts_of(1, 64), device=model.device)
    cache = {"cache_implementation": "static"} if static else {}
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **cache)
    rates = []
    for _ in range(4 if static else 3):
        synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        synchronize()
        rates.append(tokens / (time.perf_counter() - start))
    return max(rates)


def on_cpu(model: Any, tokenizer: Any, count: int, name: str, *, rounds: int, cpu_time: bool) -> None:
    """The same questions singly and in batches, alternating with transformers, so that both have the same load."""
    clock = time.process_time if cpu_time else time.perf_counter
    ends = frozenset(end_of_turn_ids(model, tokenizer))
    settings = GenerationSection(temperature=0, max_new_tokens=128)
    prompts = [render_prompt(tokenizer, question.messages) for question in heldout_questions()[:count]]
    truth: list[list[int]] = []  # transformers' answers one at a time
    for batch in (1, 8, 16):
        seconds, same = [], count
        for _ in range(rounds):
            # Made anew, untimed: the prompts of the round before are in the prefix cache.
            decoder = StaticCacheDecoder.of(model, slots=batch, length=640)
            start = clock()
            ours = in_batches(decoder, prompts, settings, ends)
            between = clock()
            theirs: list[list[int]] = []
            for at in range(0, count, batch):
                theirs += transformers_answers(model, prompts[at : at + batch], ends, settings.max_new_tokens)
            seconds.append((between - start, clock() - between))
            truth = truth or theirs
            same = min(same, sum(got == wanted for got, wanted in zip(ours, truth, strict=True)))
        tokens = sum(map(len, truth))
        faster = [round(his / own, 2) for own, his in seconds]
        mine, others = (tokens / statistics.median(part) for part in zip(*seconds, strict=True))
        report(f"{name}: {batch} at a time, parley", mine, "tokens/s", identical=f"{same} of {count}")
        of_rounds = {"parley_is_faster": statistics.median(faster), "by_round": faster}
        report(f"{name}: {batch} at a time, transformers", others, "tokens/s", **of_rounds)


def turns_on_cpu(model: Any, tokenizer: Any, name: str, turns: int = 40) -> None:
    """How long the first text takes as a chat grows: what was said before is not read again."""
    chat, firsts = ChatSession(model, tokenizer, GREEDY.model_copy(update={"max_new_tokens": 32})), []
    for question in heldout_questions()[:turns]:
        start = time.perf_counter()
        pieces = chat.say(question.messages[-1]["content"])
        next(pieces)
        firsts.append(1000 * (time.perf_counter() - start))
        for _ in pieces:
            pass
    chat.close()
    for turn in (2, turns // 2, turns):
        median = statistics.median(firsts[max(turn - 5, 1) : turn + 5])
        report(f"{name}: first text of a chat, around turn {turn}", median, "ms")


def in_batches(
    decoder: StaticCacheDecoder, prompts: Sequence[list[int]], settings: GenerationSection, ends: frozenset[int]
) -> list[list[int]]:
    """All answers; a slot is filled again as soon as its answer is over."""
    ids: list[list[int]] = [[] for _ in prompts]
    waiting, running = list(range(len(prompts))), dict[int, int]()
    while waiting or running:
        free = [slot for slot in range(decoder.slots) if slot not in running]
        fresh = {slot: waiting.pop(0) for slot in free[: len(waiting)]}
        running |= fresh
        if fresh:
            decoder.admit({slot: DecodeRequest(prompts[index], settings, ends, 0) for slot, index in fresh.items()})
        for slot, tokens in decoder.decode().items():
            answered = ids[running[slot]]
            answered += [token.id for token in tokens]
            if answered[-1] in ends or len(answered) == settings.max_new_tokens:
                decoder.release(slot)
                del running[slot]
    return ids


def transformers_answers(model: Any, prompts: list[list[int]], ends: frozenset[int], tokens: int) -> list[list[int]]:
    """Left padded, through its own generate; without the padding after an end."""
    pad, longest = model.generation_config.pad_token_id, max(map(len, prompts))
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=sorted(ends), pad_token_id=pad)
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
            generation_config=config,
        )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--quantization", default="none", choices=["none", "nf4"])
    parser.add_argument("--against", choices=["transformers"], help="on a GPU; on a CPU it always is")
    parser.add_argument("--adapter", action="store_true", help="with a LoRA adapter too")
    parser.add_argument("--profile", action="store_true", help="list the kernels of batch 1 and 64")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--questions", type=int, default=100, help="on a CPU, of the 100 held-out ones")
    parser.add_argument("--rounds", type=int, default=5, help="on a CPU, of which medians are reported")
    parser.add_argument(
        "--cpu-time", action="store_true", help="on a CPU: rates by the process's CPU time, for a busy machine"
    )
    args = parser.parse_args()
    section = {"name": args.model, "quantization": args.quantization}
    start = time.perf_counter()
    model, tokenizer = parley.load_model(RunConfig.create({"model": section}).model)
    report(f"{args.model}: loaded", time.perf_counter() - start, "s")
    if torch.cuda.is_available():
        on_gpu(model, args.quantization, args.slots, args.profile)
        if args.quantization == "nf4":
            packed_on_gpu(model, args.profile)
        if args.against:
            for static in (False, True):
                kind = "compiled static" if static else "dynamic"
                report(f"transformers, {kind} cache: batch 1", transformers_rate(model, 128, static), "tokens/s")
        if args.adapter:
            adapter_on_gpu(model, args.quantization)
        return
    rounds = {"rounds": args.rounds, "cpu_time": args.cpu_time}
    on_cpu(model, tokenizer, args.questions, args.model, **rounds)
    turns_on_cpu(model, tokenizer, args.model)
    if args.adapter:
        name = f"{args.model} with LoRA"
        on_cpu(with_adapter(model), tokenizer, args.questions, name, **rounds)


if __name__ == "__main__":
    main()
