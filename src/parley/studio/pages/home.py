"""The first page: runs in all states, the queue, and first steps for a newcomer."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from parley.errors import UsageError
from parley.studio.state import Studio
from parley.studio.web import N_, StudioDep, fragment, page, read_form, translate

router = APIRouter()
STATES = (N_("running"), N_("finished"), N_("stopped"), N_("failed"), N_("broken"), N_("waiting"))


@router.get("/", response_model=None)
def home(request: Request, studio: StudioDep) -> Response:
    return page(request, "home.html", **_overview(studio), draft=studio.draft.text)


@router.get("/runs", response_model=None)
def run_list(request: Request, studio: StudioDep) -> Response:
    """Runs and queue alone, which the page asks for every other second."""
    return fragment(request, "_runs.html", **_overview(studio))


def _overview(studio: Studio) -> dict[str, Any]:
    jobs = studio.queue.jobs()
    runs = studio.runs()
    known = {studio.run_id(run.path) for run in runs}
    return {
        "studio": studio,
        "runs": runs,
        "starting": [job for job in jobs if job.state == "running" and job.run_id not in known],
        "waiting": [job for job in jobs if job.state == "waiting"],
        "failed": [(job, studio.queue.log(job.id)) for job in jobs if job.state == "failed"],
    }


@router.post("/queue/{job_id}", response_model=None)
async def act_on_job(request: Request, job_id: str, studio: StudioDep) -> Response:
    """Move a waiting run up or down, or take it out; end one that has no folder yet."""
    form = await read_form(request)
    match form.get("action"):
        case "up" | "down" as way:
            await asyncio.to_thread(studio.queue.move, job_id, -1 if way == "up" else 1)
        case "cancel":
            await asyncio.to_thread(studio.queue.cancel, job_id)
        case other:
            raise UsageError(f"got the action {other}, wanted up, down or cancel; reload the page")
    return await asyncio.to_thread(run_list, request, studio)


@router.post("/sweep", response_model=None)
async def start_sweep(request: Request, studio: StudioDep) -> Response:
    """Queue a run for each combination of the values of up to three settings."""
    _, form = translate(request), await read_form(request)
    values = {form[f"key{n}"]: form.get(f"values{n}", "") for n in range(1, 4) if form.get(f"key{n}", "").strip()}
    started = await asyncio.to_thread(studio.start_sweep, studio.draft.text, values, form.get("name", "").strip())
    text = _("%(count)s runs are in the queue.") % {"count": len(started)}
    return fragment(request, "_message.html", text=text, kind="good")
