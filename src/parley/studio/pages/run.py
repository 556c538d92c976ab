"""The page of one run."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from parley.studio.web import StudioDep, page
from parley.training.run_summary import read_run

router = APIRouter()


@router.get("/runs/{run_id:path}", response_model=None)
def run(request: Request, run_id: str, studio: StudioDep) -> Response:
    return page(request, "run.html", run_id=run_id, run=read_run(studio.run_path(run_id)))
