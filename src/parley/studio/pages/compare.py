"""The compare page: one question to two models, watched side by side, voted on blind."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from parley.config import DEMO_MODEL, GenerationSection, RunConfig
from parley.errors import UsageError
from parley.studio.comparison import Shown, Vote, pair, sides_of
from parley.studio.model_list import list_models
from parley.studio.pages.model import check_model
from parley.studio.sse import Event, event_stream
from parley.studio.state import Studio
from parley.studio.votes import count_preferences, save_preference
from parley.studio.web import StudioDep, fragment, page, read_form, translate

router = APIRouter(prefix="/compare")
NUMBERS = ("temperature", "max_new_tokens", "min_p", "top_p", "top_k", "repetition_penalty", "seed")
VOTES: dict[str, Vote] = {"A": "A", "B": "B", "none": "none"}
PAGE_TOKENS = 256  # asked for by default: a page is watched


@router.get("", response_model=None)
def compare(request: Request, studio: StudioDep, run: str = "") -> Response:
    runs = {str(studio.root / run_id): run_id for run_id in _comparable(studio)}
    models = {each.name: each.title for each in list_models(studio.root, studio.roots) if each.kind != "run"}
    wanted = str(studio.run_path(run)) if run else next(iter(studio.answers.sources), next(iter(runs), ""))
    return page(
        request, "compare.html", runs=runs, models=models, wanted=wanted,
        second=studio.answers.sources[1] if len(studio.answers.sources) > 1 else "", **_status(studio),
    )  # fmt: skip


@router.post("/load", response_model=None)
async def load(request: Request, studio: StudioDep) -> Response:
    """Load the models of a comparison. While a run trains, only where the form says that this is known."""
    form = await read_form(request)
    first, second = (_checked_source(studio, form.get(name, "")) for name in ("first", "second"))
    if not first:
        raise UsageError("choose a run to compare")
    if first == second:
        second = ""
    if _training(studio) and form.get("anyway") != "yes":
        return fragment(request, "_compare_status.html", asking=(first, second), **_status(studio))
    studio.answers.load([first, second] if second else [first])
    return fragment(request, "_compare_status.html", asking=None, **_status(studio))


@router.post("/free", response_model=None)
async def free(request: Request, studio: StudioDep) -> Response:
    """Free the models' memory."""
    studio.answers.close()
    return fragment(request, "_compare_status.html", asking=None, **_status(studio))


@router.get("/status", response_model=None)
async def status(request: Request, studio: StudioDep) -> Response:
    return fragment(request, "_compare_status.html", asking=None, **_status(studio))


@router.post("/ask", response_model=None)
async def ask(request: Request, studio: StudioDep) -> Response:
    """Ask both sides; the page then follows the stream of the question."""
    form = await read_form(request)
    answers = studio.answers
    if answers.loaded is None:
        raise UsageError("the models are not loaded; load them first")
    sources = [*answers.sources, ""]
    sides = sides_of(sources[0], sources[1])
    settings = _settings(form, answers.loaded.settings)
    # A field that was left alone leaves each model its own system turn.
    system = form.get("system") if form.get("own_system") != "yes" else None
    asked = answers.ask(form.get("prompt", ""), sides, settings, system)
    shown = studio.comparisons.add(asked, _titles(request, studio), blind=form.get("blind") == "yes")
    return fragment(request, "_answers.html", shown=shown, id=asked.question.id)


@router.get("/stream/{question}", response_model=None)
async def stream(request: Request, studio: StudioDep, question: int) -> Response:
    """The pieces of both answers as they come; a browser that reconnects gets what it missed."""
    shown = studio.comparisons.get(question)
    last = request.headers.get("last-event-id", "")
    return event_stream(request, _events(shown, int(last) + 1 if last.isdecimal() else 0))


@router.post("/stop/{question}", response_model=None)
async def stop(studio: StudioDep, question: int) -> Response:
    studio.answers.cancel(studio.comparisons.get(question).asked)
    return Response(status_code=204)


@router.get("/tokens/{question}/{place}", response_model=None)
async def tokens(request: Request, studio: StudioDep, question: int, place: int) -> Response:
    """The exact tokens of one answer and of its prompt."""
    shown = studio.comparisons.get(question)
    if place not in (0, 1):
        raise UsageError("there are two answers; reload the page")
    side = shown.order[place]
    return fragment(
        request, "_tokens.html", prompt=shown.asked.prompts.get(side, []), answer=shown.asked.tokens(side)
    )  # fmt: skip


@router.post("/vote/{question}", response_model=None)
async def vote(request: Request, studio: StudioDep, question: int) -> Response:
    """Say which answer is better; then the page says whose it was."""
    shown = studio.comparisons.get(question)
    choice = VOTES.get((await read_form(request)).get("vote", ""))
    if choice is None or not shown.blind:
        raise UsageError("a vote is A, B or none, on answers that are shown blind")
    if shown.vote is not None:
        raise UsageError("that question has a vote already")
    if choice != "none":
        asked = shown.asked.question
        save_preference(studio.preferences, asked.prompt, *pair(shown, choice), system=asked.system)
    elif not shown.asked.finished:
        raise UsageError("a vote needs two complete answers")
    shown.vote = choice
    return fragment(
        request, "_voted.html", shown=shown, count=count_preferences(studio.preferences), path=studio.preferences
    )  # fmt: skip


@router.post("/learn", response_model=None)
async def learn(studio: StudioDep) -> Response:
    """Take the votes as the data of the next run."""
    if not count_preferences(studio.preferences):
        raise UsageError("there are no votes yet")
    studio.draft.set({"data.source": str(studio.preferences), "training.method": "dpo", "data.heldout_rows": 0})
    return Response(status_code=204, headers={"HX-Redirect": "/train"})


async def _events(shown: Shown, start: int) -> AsyncGenerator[Event | None]:
    async for item in shown.asked.follow(start):
        if item is None:
            yield None
            continue
        number, piece = item
        ended = piece.finish_reason or piece.error
        data = {"place": shown.place_of(piece.side), "text": piece.text, "ended": ended, "error": piece.error}
        yield Event(json.dumps(data), "piece", str(number))
    yield Event("", "end")


def _settings(form: dict[str, str], own: GenerationSection) -> GenerationSection:
    """The generation settings of the form; fields that are empty are those of the run. Raises UsageError."""
    changes = [f"generation.{name}={form[name].strip()}" for name in NUMBERS if form.get(name, "").strip()]
    return RunConfig.create({"generation": own.model_dump()}, changes).generation


def _status(studio: Studio) -> dict[str, Any]:
    answers = studio.answers
    loaded = answers.loaded
    sources = answers.sources
    compared = len(sources) > 1 or (loaded is not None and bool(loaded.base_of))
    return {
        "state": answers.state,
        "names": [_name(studio, source) for source in sources],
        "error": answers.error,
        "notes": answers.notes,
        "compared": compared,
        "settings": None if loaded is None else loaded.settings,
        "numbers": NUMBERS,
        "page_tokens": PAGE_TOKENS,
        "training": _training(studio),
        "votes": count_preferences(studio.preferences),
    }


def _training(studio: Studio) -> list[str]:
    """Runs that train at this moment."""
    return [studio.run_id(run.path) for run in studio.runs() if run.state == "running"]


def _comparable(studio: Studio) -> list[str]:
    """Runs whose weights can be loaded, newest first."""
    folders = [Path(run.path) for run in studio.runs() if run.state != "broken"]
    return [studio.run_id(each) for each in folders if any((each / name).is_dir() for name in ("adapter", "model"))]


def _checked_source(studio: Studio, source: str) -> str:
    if not source or source == DEMO_MODEL:
        return source
    return check_model(studio, source)


def _name(studio: Studio, source: str) -> str:
    path = Path(source)
    return str(path.relative_to(studio.root)) if path.is_relative_to(studio.root) else source


def _titles(request: Request, studio: Studio) -> tuple[str, str]:
    """What the two sides are called, in the order of `sides_of`."""
    _ = translate(request)
    first, *second = studio.answers.sources
    if second:
        return _name(studio, second[0]), _name(studio, first)
    loaded = studio.answers.loaded
    base = loaded.base_of.get(first, "") if loaded is not None else ""
    before, after = _("before: the base"), _("after: tuned")
    return f"{before} ({base})", f"{after} ({_name(studio, first)})"
