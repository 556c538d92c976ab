"""The first page: runs in all states, the queue, and first steps for a newcomer."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from parley.studio.web import N_, StudioDep, fragment, page

router = APIRouter()
STATES = (N_("running"), N_("finished"), N_("stopped"), N_("failed"), N_("broken"), N_("waiting"))


@router.get("/", response_model=None)
def home(request: Request, studio: StudioDep) -> Response:
    return page(request, "home.html", runs=studio.runs(), jobs=studio.queue.jobs(), studio=studio)


@router.get("/runs", response_model=None)
def run_list(request: Request, studio: StudioDep) -> Response:
    """The table alone, which the page asks for every other second."""
    return fragment(request, "_runs.html", runs=studio.runs(), jobs=studio.queue.jobs(), studio=studio)
