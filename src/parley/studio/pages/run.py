"""The page of one run: its curves and answers while it trains, and what can be done with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from parley.config import RunConfig
from parley.errors import ParleyError, RunError, UsageError
from parley.safe_yaml import load_yaml
from parley.studio import data_view, run_control
from parley.studio.run_events import COLUMNS, HELDOUT_COLUMNS, REWARD_COLUMNS, offset_of, read_batch
from parley.studio.run_view import RunView
from parley.studio.sse import HEARTBEAT_SECONDS, Event, event_stream
from parley.studio.state import Studio
from parley.studio.web import StudioDep, fragment, language_of, page, read_form, render, translate

router = APIRouter()

POLL_SECONDS = 0.4
SUMMARY_SECONDS = 2.0  # a summary reads the whole log


@router.get("/runs/{run_id:path}", response_model=None)
def run_page(request: Request, run_id: str, studio: StudioDep) -> Response:
    try:
        path = studio.run_path(run_id)
    except RunError:
        if any(job.run_id == run_id for job in studio.queue.jobs()):  # it waits, or has not begun to write
            return RedirectResponse(f"/train/started/{quote(run_id)}", 303)
        raise
    run = studio.summaries.read(path)
    return page(
        request, "run.html", run_id=run_id, run=run, view=RunView(path), columns=COLUMNS + REWARD_COLUMNS,
        heldout=list(HELDOUT_COLUMNS), method=(run.settings.get("training") or {}).get("method", "sft"),
    )  # fmt: skip


@router.get("/events/{run_id:path}", response_model=None)
async def run_events(
    request: Request, run_id: str, studio: StudioDep, after: str | None = None, once: bool = False
) -> Response:
    """Everything the page shows, as it changes. Points carry ids, so that a browser that returns gets the rest.

    once: end when all that there is was sent; a browser has few connections, and pages that share them ask again.
    """
    studio.run_path(run_id)  # an error is a response of its own, not the first event
    position = request.headers.get("last-event-id") or after
    return event_stream(request, _follow(studio, run_id, position, language_of(request), once=once))


async def _follow(
    studio: Studio, run_id: str, position: str | None, language: str, *, once: bool = False
) -> AsyncGenerator[Event | None]:
    path = studio.run_path(run_id)
    view, position = await asyncio.to_thread(_replay, path, position)
    fragments: dict[str, str] = {}
    summarised = sent = 0.0
    while True:
        batch = await asyncio.to_thread(read_batch, path / "events.jsonl", position)
        if batch is not None:
            view.add(batch)
            position, sent = batch.position, time.monotonic()
            yield Event(batch.to_json(), "points", position)
        now = time.monotonic()
        if now - summarised >= SUMMARY_SECONDS or (batch is not None and batch.ended):
            summarised = now
            for name, text in (await asyncio.to_thread(_fragments, studio, view, run_id, language)).items():
                if text != fragments.get(name):
                    fragments[name], sent = text, now
                    yield Event(text, name)
        if now - sent >= HEARTBEAT_SECONDS:
            sent = now
            yield None
        if batch is None:
            if once:
                yield Event("", "end")
                return
            await asyncio.sleep(POLL_SECONDS)


def _replay(path: Path, position: str | None) -> tuple[RunView, str | None]:
    """A view of the events that the browser has, which end at `position`, or None where that is void."""
    target = offset_of(path / "events.jsonl", position)
    view = RunView(path)
    if target:
        view.read(until=target)
    return view, position if target else None


def _fragments(studio: Studio, view: RunView, run_id: str, language: str) -> dict[str, str]:
    """The parts of the page in words; none once the run's folder is gone."""
    try:
        run = studio.summaries.read(view.path)
    except RunError:
        return {"status": render(language, "_run_gone.html")}
    return {
        "status": render(language, "_run_status.html", run=run, run_id=run_id, view=view),
        "actions": render(language, "_run_actions.html", run=run, run_id=run_id),
        "answers": render(language, "_run_answers.html", samples=view.samples(run), evaluates=view.evaluates(run)),
        "faults": render(language, "_run_faults.html", faults=view.faults(), run_id=run_id),
    }


@router.post("/runs/{run_id:path}", response_model=None)
async def act_on_run(request: Request, run_id: str, studio: StudioDep) -> Response:
    """Stop and keep, stop and discard, or resume."""
    _, path = translate(request), studio.run_path(run_id)
    form = await read_form(request)
    match form.get("action"):
        case "stop":
            await asyncio.to_thread(run_control.stop, path)
            text = _("The step is finished and saved, then the run stops.")
        case "discard":
            if path == studio.root:
                raise RunError(f"{path}: is the folder of all runs; remove it by hand")
            await asyncio.to_thread(run_control.discard, path)
            return Response(status_code=204, headers={"HX-Redirect": "/"})
        case "resume":
            if studio.summaries.read(path).state == "running":
                raise RunError(f"{run_id}: is running already")
            await asyncio.to_thread(studio.queue.resume, run_id)
            text = _("The run continues from its last checkpoint as soon as its card is free.")
        case other:
            raise UsageError(f"got the action {other}, wanted stop, discard or resume; reload the page")
    return fragment(request, "_message.html", text=text, kind="good")


@router.get("/reports/{run_id:path}", response_model=None)
def report(run_id: str, studio: StudioDep) -> Response:
    """The report as a file: it has scripts of its own, which this site does not run."""
    path = studio.run_path(run_id) / "report.html"
    if path.is_symlink() or not path.is_file():
        raise RunError(f"{run_id}: has no report yet; `parley report {run_id}` writes one")
    return FileResponse(path, filename=f"{path.parent.name}-report.html")


@router.get("/batches/{run_id:path}", response_model=None)
async def batch_rows(request: Request, run_id: str, step: int, studio: StudioDep) -> Response:
    """The rows of a step that needs a look."""
    path = studio.run_path(run_id)
    view = RunView(path)
    await asyncio.to_thread(view.read)
    fault = next((each for each in view.faults() if each.step == f"{step:,}"), None)
    if fault is None:
        raise RunError(f"{run_id}: step {step} is no spike, and its loss was finite; only the rows of such are kept")
    try:
        text = (path / "run.yaml").read_text(encoding="utf-8", errors="replace")
        studio.check_settings(RunConfig.create(load_yaml(text, "run.yaml") or {}))
        rows, problem = await studio.worker.call(data_view.rows_at, text, fault.rows), ""
    except ParleyError as error:  # the data may be elsewhere by now: the names of the rows are shown all the same
        rows, problem = [], str(error)
    return fragment(request, "_batch.html", fault=fault, rows=rows, problem=problem)
