"""Several requests submitted together, whose output chunks arrive in one queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from parley.config import GenerationSection
from parley.inference.scheduler import OutputChunk, Request, RequestHandle, Scheduler

IndexedOutput = tuple[int, OutputChunk | Exception]


class FanIn:
    """Submits `requests` and puts what the worker delivers for request i into `put`, as (i, output).

    `put` is called on the scheduler's thread and must not block; the reader passes what it takes from there to
    `receive`. Raises what Scheduler.submit raises, after having cancelled the requests already submitted.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request], put: Callable[[IndexedOutput], None]) -> None:
        self.unfinished = len(requests)
        self._handles: list[RequestHandle] = []
        with ExitStack() as undo:  # all or none: no caller would read the outputs of those already submitted
            undo.callback(self.cancel)
            for index, request in enumerate(requests):
                self._handles.append(scheduler.submit(request, partial(_put, put, index)))
            undo.pop_all()

    def receive(self, item: IndexedOutput) -> IndexedOutput:
        """`item` as it is; takes note of an answer that it finishes, with a `finish_reason` or an exception."""
        _, output = item
        self.unfinished -= isinstance(output, Exception) or output.finish_reason is not None
        return item

    def cancel(self) -> None:
        """Free the slots of answers that are not finished. May be called from any thread, and repeatedly."""
        for handle in self._handles:
            handle.cancel()


def _put(put: Callable[[IndexedOutput], None], index: int, output: OutputChunk | Exception) -> None:
    put((index, output))


def nth_seed(settings: GenerationSection, index: int) -> GenerationSection:
    """The settings of answer `index`: a seed that is given is counted up, so that answers to one prompt differ."""
    return settings if settings.seed is None else settings.model_copy(update={"seed": settings.seed + index})
