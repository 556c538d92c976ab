"""The data page: a file or hub data set, what is wrong with it, and its rows with the mask.

What is chosen here goes into the settings of the next run (`studio.draft`), which the Train page starts from.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from parley.config import DEMO_DATA, DEMO_MODEL, DEMO_PREFERENCES, Droppable, RunConfig
from parley.data.doctor.findings import Diagnosis
from parley.errors import ParleyError, UsageError
from parley.safe_yaml import load_yaml
from parley.studio import data_view
from parley.studio.settings_edit import set_setting
from parley.studio.state import Studio
from parley.studio.uploads import PART, save_upload
from parley.studio.web import N_, StudioDep, fragment, page, read_form, said

router = APIRouter(prefix="/data")

PAGE_ROWS = 20
MOST_START = 10**9
CURABLE = ("data.drop", "data.control_tokens", "data.overlong", "data.bad_rows", "model.max_seq_length")
CURE_LABELS = {
    "data.drop": N_("Leave them out"),
    "data.overlong=drop": N_("Leave them out"),
    "data.overlong=split": N_("Split them"),
    "data.bad_rows=skip": N_("Leave them out"),
    "data.bad_rows": N_("Set"),
    "data.control_tokens": N_("Set"),
    "data.overlong": N_("Set"),
    "model.max_seq_length": N_("Raise the limit"),
}
"""Buttons by setting and value, else by setting."""
OF_ONE_SOURCE = ("data.columns", "data.format", "data.split", "data.subset", "data.revision", "data.drop", "data.roles")
# A setting in the text of a cure, as the doctor writes it: data.drop=[duplicate], model.max_seq_length=4096.
_SETTING = re.compile(r"\b((?:data|model)\.\w+)=(\[[\w-]+\]|[\w-]+)")
FORMAT_LABELS = {
    "messages": N_("conversations: a list of messages"),
    "sharegpt": N_("conversations in ShareGPT's form"),
    "alpaca": N_("instructions and answers (Alpaca)"),
    "dolly": N_("questions and answers (Dolly)"),
    "prompt-completion": N_("a text and how it continues"),
    "tokens": N_("token ids"),
    "text": N_("plain text"),
    "pairs": N_("pairs of a better and a worse answer"),
    "labelled": N_("answers marked good or bad"),
}
SEVERITIES = (N_("error"), N_("warning"), N_("note"))
ROLES = (N_("user"), N_("assistant"), N_("system"), N_("tool"))


@router.get("", response_model=None)
def data_page(request: Request, studio: StudioDep) -> Response:
    source = studio.draft.value("data.source") or studio.draft.value("data")
    uploads = sorted(path.name for path in studio.uploads.iterdir() if path.suffix != PART)
    return page(
        request, "data.html", source=source if isinstance(source, str) else None, uploads=uploads,
        demos=(DEMO_DATA, DEMO_PREFERENCES), split=studio.draft.value("data.split"),
        subset=studio.draft.value("data.subset"),
    )  # fmt: skip


@router.post("/uploads", response_model=None)
async def upload(request: Request, studio: StudioDep, name: str) -> Response:
    """The body is the file: as it comes, without a form around it."""
    try:
        path = await save_upload(studio.uploads, name, request.stream())
    except ParleyError as error:
        return JSONResponse({"error": said(request, str(error))}, 400)
    _choose(studio, str(path), {})
    return JSONResponse({"name": path.name})


@router.post("/source", response_model=None)
async def choose_source(request: Request, studio: StudioDep) -> Response:
    form = await read_form(request)
    source = form.get("source", "").strip()
    if not source:
        raise UsageError("no data set is named; give a hub id, or the path of a file or folder")
    if form.get("upload"):
        source = str(studio.uploads / source)
    _choose(
        studio, studio.check_source(source), {f"data.{name}": form.get(name) or None for name in ("split", "subset")}
    )
    return Response(status_code=204, headers={"HX-Redirect": "/data"})


def _choose(studio: Studio, source: str, changes: dict[str, Any]) -> None:
    """Name the data set of the next run; what was set for another one is removed, and its checks are ended."""
    studio.worker.abandon()
    _change(studio, dict.fromkeys(OF_ONE_SOURCE) | {"data.source": source} | changes)


def _change(studio: Studio, changes: dict[str, Any]) -> None:
    """Change settings of the draft. Raises UsageError, and changes nothing, where they would be wrong."""
    text = studio.draft.text
    for key, value in changes.items():
        text = set_setting(text, key, value)
    RunConfig.create(load_yaml(text, "settings") or {})
    studio.draft.write(text)


@router.get("/look", response_model=None)
async def look(request: Request, studio: StudioDep) -> Response:
    """The recognised format, and the form that maps columns by hand."""
    found = await studio.worker.call(data_view.look, _text(studio))
    columns = studio.draft.value("data.columns")
    mapped = columns if isinstance(columns, dict) else {}
    chosen = studio.draft.value("data.format") or _mapped_format(found, mapped)
    return fragment(
        request, "_data_look.html", look=found, chosen=chosen, mapped=mapped,
        names={column.name for column in found.columns}, labels=FORMAT_LABELS,
    )  # fmt: skip


def _mapped_format(found: data_view.Look, mapped: dict[str, str]) -> str:
    """The format whose columns are mapped by hand; "" where none is."""
    with_all = (each.name for each in found.formats if mapped and {*mapped} <= {*each.required, *each.optional})
    return next(with_all, "")


@router.post("/columns", response_model=None)
async def map_columns(request: Request, studio: StudioDep) -> Response:
    form = await read_form(request)
    mapped = {name.removeprefix("column."): own for name, own in form.items() if name.startswith("column.") and own}
    chosen = form.get("format")
    by_columns = not chosen or chosen in {each.name for each in data_view.OF_PREFERENCES}
    _change(studio, {"data.columns": mapped or None, "data.format": None if by_columns else chosen})
    return Response(status_code=204, headers={"HX-Redirect": "/data"})


@router.get("/checks", response_model=None)
async def checks(request: Request, studio: StudioDep) -> Response:
    """The doctor's table, and the lengths."""
    diagnosis = await studio.worker.call(data_view.check, _text(studio))
    return fragment(
        request, "_data_checks.html", diagnosis=diagnosis, cures=_cures(diagnosis), model=_model(studio),
        droppable=get_args(Droppable), limit=diagnosis.max_length, chosen=_chosen_cures(studio), labels=CURE_LABELS,
    )  # fmt: skip


def _chosen_cures(studio: Studio) -> list[tuple[str, str]]:
    """The cures that the settings have, each to be taken back by itself."""
    found = []
    for key in CURABLE:
        value = studio.draft.value(key)
        found += [(key, f"[{name}]") for name in value] if isinstance(value, list) else []
        found += [(key, str(value))] if isinstance(value, str | int) else []
    return found


def _cures(diagnosis: Diagnosis) -> dict[str, list[tuple[str, str]]]:
    """By check, the settings that its cure names."""
    return {
        finding.check: [(key, value) for key, value in _SETTING.findall(finding.cure) if key in CURABLE]
        for finding in diagnosis.findings
    }


@router.post("/cure", response_model=None)
async def cure(request: Request, studio: StudioDep) -> Response:
    """Set what a cure names; `undo` takes it back."""
    form = await read_form(request)
    key, value = form.get("key", ""), load_yaml(form.get("value", ""), "the cure")
    if key not in CURABLE:
        raise UsageError(f"got {key}, wanted one of {', '.join(CURABLE)}")
    if key == "data.drop":
        if not isinstance(value, list):
            raise UsageError(f"data.drop: got {value}, wanted a list of checks")
        before = studio.draft.value(key) or []
        kept = [name for name in before if name not in value]
        value = (kept if form.get("undo") else [*kept, *value]) or None
    _change(studio, {key: None if form.get("undo") and key != "data.drop" else value})
    return Response(status_code=204, headers={"HX-Redirect": "/data"})


@router.get("/rows", response_model=None)
async def rows(request: Request, studio: StudioDep, start: int = 0, search: str = "", found_by: str = "") -> Response:
    """Rows as chat bubbles, from `start` on."""
    start = min(max(start, 0), MOST_START)
    if found_by and found_by not in get_args(Droppable):
        raise UsageError(f"{found_by}: rows cannot be filtered by it; wanted one of {', '.join(get_args(Droppable))}")
    found = await studio.worker.call(data_view.rows, _text(studio), start, PAGE_ROWS, search, found_by)
    return fragment(
        request, "_data_rows.html", found=found, start=start, search=search, found_by=found_by, step=PAGE_ROWS
    )


@router.get("/tokens/{number}", response_model=None)
async def tokens(request: Request, studio: StudioDep, number: int) -> Response:
    """A row in tokens, with the mask in colour."""
    view = await studio.worker.call(data_view.tokens, _text(studio), max(1, min(number, MOST_START)))
    return fragment(request, "_data_tokens.html", view=view, model=_model(studio))


def _model(studio: Studio) -> str:
    value = studio.draft.value("model.name") or studio.draft.value("model")
    return value if isinstance(value, str) else DEMO_MODEL


def _text(studio: Studio) -> str:
    """The draft's settings; Train edits them as text, so that their paths are checked again."""
    text = studio.draft.text
    studio.check_settings(RunConfig.create(load_yaml(text, "settings") or {}))
    return text
