"""`parley serve`."""

from __future__ import annotations

import logging
import socket
import warnings
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli.terminal import err, importing, out
from parley.errors import ModelError
from parley.text import print_text

if TYPE_CHECKING:
    from parley.serving.service import Served


class Engine(StrEnum):
    parley = "parley"
    vllm = "vllm"


def serve(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or any model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="PARLEY_API_KEY", help="Clients must send it.", show_envvar=True)
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Answers written at a time; without: 32.")] = None,
    length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a prompt and its answer; without: the model's, up to 4096.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait for a slot.")] = 256,
    drain: Annotated[float, typer.Option(min=1, help="Seconds to finish answers in when stopped.")] = 30,
    engine: Annotated[Engine, typer.Option(help="vllm hands the run to `vllm serve`.")] = Engine.parley,
) -> None:
    """Serve a run, tuned and base, to OpenAI's clients.

    Example: parley serve runs/demo
    """
    from parley.serving.server import bind, check_key

    check_key(host, api_key)
    if engine is Engine.vllm:
        _hand_to_vllm(source, host, port, api_key, slots, length)
    bound = bind(host, port)
    _quiet()
    _serve(source, bound, api_key, slots or 32, length or 4096, queue, drain)


def _serve(
    source: str, bound: socket.socket, api_key: str | None, slots: int, length: int, queue: int, drain: float
) -> None:
    with importing():
        from parley.inference.hf_decoder import decoder_for
        from parley.inference.prompts import end_of_turn_ids
        from parley.inference.scheduler import Scheduler
        from parley.serving.app import create_app
        from parley.serving.loading import open_source
        from parley.serving.middleware import Limits
        from parley.serving.server import Server
        from parley.serving.service import Served, Service

    opened = open_source(source)
    if opened.golden is not None:
        _check(opened.golden, opened.tokenizer)
    decoder = decoder_for(opened.model, slots=slots, length=length)
    served = Served(
        tokenizer=opened.tokenizer,
        names=opened.names,
        settings=opened.settings,
        system=opened.system,
        length=decoder.length,
        vocabulary=opened.model.get_input_embeddings().num_embeddings,
    )
    ends = end_of_turn_ids(opened.model, opened.tokenizer)
    with Scheduler(decoder, opened.tokenizer, ends, queue_limit=queue) as scheduler:
        app = create_app(Service(served, scheduler), limits=Limits(open=slots + queue), api_key=api_key)
        greet = partial(_greet, served, bound, slots, api_key)
        Server(app, bound, scheduler, drain_seconds=drain, ready=greet).run_to_end()


def _check(golden: Path, tokenizer: object) -> None:
    from parley.serving.golden import check_golden

    difference = check_golden(golden, tokenizer)
    if difference is not None:
        for line in difference.lines():
            print_text(err, line, wrap=False)
        raise ModelError(
            f"{golden}: the tokenizer or its template is not the one the run was trained with; restore the run's files"
        )


def _greet(served: Served, bound: socket.socket, slots: int, api_key: str | None) -> None:
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    name = next(iter(served.names))
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    lines = [
        f"Parley serves {' and '.join(served.names)} at {address}/v1",
        f"{slots} answers at a time, {served.length} tokens each, prompt included; Ctrl-C stops",
        "",
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
        f"""  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'""",
    ]
    for line in lines:
        print_text(out, line, wrap=False)


def _hand_to_vllm(
    source: str, host: str, port: int, api_key: str | None, slots: int | None, length: int | None
) -> None:
    from transformers import AutoTokenizer

    from parley.serving.vllm import find_vllm, run_vllm, vllm_arguments
    from parley.training.run_folder import RunFolder

    program = find_vllm()
    arguments = vllm_arguments(source, host=host, port=port, slots=slots, length=length)
    if RunFolder.is_run(source):
        run = RunFolder.open(source)
        _check(run.golden, AutoTokenizer.from_pretrained(run.weights, local_files_only=True))
    run_vllm(program, arguments, api_key)


def _quiet() -> None:
    """Errors only, from the libraries; what Parley decided is said. (`datasets` is not wanted here, and slow.)"""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("parley").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"(bitsandbytes|peft|torch|transformers)\b")
