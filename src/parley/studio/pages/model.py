"""The model page: what a run can start from, and whether it fits this machine."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

from parley.config import DEMO_MODEL
from parley.config_values import checked_path
from parley.errors import ParleyError, UsageError
from parley.models.resolve import local_folder
from parley.studio.i18n import N_
from parley.studio.model_list import list_models
from parley.studio.prediction import predict
from parley.studio.state import Studio
from parley.studio.web import StudioDep, fragment, page, read_form

router = APIRouter(prefix="/model")
KINDS = {
    "embedded": N_("comes with Parley"),
    "run": N_("trained here"),
    "folder": N_("folder"),
    "hub": N_("downloaded from the hub"),
}
VERDICTS = (N_("fits"), N_("tight"), N_("does not fit"))
AUTOMATIC = 3  # models whose memory is counted without a click: each takes a second or two


@router.get("", response_model=None)
def model(request: Request, studio: StudioDep) -> Response:
    models = list_models(studio.root, studio.roots)
    chosen = chosen_model(studio)
    title = next((each.title for each in models if each.name == chosen), chosen)
    return page(
        request, "model.html", models=models, chosen=chosen, title=title, kinds=KINDS, automatic=AUTOMATIC,
        places=[str(root) for root in studio.roots],
    )  # fmt: skip


@router.get("/fit", response_model=None)
async def fit(request: Request, studio: StudioDep, name: str) -> Response:
    """Whether a run from this model fits, with the number."""
    try:
        checked = check_model(studio, name)
        prediction = await studio.worker.call(predict, studio.draft.text, checked)
    except ParleyError as error:
        return fragment(request, "_fit.html", error=str(error), prediction=None, name=name)
    return fragment(request, "_fit.html", error=None, prediction=prediction, name=name)


@router.get("/look", response_model=None)
def look(request: Request, studio: StudioDep, name: str = "") -> Response:
    """A model that was named by hand, with what it takes."""
    return fragment(request, "_model_named.html", name=check_model(studio, name.strip()))


@router.post("/choose", response_model=None)
async def choose(request: Request, studio: StudioDep) -> Response:
    """Take a model for the next run."""
    name = check_model(studio, (await read_form(request)).get("name", ""))
    studio.draft.set({"model.name": name})
    return Response(status_code=204, headers={"HX-Redirect": "/train"})


def check_model(studio: Studio, name: str) -> str:
    """`name`, where it is a hub id, the embedded model or a folder that the studio may open.

    Raises UsageError or ModelError.
    """
    try:
        name = checked_path(name)
    except ValueError as error:
        raise UsageError(f"the model's name: {error}") from None
    if name == DEMO_MODEL or local_folder(name) is None:
        return name
    return str(studio.check_path(str(Path(name).absolute())))


def chosen_model(studio: Studio) -> str:
    """The model of the next run; the embedded one where none was chosen, or the draft is not YAML at the moment."""
    try:
        return str(studio.draft.value("model.name") or DEMO_MODEL)
    except UsageError:
        return DEMO_MODEL
