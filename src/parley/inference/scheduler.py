"""Many answers at once: requests wait in one queue and take a decoder's slots as these fall free.

One thread runs the decode loop (continuous batching: Yu et al. 2022, Orca, OSDI '22) and hands out the pieces. Whoever
asks gets them on that thread, through a function that must not block.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from parley.config import GenerationSection
from parley.errors import DataError, ParleyError, one_line
from parley.inference.interface import Asked, Decoder
from parley.inference.output_processor import Finish, Piece, Transcriber

__all__ = ["Closed", "Counts", "Finish", "Piece", "QueueFull", "Request", "Scheduler", "Ticket"]


class QueueFull(ParleyError, RuntimeError):
    """More requests wait than the queue holds."""


class Closed(ParleyError, RuntimeError):
    """The scheduler was closed, before or while it answered."""


@dataclass(frozen=True)
class Request:
    """One answer to write. `base` and `logprobs` as in Asked; without `settings.seed` the draws differ every time."""

    prompt_ids: Sequence[int]
    settings: GenerationSection
    base: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Counts:
    """Answers being written, requests that wait for a slot, and tokens drawn since the beginning."""

    active: int
    waiting: int
    tokens: int


Deliver = Callable[[Piece | Exception], None]


class Ticket:
    """A request that was taken. `cancel` may be called from any thread, at any time, and again."""

    def __init__(self, asked: Asked, deliver: Deliver, transcriber: Transcriber, forget: Callable[[Ticket], None]):
        self.asked, self.deliver, self.transcriber = asked, deliver, transcriber
        self.cancelled = False
        self._forget = forget

    def cancel(self) -> None:
        """Write no more of this answer: its slot is free after the burst that is running."""
        self.cancelled = True
        self._forget(self)


class Scheduler:
    """Answers requests through `decoder`, in the order they came. A context manager: leaving it closes.

    `ends`: the tokens that end every answer. `queue_limit`: requests that may wait while all slots write, None for any
    number. An error in the decode loop is given to every open request, and every later `submit` names it.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Any, ends: Sequence[int], *, queue_limit: int | None = None
    ) -> None:
        self._decoder, self._tokenizer, self._ends = decoder, tokenizer, frozenset(ends)
        self._queue_limit = queue_limit
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Ticket] = deque()
        self._writing: dict[int, Ticket] = {}  # by slot; only the worker changes it
        self._tokens = 0
        self._closing = False
        self._error: Exception | None = None
        self._worker = threading.Thread(target=self._work, name="parley-scheduler", daemon=True)
        self._worker.start()

    @property
    def counts(self) -> Counts:
        with self._changed:
            return Counts(len(self._writing), len(self._waiting), self._tokens)

    @property
    def error(self) -> Exception | None:
        """What ended the decode loop, if anything did."""
        return self._error

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Ask for an answer. `deliver` is called on the worker's thread with its pieces, in order, the last one with
        `finish`; or, instead of a next piece, with the exception that ended the answer. It must not block or raise.

        Raises DataError for a prompt that leaves no room for an answer, QueueFull, and Closed, also after the decode
        loop has failed.
        """
        ticket = self._ticket(request, deliver)
        with self._changed:
            self._check_open()
            free = self._decoder.slots - len(self._writing)
            if self._queue_limit is not None and len(self._waiting) - free >= self._queue_limit:
                raise QueueFull(f"all {self._decoder.slots} slots are taken and {self._queue_limit} requests wait")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def pieces(self, request: Request) -> Generator[Piece]:
        """`submit` for a caller that waits: the answer's pieces as they come. Closing the iterator cancels.

        Raises as `submit` does, before the first piece is asked for; later errors come from the iterator.
        """
        inbox: SimpleQueue[Piece | Exception] = SimpleQueue()
        return _read(inbox, self.submit(request, inbox.put))

    def close(self, drain: bool = True) -> None:
        """Take no more requests and end the thread: with `drain` after all answers are written, else at once.

        Open requests that are not drained get Closed.
        """
        with self._changed:
            self._closing = True
            dropped = [] if drain else [*self._waiting, *self._writing.values()]
            for ticket in dropped:
                ticket.cancelled = True
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            self._changed.notify_all()
        for ticket in dropped:
            ticket.deliver(Closed("the server was stopped before the answer was finished"))
        self._worker.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _ticket(self, request: Request, deliver: Deliver) -> Ticket:
        prompt, settings, room = list(request.prompt_ids), request.settings, self._decoder.length
        if not prompt:
            raise DataError("the prompt is empty; give at least one token")
        if len(prompt) >= room:
            raise DataError(
                f"the prompt is {len(prompt)} tokens and the context is {room}, its answer included; shorten it"
            )
        seed = secrets.randbits(63) if settings.seed is None else settings.seed % 2**63
        most = min(settings.max_new_tokens, room - len(prompt))
        settings = settings.model_copy(update={"max_new_tokens": most})
        asked = Asked(prompt, settings, self._ends, seed, request.base, request.logprobs)
        return Ticket(asked, deliver, Transcriber(self._tokenizer, self._ends, settings.stop, most), self._drop_waiting)

    def _check_open(self) -> None:
        if self._error is not None:
            raise Closed(f"the decoder failed earlier ({one_line(self._error)}); start anew") from self._error
        if self._closing:
            raise Closed("the server is being stopped and takes no more requests")

    def _drop_waiting(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    # The worker's thread.

    def _work(self) -> None:
        try:
            while self._refill():
                if self._writing:
                    self._burst()
        except Exception as error:  # noqa: BLE001  (whatever it is, those who wait must hear of it)
            self._fail(error)

    def _refill(self) -> bool:
        """Free the slots of cancelled answers and give free ones to those who wait; False when all is done."""
        for slot in [slot for slot, ticket in self._writing.items() if ticket.cancelled]:
            self._free(slot)
        with self._changed:
            while not self._waiting and not self._writing:
                if self._closing:
                    return False
                self._changed.wait()
            free = [slot for slot in range(self._decoder.slots) if slot not in self._writing]
            new = {slot: self._waiting.popleft() for slot in free[: len(self._waiting)]}
            self._writing |= new
        if new:
            self._decoder.admit({slot: ticket.asked for slot, ticket in new.items()})
        return True

    def _burst(self) -> None:
        drawn = self._decoder.decode()
        assert drawn, "answers are being written and no slot drew a token"
        told: list[tuple[Ticket, Piece]] = []
        counted = 0
        for slot, ticket in list(self._writing.items()):
            tokens = drawn.get(slot)
            if ticket.cancelled or not tokens:  # a burst that was under way before it was admitted
                continue
            before = ticket.transcriber.drawn
            piece = ticket.transcriber.add(tokens)
            counted += ticket.transcriber.drawn - before
            if piece is not None:
                told.append((ticket, piece))
                if piece.finish:
                    self._free(slot)
        with self._changed:
            self._tokens += counted
        for ticket, piece in told:
            ticket.deliver(piece)

    def _free(self, slot: int) -> None:
        self._decoder.release(slot)
        with self._changed:
            del self._writing[slot]

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            left = [ticket for ticket in [*self._writing.values(), *self._waiting] if not ticket.cancelled]
            self._waiting.clear()
            self._writing.clear()
        for ticket in left:
            ticket.deliver(error)


def _read(inbox: SimpleQueue[Piece | Exception], ticket: Ticket) -> Generator[Piece]:
    finished = False
    try:
        while not finished:
            piece = inbox.get()
            if isinstance(piece, Exception):
                raise piece
            finished = piece.finish is not None
            yield piece
    finally:
        ticket.cancel()
