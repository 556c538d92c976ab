"""Continuous batching: requests wait in one queue and take a decoder's slots as they become free (Yu et al. 2022,
"Orca", OSDI '22).

One worker thread runs the decode loop and delivers the output chunks, through callbacks that must not block.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from parley.config import GenerationSection
from parley.errors import DataError, ParleyError, one_line
from parley.inference.interface import Decoder, DecodeRequest, Token
from parley.inference.output_processor import FinishReason, OutputChunk, OutputProcessor, control_token_stops

__all__ = [
    "Closed", "Counts", "DecoderFailed", "FinishReason", "OutputChunk", "QueueFull", "Request", "RequestHandle",
    "Scheduler",
]  # fmt: skip

logger = logging.getLogger(__name__)


class QueueFull(ParleyError, RuntimeError):
    """More requests wait than the queue holds."""


class Closed(ParleyError, RuntimeError):
    """The scheduler was closed, before the request or while it was being answered."""


class DecoderFailed(RuntimeError):
    """The decoder raised while it worked on this request. No ParleyError: the user did nothing wrong."""


@dataclass(frozen=True)
class Request:
    """One answer to generate. `base` and `logprobs` as in DecodeRequest; without `settings.seed` a random one."""

    prompt_ids: Sequence[int]
    settings: GenerationSection
    base: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Counts:
    """Requests being decoded, requests that wait for a slot, and tokens sampled since the start."""

    active: int
    waiting: int
    tokens: int


Deliver = Callable[[OutputChunk | Exception], None]


class RequestHandle:
    """A submitted request. `cancel` may be called from any thread, at any time, and repeatedly."""

    def __init__(
        self,
        request: DecodeRequest,
        deliver: Deliver,
        output: OutputProcessor,
        drop_waiting: Callable[[RequestHandle], None],
    ) -> None:
        self.request, self.deliver, self.output = request, deliver, output
        self.cancelled = False
        self._drop_waiting = drop_waiting

    def cancel(self) -> None:
        """Generate no more of this answer: its slot is free after the decode call that is running."""
        self.cancelled = True
        self._drop_waiting(self)


class Scheduler:
    """Answers requests through `decoder`, first come, first served. A context manager: leaving it closes.

    An error of one request ends that request. When the decoder itself raises, the error is logged with its traceback,
    the requests in its slots get DecoderFailed, the decoder is reset, and the loop continues with those that wait.
    Only a decoder that cannot be reset ends the scheduler: `error` then says why, as does every later `submit`.

    Args:
        stop_ids: tokens that end every answer.
        queue_limit: requests that may wait while all slots are taken; None for any number.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Any, stop_ids: Sequence[int], *, queue_limit: int | None = None
    ) -> None:
        self._decoder, self._tokenizer, self._stop_ids = decoder, tokenizer, frozenset(stop_ids)
        self._queue_limit = queue_limit
        self._changed = threading.Condition()  # guards the fields below
        self._waiting: deque[RequestHandle] = deque()
        self._active: dict[int, RequestHandle] = {}  # by slot; only the worker changes it
        self._tokens = 0
        self._closing = False
        self._error: Exception | None = None
        self._worker = threading.Thread(target=self._work, name="parley-scheduler", daemon=True)
        self._worker.start()

    @property
    def counts(self) -> Counts:
        with self._changed:
            return Counts(len(self._active), len(self._waiting), self._tokens)

    @property
    def error(self) -> Exception | None:
        """What ended the decode loop for good, if anything did."""
        return self._error

    def submit(self, request: Request, deliver: Deliver) -> RequestHandle:
        """Queue a request. The worker calls `deliver` with the answer's chunks, in order, the last one with a
        `finish_reason`; or, instead of a further chunk, with the exception that ended the answer. It must not block
        or raise.

        Raises DataError for a prompt that is empty, leaves no room for an answer or has ids outside the vocabulary, and
        for a stop string that cannot match; QueueFull; Closed.
        """
        handle = self._handle(request, deliver)  # outside the lock: it copies the prompt and reads the tokenizer
        with self._changed:
            self._check_open()
            # Waiting requests that will take a free slot at the next admission do not count against the queue.
            free = self._decoder.slots - len(self._active)
            if self._queue_limit is not None and len(self._waiting) - free >= self._queue_limit:
                raise QueueFull(f"all {self._decoder.slots} slots are taken and {self._queue_limit} requests wait")
            self._waiting.append(handle)
            self._changed.notify_all()
        return handle

    def stream(self, request: Request) -> Generator[OutputChunk]:
        """`submit` for a blocking caller: the answer's chunks as they come. Closing the iterator cancels.

        Raises as `submit` does, before the first chunk is asked for; later errors come from the iterator.
        """
        outputs: SimpleQueue[OutputChunk | Exception] = SimpleQueue()
        return _read(outputs, self.submit(request, outputs.put))

    def close(self, drain: bool = True) -> None:
        """Accept no more requests and end the thread: with `drain` after all answers are complete, else at once.

        Open requests that are not drained get Closed.
        """
        with self._changed:
            self._closing = True
            dropped = [] if drain else [*self._waiting, *self._active.values()]
            for handle in dropped:
                handle.cancelled = True
            self._waiting = deque(handle for handle in self._waiting if not handle.cancelled)
            self._changed.notify_all()
        # Outside the lock, as everywhere: a callback may call back into the scheduler.
        for handle in dropped:
            handle.deliver(Closed("the server was stopped before the answer was finished"))
        self._worker.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _handle(self, request: Request, deliver: Deliver) -> RequestHandle:
        prompt, settings = list(request.prompt_ids), request.settings
        self._check_prompt(prompt)
        seed = secrets.randbits(63) if settings.seed is None else settings.seed % 2**63
        max_tokens = min(settings.max_new_tokens, self._decoder.length - len(prompt))
        settings = settings.model_copy(update={"max_new_tokens": max_tokens})
        stop_ids = self._stop_ids | control_token_stops(self._tokenizer, settings.stop)
        decode_request = DecodeRequest(prompt, settings, stop_ids, seed, request.base, request.logprobs)
        output = OutputProcessor(self._tokenizer, stop_ids, settings.stop, max_tokens)
        return RequestHandle(decode_request, deliver, output, self._drop_waiting)

    def _check_prompt(self, prompt: list[int]) -> None:
        length, vocab_size = self._decoder.length, self._decoder.vocab_size
        if not prompt:
            raise DataError("the prompt is empty; give at least one token")
        if len(prompt) >= length:
            raise DataError(
                f"the prompt is {len(prompt)} tokens and the context is {length}, its answer included; shorten it"
            )
        # An id outside the embedding is an IndexError on a CPU and a device assert, which nothing survives, on a GPU.
        if outside := [token for token in prompt if not 0 <= token < vocab_size]:
            raise DataError(
                f"the prompt has token id {outside[0]} and the model's embedding has {vocab_size} rows; "
                "use the tokenizer that belongs to the model"
            )

    def _check_open(self) -> None:
        if self._error is not None:
            raise Closed(f"the decoder failed earlier ({one_line(self._error)}); start anew") from self._error
        if self._closing:
            raise Closed("the server is being stopped and takes no more requests")

    def _drop_waiting(self, handle: RequestHandle) -> None:
        with self._changed:
            if handle in self._waiting:
                self._waiting.remove(handle)

    # The methods below run on the worker thread.

    def _work(self) -> None:
        while True:
            try:
                while self._admit_waiting():
                    if self._active:
                        self._decode()
                return
            except Exception as error:  # noqa: BLE001  (carried to the threads that wait for answers)
                if not self._recover(error):
                    return

    def _admit_waiting(self) -> bool:
        """Release the slots of cancelled requests and fill free ones from the queue; False when all is done."""
        for slot in [slot for slot, handle in self._active.items() if handle.cancelled]:
            self._release(slot)
        with self._changed:
            while not self._waiting and not self._active:
                if self._closing:
                    return False
                self._changed.wait()
            free = [slot for slot in range(self._decoder.slots) if slot not in self._active]
            new = {slot: self._waiting.popleft() for slot in free[: len(self._waiting)]}
            self._active |= new
        if new:
            self._admit(new)
        return True

    def _admit(self, new: Mapping[int, RequestHandle]) -> None:
        """Prefill in one pass; where the decoder refuses a request, one by one, to find out which."""
        try:
            self._decoder.admit({slot: handle.request for slot, handle in new.items()})
        except ParleyError as error:
            if len(new) > 1:
                for slot, handle in new.items():
                    self._admit({slot: handle})
                return
            (slot, handle), *_ = new.items()
            self._forget(slot)
            handle.deliver(error)

    def _decode(self) -> None:
        sampled = self._decoder.decode()
        assert sampled, "requests are active and no slot emitted a token"
        outputs: list[tuple[RequestHandle, OutputChunk | Exception]] = []
        counted = 0
        for slot, handle in list(self._active.items()):
            tokens = sampled.get(slot)
            if handle.cancelled or not tokens:  # no tokens: the steps in flight began before it was admitted
                continue
            before = handle.output.num_tokens
            output = _process(handle, tokens)
            counted += handle.output.num_tokens - before
            if output is not None:
                outputs.append((handle, output))
                if isinstance(output, Exception) or output.finish_reason:
                    self._release(slot)
        # Slots are released before chunks are delivered: who has read the last chunk finds its slot free.
        with self._changed:
            self._tokens += counted
        for handle, output in outputs:
            handle.deliver(output)

    def _release(self, slot: int) -> None:
        self._decoder.release(slot)
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        with self._changed:
            del self._active[slot]

    def _recover(self, error: Exception) -> bool:
        """End the requests in the slots and reset the decoder; False where that fails, too, which ends the loop."""
        logger.error("the decoder failed", exc_info=error)
        failed = DecoderFailed(f"the decoder failed: {one_line(error)}")
        failed.__cause__ = error
        try:
            self._decoder.reset()
        except Exception as reset_error:  # later calls raise Closed from the first one
            logger.error("the decoder cannot be reset", exc_info=reset_error)
            with self._changed:
                self._error = error
        with self._changed:
            ended = list(self._active.values())
            self._active.clear()
            if self._error is not None:
                ended += self._waiting
                self._waiting.clear()
        for handle in ended:
            if not handle.cancelled:
                handle.deliver(failed)
        return self._error is None


def _process(handle: RequestHandle, tokens: Sequence[Token]) -> OutputChunk | Exception | None:
    """The chunk of these tokens, or the tokenizer's error about them, which concerns no other request."""
    try:
        return handle.output.add(tokens)
    except Exception as error:  # carried to its reader; tokenizers raises bare Exceptions, and custom code any
        logger.error("an answer's tokens cannot be decoded", exc_info=error)
        failed = DecoderFailed(f"the answer's tokens cannot be decoded: {one_line(error)}")
        failed.__cause__ = error
        return failed


def _read(outputs: SimpleQueue[OutputChunk | Exception], handle: RequestHandle) -> Generator[OutputChunk]:
    finished = False
    try:
        while not finished:
            output = outputs.get()
            if isinstance(output, Exception):
                raise output
            finished = output.finish_reason is not None
            yield output
    finally:
        handle.cancel()
