"""The export page: a run for other programs, with what it takes, its proof, its files and the command that runs it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from parley.errors import ParleyError, UsageError
from parley.studio.exports import estimated, export_file, export_folder, finished_exports, zipped
from parley.studio.i18n import N_
from parley.studio.state import Studio
from parley.studio.web import StudioDep, fragment, page, read_form

router = APIRouter(prefix="/export")
TARGETS = {
    "gguf": N_("one file for llama.cpp, LM Studio and others"),
    "ollama": N_("for Ollama: the same file, with a Modelfile"),
    "merged": N_("the whole model, for vLLM and transformers"),
    "vllm": N_("the adapter alone, for vLLM beside its base"),
    "adapter": N_("the adapter alone, in PEFT's format"),
    "gguf-lora": N_("the adapter alone, for llama.cpp"),
    "mlx": N_("the adapter alone, for MLX on a Mac"),
}
GGUF_QUANTS = {
    "q8_0": N_("8 bits: hardly a difference, half the size of 16"),
    "q6_k": N_("6 bits: little difference"),
    "q5_k_m": N_("5 bits"),
    "q4_k_m": N_("4 bits: small and quick, some difference"),
    "q5_0": N_("5 bits, an older form"),
    "q4_0": N_("4 bits, an older form"),
    "f16": N_("16 bits"),
    "bf16": N_("16 bits, wider range"),
    "f32": N_("32 bits: for comparing"),
}
QUANTS = {
    "gguf": GGUF_QUANTS,
    "ollama": GGUF_QUANTS,
    "merged": {"bf16": N_("16 bits, wider range"), "f16": N_("16 bits"), "f32": N_("32 bits: for comparing")},
}
ROWS = (
    N_("read by"),
    N_("compared on"),
    N_("prompts with the same token ids"),
    N_("left out: control-token text"),
    N_("tokens compared"),
    N_("most likely token the same"),
    N_("KL divergence, mean and worst"),
    N_("largest logit difference"),
    N_("held-out loss, trained and exported"),
    N_("greedy answers the same"),
)
STAGES = (N_("starting"), N_("measuring the trained model"), N_("writing"), N_("comparing"))
STATUSES = (N_("verified"), N_("not verified"), N_("failed"))


@router.get("", response_model=None)
def export(request: Request, studio: StudioDep, run: str = "", target: str = "gguf") -> Response:
    runs = _exportable(studio)
    run_id = studio.run_id(studio.run_path(run)) if run else next(iter(runs), "")
    if target not in TARGETS:
        raise UsageError(f"{target}: no such export; reload the page")
    return page(request, "export.html", runs=runs, run_id=run_id, target=target, targets=TARGETS, quants=QUANTS)


@router.get("/estimate", response_model=None)
async def estimate(request: Request, studio: StudioDep, run: str, target: str, quant: str = "") -> Response:
    """Size and time beforehand, or why not."""
    try:
        target, quant = _checked(target, quant)
        found = await studio.worker.call(estimated, str(studio.run_path(run)), target, quant or None)
    except ParleyError as error:
        return fragment(request, "_estimate.html", error=str(error), size=0, seconds=0)
    return fragment(request, "_estimate.html", error=None, size=found[0], seconds=found[1])


@router.get("/quants", response_model=None)
def quants(request: Request, target: str) -> Response:
    """The types that a target can be written in."""
    return fragment(request, "_quants.html", quants=QUANTS.get(target, {}))


@router.post("/start", response_model=None)
async def start(request: Request, studio: StudioDep) -> Response:
    form = await read_form(request)
    run_id = form.get("run", "")
    target, quant = _checked(form.get("target", ""), form.get("quant", ""))
    run = studio.run_path(run_id)
    name = target if not quant else f"{target}-{quant}"
    if (run / "exports" / name).exists():
        raise UsageError(f"{name}: this run has that export already; it is listed below")
    studio.exports.start(run, studio.run_id(run), target, quant)
    return fragment(request, "_exports.html", **await _listed(studio, run_id))


@router.get("/list", response_model=None)
async def listed(request: Request, studio: StudioDep, run: str) -> Response:
    """Exports of a run: those under way with what was compared so far, and those that are there."""
    return fragment(request, "_exports.html", **await _listed(studio, run))


@router.post("/remove/{job_id}", response_model=None)
async def remove(request: Request, studio: StudioDep, job_id: str) -> Response:
    """End an export that is under way, or forget one that failed."""
    run_id = studio.exports.job(job_id).run_id
    studio.exports.remove(job_id)
    return fragment(request, "_exports.html", **await _listed(studio, run_id))


@router.get("/file", response_model=None)
def file(studio: StudioDep, run: str, name: str, file: str) -> Response:
    path = export_file(export_folder(studio.run_path(run), name), file)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.get("/zip", response_model=None)
def archive(studio: StudioDep, run: str, name: str) -> Response:
    """All files of an export, streamed."""
    folder = export_folder(studio.run_path(run), name)
    disposition = f"attachment; filename*=UTF-8''{quote(folder.name)}.zip"
    return StreamingResponse(
        zipped(folder), media_type="application/zip", headers={"Content-Disposition": disposition}
    )  # fmt: skip


def _checked(target: str, quant: str) -> tuple[str, str]:
    """A target with a type that it takes. Raises UsageError."""
    if target not in TARGETS or (quant and quant not in QUANTS.get(target, {})):
        raise UsageError(f"{target} {quant}: no such export; reload the page")
    default = next(iter(QUANTS[target])) if target in ("gguf", "ollama") else ""
    return target, quant or default


async def _listed(studio: Studio, run_id: str) -> dict[str, Any]:
    run = studio.run_path(run_id)
    jobs = [job for job in studio.exports.jobs(run_id) if job.state != "done"]
    # An export is there a moment before its job says so.
    running = {job.target if not job.quant else f"{job.target}-{job.quant}" for job in jobs if job.state == "running"}
    done = [each for each in await studio.worker.call(finished_exports, run) if each.name not in running]
    return {
        "run_id": run_id,
        "jobs": jobs,
        "finished": done,
        "commands": {each.name: commands(run / "exports" / each.name, each.name, each.command) for each in done},
    }


def commands(folder: Path, name: str, own: str | None) -> list[tuple[str, str]]:
    """What to type for which program, in the export's folder."""
    target = name.partition("-")[0]
    place = shlex.quote(str(folder))
    found = []
    if own:
        program = {"ollama": "Ollama", "vllm": "vLLM", "gguf": "llama.cpp", "mlx": "MLX"}.get(target, target)
        found.append((program, f"cd {place} && {own}"))
    if name.startswith("gguf-") and name != "gguf-lora":
        found.append(("llama.cpp", f"cd {place} && llama-cli --jinja --model *.gguf"))
    if target == "merged":
        found.append(("vLLM", f"vllm serve {place}"))
    return found


def _exportable(studio: Studio) -> list[str]:
    """Runs with weights, newest first."""
    folders = [Path(run.path) for run in studio.runs() if run.state not in ("broken", "running")]
    return [studio.run_id(each) for each in folders if any((each / part).is_dir() for part in ("adapter", "model"))]
