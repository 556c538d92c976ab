"""The pages, in the order of the navigation: one module each, with a router of its own."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter

from parley.studio.i18n import N_
from parley.studio.pages import compare, data, export, home, model, run, train


@dataclass(frozen=True)
class Page:
    """`title` and `path` of its entry in the navigation; without a path it has none."""

    title: str
    path: str | None
    router: APIRouter


PAGES = (
    Page(N_("Runs"), "/", home.router),
    Page(N_("Data"), "/data", data.router),
    Page(N_("Model"), "/model", model.router),
    Page(N_("Train"), "/train", train.router),
    Page(N_("Compare"), "/compare", compare.router),
    Page(N_("Export"), "/export", export.router),
    Page(N_("Run"), None, run.router),
)
