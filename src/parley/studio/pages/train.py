"""The train page: the settings of the next run, what it would take, and its start."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from parley.config import RunConfig
from parley.config_reference import SettingReference, setting_references
from parley.errors import ParleyError, RunError, UsageError
from parley.safe_yaml import load_yaml
from parley.studio import run_form
from parley.studio.completion import completions
from parley.studio.prediction import predict, references
from parley.studio.run_diff import last_run, settings_diff
from parley.studio.settings_edit import set_setting
from parley.studio.settings_problems import Problem, problem_of, problems
from parley.studio.state import Studio
from parley.studio.web import StudioDep, fragment, page, read_form

router = APIRouter(prefix="/train")


@dataclass
class Checked:
    """A text with what is wrong with it, or with the settings it stands for."""

    text: str
    problems: list[Problem] = field(default_factory=list)
    config: RunConfig | None = None


@router.get("", response_model=None)
def train(request: Request, studio: StudioDep) -> Response:
    return page(request, "train.html", **_context(studio, check(studio.draft.text)))


@router.post("/check", response_model=None)
async def check_text(request: Request, studio: StudioDep) -> Response:
    """Another YAML text: its errors, its difference to the last run, and the fields that show it."""
    form = await read_form(request)
    checked = check(form.get("settings", ""))
    if not checked.problems:
        studio.draft.write(checked.text)
    return fragment(request, "_train_checked.html", fields_too=True, text_too=False, **_context(studio, checked))


@router.post("/set", response_model=None)
async def set_field(request: Request, studio: StudioDep) -> Response:
    """Another value in one of the fields: the YAML text with it."""
    form = await read_form(request)
    key, text = form.get("key", ""), form.get("settings", "")
    try:
        checked = check(set_setting(text, key, run_form.parsed(key, form.get(key, ""))))
    except UsageError as error:
        checked = Checked(text, [problem_of(error, text)])
    else:
        studio.draft.write(checked.text)
    return fragment(request, "_train_checked.html", fields_too=False, text_too=True, **_context(studio, checked))


@router.post("/predict", response_model=None)
async def predict_run(request: Request, studio: StudioDep) -> Response:
    """What the run would take."""
    text = (await read_form(request)).get("settings", "")
    try:
        studio.check_settings(_config(text))
        prediction = await studio.worker.call(predict, text)
    except ParleyError as error:
        return fragment(request, "_prediction.html", problem=problem_of(error, text), prediction=None)
    return fragment(request, "_prediction.html", problem=None, prediction=prediction)


@router.post("/complete", response_model=None)
async def complete(request: Request, studio: StudioDep) -> Response:
    """Completions at the cursor of the editor."""
    form = await read_form(request)
    try:
        line, column = int(form.get("line", "")), int(form.get("column", ""))
    except ValueError:
        raise UsageError("line and column are numbers; reload the page") from None
    found = completions(form.get("settings", ""), line, column, await _references(studio))
    return JSONResponse([asdict(each) for each in found])


@router.post("/start", response_model=None)
async def start(request: Request, studio: StudioDep) -> Response:
    """Queue the run and go to its page."""
    form = await read_form(request)
    text = form.get("settings", "")
    checked = check(text)
    if checked.problems:
        return fragment(request, "_train_checked.html", fields_too=False, text_too=False, **_context(studio, checked))
    studio.check_settings(_config(text))
    studio.draft.write(text)
    # The card is for the run: what the pages hold of it is freed first.
    studio.worker.close()
    if studio.answers.state in ("ready", "loading"):
        studio.answers.close()
    run_id = studio.start_run(text or "{}", form.get("name", "").strip() or None)
    return Response(status_code=204, headers={"HX-Redirect": f"/train/started/{quote(run_id)}"})


@router.get("/started/{run_id:path}", response_model=None)
def started(request: Request, run_id: str, studio: StudioDep) -> Response:
    """A run until it has a folder: that it waits, or what ended it; then its page."""
    if (studio.root / run_id / "run.yaml").is_file():
        address = f"/runs/{quote(studio.run_id(studio.run_path(run_id)))}"
        if "hx-request" in request.headers:
            return Response(status_code=204, headers={"HX-Redirect": address})
        return RedirectResponse(address, 303)
    job = next((job for job in studio.queue.jobs() if job.run_id == run_id), None)
    if job is None:
        raise RunError(f"{run_id}: no run of that name in {studio.root}")
    log = studio.queue.log(job.id)[-4000:] if job.state == "failed" else ""
    if "hx-request" in request.headers:
        return fragment(request, "_started.html", run_id=run_id, job=job, log=log)
    return page(request, "started.html", run_id=run_id, job=job, log=log)


def check(text: str) -> Checked:
    """`text` with its errors, or its settings. Line ends become those of YAML: browsers send CRLF."""
    text = text.replace("\r\n", "\n")
    found = problems(text)
    return Checked(text, found) if found else Checked(text, config=_config(text))


def _config(text: str) -> RunConfig:
    return RunConfig.create(load_yaml(text.replace("\r\n", "\n"), "settings") or {})


def _context(studio: Studio, checked: Checked) -> dict[str, Any]:
    last = last_run(studio.runs())
    differences = None
    if last is not None and checked.config is not None:
        differences = settings_diff(checked.config, last)
    return {
        "text": checked.text,
        "problems": checked.problems,
        "fields": run_form.FIELDS,
        "values": run_form.values(checked.text),
        "defaults": run_form.defaults(checked.text),
        "config": checked.config,
        "last": None if last is None else studio.run_id(last.path),
        "differences": differences,
    }


async def _references(studio: Studio) -> list[SettingReference]:
    """Every setting; those of the libraries once the worker has listed them."""
    if studio.references is None:
        studio.references = list(setting_references())
        studio.references = await studio.worker.call(references)
    return studio.references
