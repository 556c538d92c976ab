"""Answers side by side: the base's are the untouched base's, sides of one model share a batch, errors end one side."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from parley.config import GenerationSection, LoraSection, ModelSection
from parley.errors import UsageError
from parley.inference.generate import generate
from parley.studio.answering import Answering, Loaded, Note, Piece, Prompted, Question, Side
from parley.studio.answers import Answers, Asked

GREEDY = GenerationSection(temperature=0, max_new_tokens=8)
PROMPT = "How many apples?"
TURNS = [[{"role": "user", "content": PROMPT}]]


@pytest.fixture(scope="session")
def adapters(build_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of random weights on the tiny Llama."""
    import torch

    from parley.models.adapters import attach_lora
    from parley.models.load import load_model

    folders = []
    for seed in (1, 2):
        model, tokenizer = load_model(ModelSection(name=str(build_family("llama")), device="cpu"))
        model = attach_lora(model, LoraSection(r=4), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
        folder = tmp_path_factory.mktemp("adapters") / f"adapter-{seed}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture
def serve() -> Iterator[Callable[..., Connection]]:
    """The other end of a process's connection, the process being a thread of this one."""
    ends: list[Connection] = []
    threads: list[threading.Thread] = []

    def start(*sources: str) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        ends.append(ours)
        threads.append(threading.Thread(target=Answering(theirs).run, args=(sources,), daemon=True))
        threads[-1].start()
        return ours

    yield start
    for end in ends:
        end.close()
    for thread in threads:  # the decoders' threads have ended with it
        thread.join(60)
        assert not thread.is_alive()


def asked(connection: Connection, question: Question) -> Asked:
    connection.send(question)
    found = Asked(question)
    while not found.finished:
        message = connection.recv()
        match message:
            case Piece():
                found.add(message)
            case Prompted(_, side, tokens):
                found.prompts[side] = tokens
    return found


def test_base_and_tuned_answer_as_if_each_were_alone(
    adapters: list[str], build_family: Callable[[str], Path], serve: Callable[..., Connection]
) -> None:
    from parley.models.load import load_model

    connection = serve(adapters[0])
    loaded = connection.recv()
    assert isinstance(loaded, Loaded)
    assert loaded.base_of == {adapters[0]: "llama"}
    found = asked(connection, Question(1, PROMPT, (Side(adapters[0], base=True), Side(adapters[0])), GREEDY))
    base, tokenizer = load_model(ModelSection(name=str(build_family("llama")), device="cpu"))
    assert found.text(0) == generate(base, tokenizer, TURNS, GREEDY)[0]
    tuned, tokenizer = load_model(ModelSection(name=adapters[0], device="cpu"))
    assert found.text(1) == generate(tuned, tokenizer, TURNS, GREEDY)[0] != found.text(0)
    prompt = tokenizer.apply_chat_template(TURNS[0], add_generation_prompt=True, return_dict=False)
    assert [token[0] for token in found.prompts[0]] == [token[0] for token in found.prompts[1]] == prompt
    for side in (0, 1):
        ids = [token[0] for token in found.tokens(side)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == found.text(side)
        assert all(token[2] is not None and token[2] <= 0 for token in found.tokens(side))


def test_both_sides_of_one_model_are_one_batch(
    adapters: list[str], serve: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    from parley.inference.decoder import StaticCacheDecoder

    batches: list[list[bool]] = []
    admit = StaticCacheDecoder.admit

    def recorded(self: Any, requests: Any) -> None:
        batches.append([request.base for request in requests.values()])
        admit(self, requests)

    monkeypatch.setattr(StaticCacheDecoder, "admit", recorded)
    connection = serve(adapters[0])
    connection.recv()
    asked(connection, Question(1, PROMPT, (Side(adapters[0], base=True), Side(adapters[0])), GREEDY))
    assert sorted(base for batch in batches for base in batch) == [False, True]


def test_two_runs_answer_beside_each_other(adapters: list[str], serve: Callable[..., Connection]) -> None:
    connection = serve(*adapters)
    connection.recv()
    found = asked(connection, Question(1, PROMPT, (Side(adapters[1]), Side(adapters[0])), GREEDY))
    alone = [asked(connection, Question(2 + i, PROMPT, (Side(a),), GREEDY)).text(0) for i, a in enumerate(adapters)]
    assert [found.text(1), found.text(0)] == alone
    assert alone[0] != alone[1]


def test_a_system_turn_is_part_of_the_prompt(adapters: list[str], serve: Callable[..., Connection]) -> None:
    connection = serve(adapters[0])
    connection.recv()
    found = asked(connection, Question(1, PROMPT, (Side(adapters[0]),), GREEDY, system="Be brief."))
    assert "Be brief." in "".join(token[1] for token in found.prompts[0])


def test_what_cannot_be_loaded_or_answered_is_said(
    adapters: list[str], tiny_llama_folder: Path, serve: Callable[..., Connection]
) -> None:
    connection = serve("nowhere/at-all/x")
    note = connection.recv()
    assert isinstance(note, Note)
    assert note.fatal
    assert "nowhere" in note.text
    connection = serve(str(tiny_llama_folder))
    loaded = connection.recv()
    assert loaded.base_of == {}
    found = asked(connection, Question(1, PROMPT, (Side(str(tiny_llama_folder), base=True),), GREEDY))
    assert "no adapter" in str(found.pieces[0].error)
    found = asked(connection, Question(2, "apples " * 5000, (Side(str(tiny_llama_folder)),), GREEDY))
    assert "context" in str(found.pieces[0].error)


def test_a_process_of_its_own_answers_is_watched_cancelled_and_freed(adapters: list[str]) -> None:
    async def visit() -> None:
        answers = Answers(prepare=int)
        with pytest.raises(UsageError, match="not loaded"):
            answers.ask(PROMPT, [Side(adapters[0])], GREEDY)
        answers.load(adapters[:1])
        assert answers.state == "loading"
        await answers.loading()
        assert (answers.state, answers.error) == ("ready", None)
        with pytest.raises(UsageError, match="0 characters"):
            answers.ask("", [Side(adapters[0])], GREEDY)
        with pytest.raises(UsageError, match="another model was loaded"):
            answers.ask(PROMPT, [Side(adapters[1])], GREEDY)
        first = answers.ask(PROMPT, [Side(adapters[0], base=True), Side(adapters[0])], GREEDY)
        seen = [item async for item in first.follow(0)]
        assert [number for number, _ in filter(None, seen)] == list(range(len(first.pieces)))
        again = [item async for item in first.follow(1)]  # as a browser that reconnects
        assert again == seen[1:]
        long = answers.ask(PROMPT, [Side(adapters[0])], GREEDY.model_copy(update={"max_new_tokens": 1900}))
        answers.cancel(long)
        assert long.pieces[-1].error == "stopped"
        assert not answers.ask(PROMPT, [Side(adapters[0])], GREEDY).failed
        process = answers._process
        process.kill()
        while answers.state == "ready":
            await asyncio.sleep(0.01)
        assert answers.state == "failed"
        assert "lack of memory" in str(answers.error)
        assert all(asked.finished for asked in answers.questions.values())
        answers.load(adapters[:1])
        process = answers._process
        answers.close()
        assert answers.state == "empty"
        assert not process.is_alive()

    asyncio.run(visit())
