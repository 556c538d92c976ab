"""A server on the loopback interface, in a thread, with real models and OpenAI's client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from parley.config import DEMO_MODEL, LLAMA_PROJECTIONS, RunConfig
from parley.data.render import render
from parley.inference.generate import make_decoder
from parley.inference.prompts import end_of_turn_ids
from parley.inference.scheduler import Scheduler
from parley.models.load import load_model
from parley.serving.address import bind
from parley.serving.app import create_app
from parley.serving.limits import Limits
from parley.serving.loading import load_for_inference
from parley.serving.server import Server
from parley.serving.service import ServedModel, Service
from parley.training.run_folder import RunFolder

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
ASKED = "What is the weather at sea?"


@dataclass
class Running:
    """A server that answers; `client` is OpenAI's, which does not try again by itself."""

    server: Server
    service: Service
    port: int
    api_key: str = "none"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=self.api_key, max_retries=0, timeout=60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def scheduler(self) -> Scheduler:
        return self.service.scheduler

    def until_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.scheduler.counts.active or self.scheduler.counts.waiting:
            assert time.monotonic() < deadline, self.scheduler.counts
            time.sleep(0.005)


def teach(model: Any, tokenizer: Any, turns: list[dict[str, Any]], tools: Any, rate: float, steps: int) -> None:
    """A few steps on one conversation, until it is answered so."""
    row = render(tokenizer, turns, tools=tools)
    ids, mask = torch.tensor([row.input_ids]), torch.tensor([row.mask])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def config_of(output: Path) -> RunConfig:
    return RunConfig.create(
        {
            "output": str(output),
            "model": {"name": DEMO_MODEL, "device": "cpu"},
            "generation": {"temperature": 0, "min_p": 0, "max_new_tokens": 48},
        }
    )


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose adapter answers differently from its base model."""
    from peft import LoraConfig, get_peft_model

    config = config_of(tmp_path_factory.mktemp("runs") / "pirate")
    model, tokenizer = load_model(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(r=8, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM"))
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Arr! Be welcome aboard, matey."}]
    teach(tuned, tokenizer, turns, None, rate=1e-2, steps=8)
    folder = RunFolder.create(config)
    folder.save_weights(tuned, tokenizer, full=False)
    return folder


@pytest.fixture(scope="session")
def calling_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run, of all weights, that has learned to call the weather's tool."""
    config = config_of(tmp_path_factory.mktemp("runs") / "caller")
    model, tokenizer = load_model(config.model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        table = model.get_input_embeddings().weight
        table += 0.05 * torch.randn_like(table)  # untrained braces get embeddings apart from those of quotes
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "sea"}}}
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    teach(model, tokenizer, turns, [WEATHER], rate=2e-3, steps=30)
    folder = RunFolder.create(config)
    folder.save_weights(model, tokenizer, full=True)
    return folder


@pytest.fixture(scope="module")
def serving() -> Iterator[Callable[..., Running]]:
    """`serving(source, max_num_seqs=4, ...)`: a server for it, stopped at the end of the module."""
    running: list[tuple[Running, threading.Thread]] = []

    def start(
        source: str | Path,
        *,
        drain: float = 5,
        stop_ids: list[int] | None = None,
        max_num_seqs: int = 4,
        max_model_len: int = 512,
        max_queue: int = 64,
        api_key: str | None = None,
        **limits: Any,
    ) -> Running:
        loaded = load_for_inference(str(source))
        decoder = make_decoder(loaded.model, slots=max_num_seqs, length=max_model_len)
        if stop_ids is None:
            stop_ids = end_of_turn_ids(loaded.model, loaded.tokenizer)
        scheduler = Scheduler(decoder, loaded.tokenizer, stop_ids, queue_limit=max_queue)
        model = ServedModel(
            loaded.tokenizer,
            loaded.names,
            loaded.settings,
            loaded.system,
            decoder.length,
            decoder.vocab_size,
            loaded.control_tokens,
        )
        service = Service(model, scheduler)
        bound, ready = bind("127.0.0.1", 0), threading.Event()
        all_limits = Limits(max_open_requests=max_num_seqs + max_queue, **limits)
        app = create_app(service, limits=all_limits, api_key=api_key)
        server = Server(app, bound, scheduler, all_limits, drain_seconds=drain, on_ready=ready.set)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        handle = Running(server, service, bound.getsockname()[1], api_key or "none")
        thread.start()
        running.append((handle, thread))
        assert ready.wait(20)
        return handle

    yield start
    for handle, thread in running:
        handle.server.should_exit = True
        thread.join(20)
        handle.scheduler.close(drain=False)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def tuned(serving: Callable[..., Running], tuned_run: RunFolder) -> Running:
    """The run, under the names "pirate" and "parley-demo"."""
    return serving(tuned_run.path)


@pytest.fixture(scope="module")
def caller(serving: Callable[..., Running], calling_run: RunFolder) -> Running:
    return serving(calling_run.path)


@pytest.fixture(scope="module")
def endless(serving: Callable[..., Running], tiny_llama_folder: Path) -> Running:
    """A model that never ends an answer by itself, and a context for long ones."""
    return serving(
        tiny_llama_folder,
        max_model_len=2048,
        stop_ids=[],
        max_queue=4,
        max_body_bytes=2**20,
        body_timeout=1,
        send_timeout=1,
    )


@pytest.fixture(scope="session")
def alone(tuned_run: RunFolder) -> Callable[..., str]:
    """`alone(question, base=False)`: the greedy answer through transformers' own generate."""
    from contextlib import nullcontext

    model, tokenizer = tuned_run.load()

    def answer(question: str, *, base: bool = False, tokens: int = 48) -> str:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with model.disable_adapter() if base else nullcontext():
            out = model.generate(**ids, do_sample=False, max_new_tokens=tokens, eos_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer
