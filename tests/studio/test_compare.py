"""The compare page: loading says when a run trains, answers stream with ids, votes are blind and saved once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from parley.config import GenerationSection
from parley.studio import comparison
from parley.studio.answering import Loaded, Piece, Question, Side
from parley.studio.answers import Asked
from parley.studio.state import Studio
from parley.training.run_summary import RunSummary

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e"


class FakeAnswers:
    """Answers at once: the base in a hostile way, the tuned model politely."""

    def __init__(self) -> None:
        self.state, self.sources, self.notes, self.error = "empty", (), [HOSTILE], None
        self.loaded: Loaded | None = None
        self.asked: list[Asked] = []

    def load(self, sources: Sequence[str]) -> None:
        self.state, self.sources = "ready", tuple(sources)
        self.loaded = Loaded(GenerationSection(), {sources[0]: "base"})

    def ask(self, prompt: str, sides: Sequence[Side], settings: GenerationSection, system: str | None) -> Asked:
        asked = Asked(Question(len(self.asked) + 1, prompt, tuple(sides), settings, system))
        for side, text in enumerate((HOSTILE, "Ahoy")):
            asked.add(Piece(asked.question.id, side, text[:3], [(1, text[:3], -0.1)]))
            asked.add(Piece(asked.question.id, side, text[3:], [(2, text[3:], None)], finish_reason="stop"))
            asked.prompts[side] = [(7, "<|begin_of_text|>", None), (8, "\n", None)]
        self.asked.append(asked)
        return asked

    def close(self) -> None:
        self.state, self.sources, self.loaded = "empty", (), None


@pytest.fixture
def answers(studio: Studio) -> FakeAnswers:
    studio.answers = FakeAnswers()  # type: ignore[assignment]
    (studio.root / "first" / "adapter").mkdir(parents=True)
    (studio.root / "first" / "run.yaml").write_text("model: parley-demo\n")
    return studio.answers  # type: ignore[return-value]


@pytest.fixture
def loaded(client: TestClient, studio: Studio, answers: FakeAnswers) -> TestClient:
    page = client.get("/compare").text
    assert "its own base, before training" in page
    assert "loaded" in client.post("/compare/load", data={"first": str(studio.root / "first")}).text
    return client


def pieces(
    client: TestClient, question: int, headers: dict[str, str] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in client.get(f"/compare/stream/{question}", headers=headers).text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if lines.get("event") == "piece":
            found.append((lines["id"], json.loads(lines["data"])))
    return found


def test_nothing_is_loaded_beside_a_run_without_saying_so(
    client: TestClient, studio: Studio, answers: FakeAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio, "runs", lambda: [RunSummary(str(studio.root / "first"), "running")])
    data = {"first": str(studio.root / "first")}
    text = client.post("/compare/load", data=data).text
    assert "A run is training on this machine now" in text
    assert answers.state == "empty"
    text = client.post("/compare/load", data=data | {"anyway": "yes"}).text
    assert answers.state == "ready"
    assert "A run is training at the same time" in text


def test_only_models_in_the_studios_folders_are_loaded(client: TestClient, answers: FakeAnswers) -> None:
    for data in ({"first": "/etc"}, {"first": ""}, {"first": "parley-demo", "second": "/etc"}):
        assert client.post("/compare/load", data=data).status_code == 400
    assert answers.state == "empty"


def test_answers_stream_side_by_side_and_a_reconnect_gets_the_rest(loaded: TestClient, answers: FakeAnswers) -> None:
    page = loaded.post("/compare/ask", data={"prompt": HOSTILE, "own_system": "yes", "temperature": "0"}).text
    assert "<script>" not in page
    assert "\x1b" not in page
    assert answers.asked[0].question.sides == (Side(answers.sources[0], base=True), Side(answers.sources[0]))
    assert answers.asked[0].question.settings.temperature == 0
    assert answers.asked[0].question.system is None
    found = pieces(loaded, 1)
    assert "".join(each["text"] for _, each in found if each["place"] == 0) == HOSTILE
    assert "".join(each["text"] for _, each in found if each["place"] == 1) == "Ahoy"
    assert [number for number, _ in found] == ["0", "1", "2", "3"]
    assert pieces(loaded, 1, {"Last-Event-ID": "1"}) == found[2:]
    assert loaded.get("/compare/stream/9").status_code == 400


def test_wrong_settings_are_said(loaded: TestClient, answers: FakeAnswers) -> None:
    response = loaded.post("/compare/ask", data={"prompt": "Hi", "top_p": "7"})
    assert response.status_code == 400
    assert "generation.top_p: got 7" in response.text
    assert answers.asked == []


def test_exact_tokens_are_shown_and_escaped(loaded: TestClient) -> None:
    loaded.post("/compare/ask", data={"prompt": "Hi"})
    text = loaded.get("/compare/tokens/1/0").text
    assert "&lt;|begin_of_text|&gt;" in text
    assert "&lt;sc" in text
    assert "90%" in text
    assert "<script>" not in text
    assert loaded.get("/compare/tokens/1/2").status_code == 400


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_blind_vote_hides_the_names_until_it_is_cast(
    loaded: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch, reverse: int
) -> None:
    monkeypatch.setattr(comparison.secrets, "randbelow", lambda _: reverse)
    page = loaded.post("/compare/ask", data={"prompt": "Hi", "blind": "yes", "system": "Be brief."}).text
    assert "base" not in page
    assert "first" not in page
    shown = pieces(loaded, 1)
    assert {each["place"] for _, each in shown if each["text"] == "Aho"} == {0 if reverse else 1}
    text = loaded.post("/compare/vote/1", data={"vote": "A"}).text
    assert "before: the base (base)" in text
    (row,) = [json.loads(line) for line in studio.preferences.read_text().splitlines()]
    assert row["chosen"][0]["content"] == ("Ahoy" if reverse else HOSTILE)
    assert row["rejected"][0]["content"] == (HOSTILE if reverse else "Ahoy")
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert loaded.post("/compare/vote/1", data={"vote": "B"}).status_code == 400
    assert studio.preferences.read_text().count("\n") == 1


def test_orders_are_both_taken(loaded: TestClient, studio: Studio) -> None:
    for _ in range(40):
        loaded.post("/compare/ask", data={"prompt": "Hi", "blind": "yes"})
    assert {studio.comparisons.get(number).order for number in range(1, 41)} == {(0, 1), (1, 0)}


def test_votes_that_say_nothing_are_refused(loaded: TestClient, studio: Studio, answers: FakeAnswers) -> None:
    loaded.post("/compare/ask", data={"prompt": "Hi"})
    assert loaded.post("/compare/vote/1", data={"vote": "A"}).status_code == 400  # it was not blind
    loaded.post("/compare/ask", data={"prompt": "Hi", "blind": "yes"})
    assert loaded.post("/compare/vote/2", data={"vote": "C"}).status_code == 400
    answers.asked[1].pieces.pop()
    assert loaded.post("/compare/vote/2", data={"vote": "A"}).status_code == 400  # one answer is not complete
    loaded.post("/compare/ask", data={"prompt": "Hi", "blind": "yes"})
    assert "No pair was saved" in loaded.post("/compare/vote/3", data={"vote": "none"}).text
    assert not studio.preferences.exists()


def test_votes_become_the_data_of_the_next_run(loaded: TestClient, studio: Studio) -> None:
    assert loaded.post("/compare/learn").status_code == 400
    loaded.post("/compare/ask", data={"prompt": "Hi", "blind": "yes"})
    loaded.post("/compare/vote/1", data={"vote": "B"})
    assert loaded.post("/compare/learn").headers["hx-redirect"] == "/train"
    assert studio.draft.value("training.method") == "dpo"
    assert Path(studio.draft.value("data.source")) == studio.preferences


def test_memory_is_freed(loaded: TestClient, answers: FakeAnswers) -> None:
    loaded.post("/compare/free")
    assert answers.state == "empty"
