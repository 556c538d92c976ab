"""Load test of `parley serve`: latency, and whether each answer equals the one without load.

    python benchmarks/serve_load.py [RUN|MODEL] [--clients 64] [--seconds 60] [--max-num-seqs 32]

Starts the server in its own process, sends every request once without other load, then repeats them from many OpenAI
clients in this process: whole and streamed, greedy and sampled with a seed, to every served model. Prints a table and a
RESULT line of JSON; exits with 1 when a request failed or its answer differs from the one without load. Server and
clients share the cores, so times include both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from statistics import quantiles
from time import perf_counter
from typing import Any

import openai
import psutil
from rich.console import Console
from rich.table import Table

from parley.evaluation.demo_scoring import heldout_questions

QUESTIONS = 24
LONGEST = 48  # tokens of an answer


@dataclass
class Tally:
    """Seconds to the first text (of streams) and to the end, tokens, failed requests and wrong answers."""

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)


def serve(source: str, max_num_seqs: int) -> tuple[subprocess.Popen[str], str, float]:
    """Starts a server; returns its process, its address and the seconds it took to be ready."""
    begun = perf_counter()
    command = [sys.executable, "-m", "parley.cli.main", "serve", source, "--port", "0"]
    command += ["--max-num-seqs", str(max_num_seqs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r" at (http://\S+)/v1", line)
        if found:
            return process, found[1], perf_counter() - begun
    raise SystemExit("the server did not start")


def questions(models: list[str]) -> list[dict[str, Any]]:
    """Requests to each model, greedy and sampled with a seed."""
    requests = []
    for number, question in enumerate(heldout_questions()[:QUESTIONS]):
        for model in models:
            sampling = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}
            requests.append({"model": model, "messages": question.messages, "max_tokens": LONGEST, **sampling})
    return requests


async def complete(client: openai.AsyncOpenAI, request: dict[str, Any], stream: bool, tally: Tally) -> str:
    begun = perf_counter()
    if not stream:
        reply = await client.chat.completions.create(**request)
        tally.tokens += reply.usage.completion_tokens
        tally.whole_s.append(perf_counter() - begun)
        return reply.choices[0].message.content
    text = ""
    async for chunk in await client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.usage:
            tally.tokens += chunk.usage.completion_tokens
        elif chunk.choices[0].delta.content:
            if not text:
                tally.first_s.append(perf_counter() - begun)
            text += chunk.choices[0].delta.content
    tally.whole_s.append(perf_counter() - begun)
    return text


async def client_of(
    number: int, url: str, requests: list[dict[str, Any]], expected: list[str], until: float, tally: Tally
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        index = number
        while perf_counter() < until:
            index = (index + 1) % len(requests)
            try:
                text = await complete(client, requests[index], bool(number % 2), tally)
            except openai.OpenAIError as error:
                tally.lost.append(f"{requests[index]}: {error}")
                continue
            if text != expected[index]:
                tally.mixed.append(f"{requests[index]}: {text!r}, expected {expected[index]!r}")


async def load(url: str, clients: int, seconds: float) -> tuple[Tally, Tally, float]:
    """Tallies of one client alone and of all clients together, and the seconds the latter took."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        requests = questions([model.id async for model in client.models.list()])
        first, again = Tally(), Tally()
        alone = [await complete(client, request, stream=False, tally=first) for request in requests]
        streamed = [await complete(client, request, stream=True, tally=again) for request in requests]
        assert streamed == alone, "the same request alone gave two different answers"
    together, begun = Tally(), perf_counter()
    until = begun + seconds
    await asyncio.gather(*(client_of(number, url, requests, alone, until, together) for number in range(clients)))
    return again, together, perf_counter() - begun


def gauges(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("parley_") and "{" not in line}


def milliseconds(seconds: list[float]) -> tuple[float, float]:
    """The 50th and 99th percentile."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return round(cuts[49] * 1e3, 1), round(cuts[98] * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="parley-demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    arguments = parser.parse_args()
    process, url, ready_s = serve(arguments.source, arguments.max_num_seqs)
    try:
        server = psutil.Process(process.pid)
        before = server.memory_info().rss
        alone, together, took = asyncio.run(load(url, arguments.clients, arguments.seconds))
        left, after = gauges(url), server.memory_info().rss
        process.send_signal(signal.SIGTERM)
        ended = process.wait(30)
    finally:
        process.kill()
    result: dict[str, Any] = {
        "source": arguments.source,
        "clients": arguments.clients,
        "seconds": round(took, 1),
        "max_num_seqs": arguments.max_num_seqs,
        "answers": len(together.whole_s),
        "lost": len(together.lost),
        "mixed_up": len(together.mixed),
        "tokens_per_s": round(together.tokens / took),
        "answers_per_s": round(len(together.whole_s) / took, 1),
        "whole_ms_p50_p99": milliseconds(together.whole_s),
        "first_text_ms_p50_p99": milliseconds(together.first_s),
        "alone_whole_ms_p50_p99": milliseconds(alone.whole_s),
        "alone_first_text_ms_p50_p99": milliseconds(alone.first_s),
        "alone_tokens_per_s": round(alone.tokens / sum(alone.whole_s)),
        "slots_left": left["parley_active_slots"] + left["parley_waiting_requests"],
        "server_mib_before_after": (before >> 20, after >> 20),
        "ready_s": round(ready_s, 1),
        "exit_code": ended,
        "cores": len(os.sched_getaffinity(0)),
    }
    table = Table("", "", show_header=False, box=None)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
    for wrong in [*together.lost, *together.mixed][:5]:
        print(wrong)
    print("RESULT " + json.dumps(result))
    sys.exit(bool(together.lost or together.mixed or result["slots_left"] or ended))


if __name__ == "__main__":
    main()
