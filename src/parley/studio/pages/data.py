"""The data page: a file or hub data set, what is wrong with it, and its rows with the mask."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from parley.studio.web import page

router = APIRouter(prefix="/data")


@router.get("", response_model=None)
def data(request: Request) -> Response:
    return page(request, "data.html")
