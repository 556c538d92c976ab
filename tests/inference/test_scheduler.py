from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from parley.config import DEMO_MODEL, GenerationSection, ModelSection
from parley.data.render import render_prompt
from parley.errors import DataError, ModelError
from parley.inference.hf import TransformersDecoder
from parley.inference.interface import DecodeRequest, Token
from parley.inference.scheduler import Closed, DecoderFailed, OutputChunk, QueueFull, Request, Scheduler
from parley.models.load import load_model

GREEDY = GenerationSection(temperature=0, max_new_tokens=24)
QUESTIONS = ["Ahoy!", "What is the capital of France?", "How are you?", "What is 2 + 3?", "Who are you?", "Thanks!"]


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model(ModelSection(name=DEMO_MODEL, device="cpu"))


@pytest.fixture
def make(demo: Any) -> Iterator[Callable[..., Scheduler]]:
    """Schedulers over the demo model, closed at the end."""
    made: list[Scheduler] = []

    def scheduler(slots: int = 2, length: int = 256, queue_limit: int | None = None, decoder: Any = None) -> Scheduler:
        model, tokenizer = demo
        decoder = decoder or TransformersDecoder(model, slots=slots, length=length)
        made.append(Scheduler(decoder, tokenizer, [tokenizer.eos_token_id], queue_limit=queue_limit))
        return made[-1]

    yield scheduler
    for each in made:
        if isinstance(each._decoder, Held):  # so that a test that fails does not wait for a worker that is held
            each._decoder.let.release(1_000_000)
        each.close(drain=False)


def request(demo: Any, question: str, settings: GenerationSection = GREEDY, **more: Any) -> Request:
    return Request(render_prompt(demo[1], [{"role": "user", "content": question}]), settings, **more)


def alone(demo: Any, asked: Request) -> str:
    """transformers' own answer, without any scheduler."""
    import torch

    model, tokenizer = demo
    ids = torch.tensor([asked.prompt_ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=asked.settings.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


class Inbox:
    """What was delivered, and when it was over."""

    def __init__(self) -> None:
        self.got: list[OutputChunk | Exception] = []
        self.over = threading.Event()

    def __call__(self, piece: OutputChunk | Exception) -> None:
        self.got.append(piece)
        if isinstance(piece, Exception) or piece.finish_reason:
            self.over.set()

    def text(self) -> str:
        assert self.over.wait(30)
        assert all(isinstance(piece, OutputChunk) for piece in self.got), self.got
        return "".join(piece.text for piece in self.got if isinstance(piece, OutputChunk))


class Held:
    """A decoder that samples token 70 for ever, one call of `decode` at a time when it is let."""

    slots, length, vocab_size = 2, 1000, 500

    def __init__(self) -> None:
        self.let = threading.Semaphore(0)
        self.taken: set[int] = set()
        self.admitted: list[int] = []

    def admit(self, asked: Mapping[int, DecodeRequest]) -> None:
        assert not self.taken & set(asked)
        self.taken |= set(asked)
        self.admitted += [each.prompt_ids[0] for each in asked.values()]

    def decode(self) -> Mapping[int, list[Token]]:
        self.let.acquire()
        return {slot: [Token(70)] for slot in self.taken}

    def release(self, slot: int) -> None:
        self.taken.remove(slot)

    def reset(self) -> None:
        self.taken.clear()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_many_questions_over_few_slots_are_answered_as_alone(
    demo: Any, make: Callable[..., Scheduler], slots: int
) -> None:
    scheduler = make(slots=slots)
    asked = [request(demo, question) for question in QUESTIONS]
    inboxes = [Inbox() for _ in asked]
    for each, inbox in zip(asked, inboxes, strict=True):
        scheduler.submit(each, inbox)
    answers = [inbox.text() for inbox in inboxes]
    assert answers == [alone(demo, each) for each in asked]
    assert len(set(answers)) > 3
    assert scheduler.counts.active == scheduler.counts.waiting == 0
    drawn = sum(len(piece.tokens) for inbox in inboxes for piece in inbox.got if isinstance(piece, OutputChunk))
    assert scheduler.counts.tokens == drawn


def test_the_iterator_gives_the_answer_and_says_how_it_ended(demo: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    pieces = list(scheduler.stream(request(demo, "Ahoy!")))
    assert "".join(piece.text for piece in pieces) == alone(demo, request(demo, "Ahoy!"))
    assert pieces[-1].finish_reason == "stop"
    short = list(scheduler.stream(request(demo, "Ahoy!", GREEDY.model_copy(update={"max_new_tokens": 2}))))
    assert short[-1].finish_reason == "length"
    assert sum(len(piece.tokens) for piece in short) == 2


def test_a_stop_string_ends_the_answer_and_frees_the_slot(demo: Any, make: Callable[..., Scheduler]) -> None:
    whole = alone(demo, request(demo, "What is the capital of France?"))
    word = whole.split()[2]
    scheduler = make(slots=1)
    for _ in range(2):
        pieces = list(
            scheduler.stream(
                request(demo, "What is the capital of France?", GREEDY.model_copy(update={"stop": [word]}))
            )
        )
        assert "".join(piece.text for piece in pieces) == whole[: whole.index(word)]
        assert pieces[-1].finish_reason == "stop"


def test_seeds_repeat_an_answer_and_none_differs(demo: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(slots=4)

    def say(seed: int | None) -> str:
        settings = GenerationSection(temperature=3, min_p=0, max_new_tokens=16)
        settings = settings.model_copy(update={"seed": seed})  # as n answers count it up, past what a user may set
        return "".join(piece.text for piece in scheduler.stream(request(demo, "Ahoy!", settings)))

    assert say(7) == say(7) == say(7 + 2**63) != say(8)
    assert say(None) != say(None)


def test_a_prompt_that_fills_the_room_is_refused_and_one_below_is_not(
    demo: Any, make: Callable[..., Scheduler]
) -> None:
    scheduler = make(length=20)
    with pytest.raises(DataError, match="the prompt is 20 tokens and the context is 20"):
        scheduler.submit(Request([70] * 20, GREEDY), Inbox())
    with pytest.raises(DataError, match="empty"):
        scheduler.submit(Request([], GREEDY), Inbox())
    pieces = list(scheduler.stream(Request([70] * 19, GREEDY)))
    assert sum(len(piece.tokens) for piece in pieces) == 1


def test_the_queue_is_first_come_first_served_and_has_an_end(make: Callable[..., Scheduler]) -> None:
    """Two slots and a queue of two: with one slot taken three may wait, as one of them takes the other slot."""
    decoder = Held()
    scheduler = make(decoder=decoder, queue_limit=2)
    inboxes = [Inbox() for _ in range(5)]

    def submit(number: int) -> None:
        scheduler.submit(Request([number], GREEDY.model_copy(update={"max_new_tokens": 3})), inboxes[number])

    submit(0)
    until(lambda: decoder.admitted == [0])
    submit(1)
    submit(2)
    submit(3)
    with pytest.raises(QueueFull, match="all 2 slots are taken and 2 requests wait"):
        submit(4)
    decoder.let.release()
    until(lambda: decoder.admitted == [0, 1])
    assert scheduler.counts.waiting == 2
    with pytest.raises(QueueFull, match="all 2 slots are taken and 2 requests wait"):
        submit(4)
    decoder.let.release(100)
    for inbox in inboxes[:4]:
        inbox.text()
    assert decoder.admitted == [0, 1, 2, 3]


def test_a_cancelled_answer_gives_its_slot_to_the_next(make: Callable[..., Scheduler]) -> None:
    decoder = Held()
    scheduler = make(decoder=decoder)
    long = GREEDY.model_copy(update={"max_new_tokens": 900})
    inboxes = [Inbox() for _ in range(4)]
    tickets = [scheduler.submit(Request([number], long), inbox) for number, inbox in enumerate(inboxes)]
    decoder.let.release(2)
    until(lambda: len(decoder.admitted) == 2)
    tickets[2].cancel()  # while it waits
    tickets[0].cancel()  # while it is written
    decoder.let.release(2)
    until(lambda: decoder.admitted == [0, 1, 3])
    tickets[0].cancel()
    assert scheduler.counts.waiting == 0
    assert inboxes[2].got == []
    scheduler_over = threading.Thread(target=lambda: scheduler.close(drain=False))
    scheduler_over.start()
    decoder.let.release(100)
    scheduler_over.join(20)
    assert decoder.taken == set()


def test_a_closed_iterator_cancels(make: Callable[..., Scheduler]) -> None:
    decoder = Held()
    scheduler = make(decoder=decoder)
    pieces = scheduler.stream(Request([1], GREEDY.model_copy(update={"max_new_tokens": 900})))
    decoder.let.release(5)
    next(pieces)
    pieces.close()
    decoder.let.release(5)
    until(lambda: scheduler.counts.active == 0)


def test_closing_drains_or_does_not(demo: Any, make: Callable[..., Scheduler]) -> None:
    drained = make(slots=1)
    inboxes = [Inbox(), Inbox(), Inbox()]
    for inbox in inboxes:
        drained.submit(request(demo, "Ahoy!"), inbox)
    drained.close()
    assert [inbox.text() for inbox in inboxes] == [alone(demo, request(demo, "Ahoy!"))] * 3
    with pytest.raises(Closed, match="stopped"):
        drained.submit(request(demo, "Ahoy!"), Inbox())

    decoder = Held()
    dropped = make(decoder=decoder)
    inboxes = [Inbox(), Inbox(), Inbox()]
    for inbox in inboxes:
        dropped.submit(Request([1], GREEDY), inbox)
    until(lambda: dropped.counts.active == 2)
    decoder.let.release(1)
    threading.Timer(0.05, decoder.let.release, [9]).start()
    dropped.close(drain=False)
    assert all(isinstance(inbox.got[-1], Closed) for inbox in inboxes)


class Failing(Held):
    """Raises in `decode` once; in `reset` too, where the device is lost."""

    def __init__(self, lost: bool = False) -> None:
        super().__init__()
        self.fails, self.lost = True, lost

    def decode(self) -> Mapping[int, list[Token]]:
        self.let.acquire()
        if self.fails:
            self.fails = False
            raise RuntimeError("out of luck")
        return {slot: [Token(70)] for slot in self.taken}

    def reset(self) -> None:
        if self.lost:
            raise RuntimeError("no device")
        super().reset()


def test_a_decoder_that_fails_starts_anew(make: Callable[..., Scheduler], caplog: pytest.LogCaptureFixture) -> None:
    """Those in its slots hear of it, those that wait and come later are answered; the log has the traceback."""
    decoder = Failing()
    scheduler = make(decoder=decoder)
    short = GREEDY.model_copy(update={"max_new_tokens": 2})
    inboxes = [Inbox() for _ in range(4)]
    scheduler.submit(Request([0], short), inboxes[0])
    until(lambda: decoder.admitted == [0])
    for number in (1, 2):
        scheduler.submit(Request([number], short), inboxes[number])
    decoder.let.release()
    assert inboxes[0].over.wait(20)
    assert isinstance(inboxes[0].got[-1], DecoderFailed)
    assert "out of luck" in str(inboxes[0].got[-1])
    decoder.let.release(100)
    scheduler.submit(Request([3], short), inboxes[3])
    assert [inbox.text() for inbox in inboxes[1:]] == [inboxes[1].text()] * 3
    assert scheduler.error is None
    (record,) = [record for record in caplog.records if record.name == "parley.inference.scheduler"]
    assert "out of luck" in str(record.exc_info)


def test_a_decoder_that_cannot_be_reset_ends_everything(make: Callable[..., Scheduler]) -> None:
    decoder = Failing(lost=True)
    scheduler = make(decoder=decoder)
    inboxes = [Inbox() for _ in range(4)]
    for inbox in inboxes:
        scheduler.submit(Request([1], GREEDY), inbox)
    decoder.let.release()
    for inbox in inboxes:
        assert inbox.over.wait(20)
        assert isinstance(inbox.got[-1], DecoderFailed)
    until(lambda: scheduler.error is not None)
    with pytest.raises(Closed, match="out of luck"):
        scheduler.submit(Request([1], GREEDY), Inbox())
    scheduler.close()


def test_what_a_decoder_refuses_ends_that_request_alone(make: Callable[..., Scheduler]) -> None:
    class Picky(Held):
        def admit(self, requests: Mapping[int, DecodeRequest]) -> None:
            if any(request.prompt_ids[0] == 2 for request in requests.values()):
                raise ModelError("not two")
            super().admit(requests)

    decoder = Picky()
    scheduler = make(decoder=decoder)
    short = GREEDY.model_copy(update={"max_new_tokens": 2})
    inboxes = [Inbox() for _ in range(4)]
    scheduler.submit(Request([0], short), inboxes[0])
    until(lambda: decoder.admitted == [0])
    for number in (1, 2, 3):
        scheduler.submit(Request([number], short), inboxes[number])
    decoder.let.release(100)
    assert inboxes[2].over.wait(20)
    assert isinstance(inboxes[2].got[0], ModelError)
    assert [inboxes[number].text() for number in (0, 1, 3)] == [inboxes[0].text()] * 3
    assert scheduler.counts.active == 0


def test_a_token_that_cannot_be_decoded_ends_that_answer_alone(demo: Any, make: Callable[..., Scheduler]) -> None:
    class Strange(Held):
        """The answer to the prompt 0 is a token that no tokenizer takes."""

        def admit(self, requests: Mapping[int, DecodeRequest]) -> None:
            super().admit(requests)
            self.strange = {slot for slot, request in requests.items() if request.prompt_ids[0] == 0}

        def decode(self) -> Mapping[int, list[Token]]:
            self.let.acquire()
            return {slot: [Token(2**70 if slot in self.strange else 70)] for slot in self.taken}

    decoder = Strange()
    scheduler = make(decoder=decoder)
    inboxes = [Inbox() for _ in range(2)]
    short = GREEDY.model_copy(update={"max_new_tokens": 2})
    for number, inbox in enumerate(inboxes):
        scheduler.submit(Request([number], short), inbox)
    decoder.let.release(100)
    assert inboxes[0].over.wait(20)
    assert isinstance(inboxes[0].got[0], DecoderFailed)
    assert inboxes[1].text() != ""


@pytest.mark.parametrize("token", [500, -1, 2**70])
def test_ids_outside_the_vocabulary_are_refused(make: Callable[..., Scheduler], token: int) -> None:
    scheduler = make(decoder=Held())
    with pytest.raises(DataError, match=f"token id {token} and the model's embedding has 500 rows"):
        scheduler.submit(Request([1, token], GREEDY), Inbox())
