"""`parley serve`."""

from __future__ import annotations

import logging
import socket
import warnings
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parley.cli.loading import TrustRemoteCode
from parley.cli.terminal import err, importing, out, renamed_option, require_extra
from parley.errors import ModelError
from parley.text import print_text

if TYPE_CHECKING:
    from parley.serving.service import ServedModel

DEFAULT_MAX_NUM_SEQS = 32
DEFAULT_MAX_MODEL_LEN = 4096
MAX_NUM_SEQS, MAX_MODEL_LEN, MAX_QUEUE, MAX_DRAIN = 4096, 2**24, 2**20, 86400  # beyond them a number is mistyped


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
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, max=MAX_NUM_SEQS, help="Requests decoded at a time; without: 32.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=8, max=MAX_MODEL_LEN, help="Tokens of prompt and output; without: the model's, up to 4096."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, max=MAX_QUEUE, help="Requests that may wait for a slot.")] = 256,
    drain: Annotated[
        float, typer.Option(min=1, max=MAX_DRAIN, help="Seconds to finish open requests in when stopped.")
    ] = 30,
    engine: Annotated[Engine, typer.Option(help="vllm hands the run to `vllm serve`.")] = Engine.parley,
    trust_remote_code: TrustRemoteCode = False,
    slots: Annotated[int | None, typer.Option(min=1, max=MAX_NUM_SEQS, hidden=True)] = None,
    length: Annotated[int | None, typer.Option(min=8, max=MAX_MODEL_LEN, hidden=True)] = None,
    queue: Annotated[int | None, typer.Option(min=0, max=MAX_QUEUE, hidden=True)] = None,
) -> None:
    """Serve a run, tuned and base, to OpenAI's clients.

    Example: parley serve runs/demo
    """
    max_num_seqs = renamed_option("--slots", slots, "--max-num-seqs", max_num_seqs)
    max_model_len = renamed_option("--length", length, "--max-model-len", max_model_len)
    max_queue = renamed_option("--queue", queue, "--max-queue", max_queue)
    from parley.serving.address import bind, check_api_key

    # Address and key come first: a server that may not start should not load a model.
    check_api_key(host, api_key)
    if engine is Engine.vllm:
        _serve_with_vllm(
            source,
            api_key,
            host=host,
            port=port,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            trust_remote_code=trust_remote_code,
        )
    require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
    # The port is bound before loading, so that a port in use is reported at once.
    bound = bind(host, port)
    _quiet_libraries()
    _serve(
        source,
        bound,
        api_key,
        max_num_seqs=max_num_seqs or DEFAULT_MAX_NUM_SEQS,
        max_model_len=max_model_len or DEFAULT_MAX_MODEL_LEN,
        max_queue=max_queue,
        drain=drain,
        trust_remote_code=trust_remote_code,
    )


def _serve(
    source: str,
    bound: socket.socket,
    api_key: str | None,
    *,
    max_num_seqs: int,
    max_model_len: int,
    max_queue: int,
    drain: float,
    trust_remote_code: bool,
) -> None:
    with importing():
        from parley.inference.generate import make_decoder
        from parley.inference.prompts import end_of_turn_ids
        from parley.inference.scheduler import Scheduler
        from parley.serving.app import create_app
        from parley.serving.limits import Limits
        from parley.serving.loading import load_for_inference
        from parley.serving.server import Server
        from parley.serving.service import ServedModel, Service

    loaded = load_for_inference(source, trust_remote_code=trust_remote_code)
    # Before the decoder allocates its KV cache, so that a run with changed files is refused early.
    if loaded.golden is not None:
        _check_golden(loaded.golden, loaded.tokenizer)
    decoder = make_decoder(loaded.model, slots=max_num_seqs, length=max_model_len)
    model = ServedModel(
        tokenizer=loaded.tokenizer,
        names=loaded.names,
        settings=loaded.settings,
        system=loaded.system,
        max_model_len=decoder.length,
        vocab_size=decoder.vocab_size,
        control_tokens=loaded.control_tokens,
    )
    stop_ids = end_of_turn_ids(loaded.model, loaded.tokenizer)
    with Scheduler(decoder, loaded.tokenizer, stop_ids, queue_limit=max_queue) as scheduler:
        # Every request that can be open is decoding or queued: memory is bounded by their number.
        limits = Limits(max_open_requests=max_num_seqs + max_queue)
        app = create_app(Service(model, scheduler), limits=limits, api_key=api_key)
        on_ready = partial(_print_banner, model, bound, max_num_seqs, api_key)
        Server(app, bound, scheduler, limits, drain_seconds=drain, on_ready=on_ready).run_until_signal()


def _check_golden(golden: Path, tokenizer: object) -> None:
    """Raises ModelError where the run's golden conversations get other token ids than in training."""
    from parley.serving.check_golden import check_golden

    mismatch = check_golden(golden, tokenizer)
    if mismatch is not None:
        for line in mismatch.lines():
            print_text(err, line, wrap=False)
        raise ModelError(
            f"{golden}: the tokenizer or its template is not the one the run was trained with; restore the run's files"
        )


def _print_banner(model: ServedModel, bound: socket.socket, max_num_seqs: int, api_key: str | None) -> None:
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    # The first name is the tuned model, which the example asks.
    name = next(iter(model.names))
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    lines = [
        f"Parley serves {' and '.join(model.names)} at {address}/v1",
        f"{max_num_seqs} requests at a time, {model.max_model_len} tokens each, prompt included; Ctrl-C stops",
        "",
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
        f"""  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'""",
    ]
    for line in lines:
        print_text(out, line, wrap=False)


def _serve_with_vllm(source: str, api_key: str | None, **options: Any) -> None:
    from parley.models.tokenizer import read_tokenizer
    from parley.serving.vllm import find_vllm, run_vllm, vllm_arguments
    from parley.training.run_folder import RunFolder

    program = find_vllm()
    arguments = vllm_arguments(source, **options)
    if RunFolder.is_run(source):
        run = RunFolder.open(source)
        _check_golden(run.golden, read_tokenizer(run.weights, run.config.model))
    run_vllm(program, arguments, api_key)


def _quiet_libraries() -> None:
    """As terminal.quiet_libraries, but on stderr and without importing `datasets`, which serving does not need."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("parley").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"(bitsandbytes|peft|torch|transformers)\b")
