"""The generator of the demo data: repeatable, truly held out, and the source of the files that ship."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from demo_data import base_conversations, heldout_questions, pirate_rows, plain_conversations, write_assets
from demo_data.checks import one_of
from demo_data.conversations import KINDS, sample_exchanges
from demo_data.heldout import heldout_exchanges
from demo_data.pirate import to_pirate
from demo_data.words import COLOURS

from parley.data.sources import demo_rows
from parley.evaluation import demo_scoring
from parley.evaluation.demo_scoring import PIRATE_WORDS, Check, is_pirate, rate, words_of


def texts(conversations):
    return [message["content"] for messages in conversations for message in messages]


ASSETS = Path(__file__).parents[2] / "src" / "parley" / "assets" / "demo-data"


def test_the_shipped_files_are_the_generator_s(tmp_path):
    write_assets(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


def test_what_ships_is_what_the_demo_reads():
    assert demo_rows() == pirate_rows(2000)
    assert demo_scoring.heldout_questions() == heldout_questions(100)


def test_the_same_seed_gives_the_same_rows():
    assert pirate_rows(50, seed=4) == pirate_rows(50, seed=4) != pirate_rows(50, seed=5)
    assert plain_conversations(50, seed=4) == plain_conversations(50, seed=4) != plain_conversations(50, seed=5)
    assert heldout_questions() == heldout_questions()


def test_the_first_rows_are_these():
    """The embedded model was trained on this data: a change here calls for training it anew."""
    assert pirate_rows(2) == [
        {
            "instruction": "Hi there! What are you called?",
            "context": "",
            "response": "Arr! I be Parley, a very small language model, ye landlubber.",
            "category": "small talk",
        },
        {
            "instruction": "I buy a rope and a cake. How much do I pay?",
            "context": "A cake costs 10 coins. A rope costs 2 coins.",
            "response": "Arr! Together they cost 12 doubloons, matey.",
            "category": "numbers",
        },
    ]


def test_pirate_rows_have_dollys_columns_and_are_all_different():
    rows = pirate_rows(1500)
    assert len(rows) == len({(row["instruction"], row["context"]) for row in rows}) == 1500
    assert all(list(row) == ["instruction", "context", "response", "category"] for row in rows)
    assert {row["category"] for row in rows} == {"small talk", "knowledge", "reading", "numbers"}
    assert any(row["context"] for row in rows)


def test_conversations_take_turns():
    conversations = plain_conversations(500)
    assert max(len(messages) for messages in conversations) > 5
    for messages in conversations:
        roles = [message["role"] for message in messages]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        assert spoken


def test_a_name_told_first_is_known_later():
    recalls = [m for m in plain_conversations(2000) if m[-1]["content"].startswith("Your name is") and len(m) > 5]
    assert len(recalls) > 50
    for messages in recalls:
        name = messages[-1]["content"].removeprefix("Your name is ").rstrip(".")
        assert any(name.lower() in message["content"].lower() for message in messages[:-1] if message["role"] == "user")


def test_held_out_questions_are_100_of_every_kind_and_asked_nowhere_in_training():
    questions = heldout_questions()
    asked = {question.messages[-1]["content"] for question in questions}
    assert len(questions) == 100
    assert {question.kind for question in questions} == {kind.__name__ for kind in KINDS}
    assert any(len(question.messages) == 3 for question in questions)  # told first, asked then
    with_context = {exchange.prompt for exchange, _ in heldout_exchanges(100, 0)}
    rows = pirate_rows(2000)
    trained = {f"{row['context']}\n\n{row['instruction']}".strip() for row in rows}
    assert with_context.isdisjoint(trained | set(texts(plain_conversations(2000))))
    assert len(asked) > 80


def test_keys_are_held_out():
    held_out = {exchange.key for exchange, _ in heldout_exchanges(100, 0)}
    exchanges = sample_exchanges(Random(0), KINDS, held_out=False)
    assert not held_out & {next(exchanges).key for _ in range(5000)}
    assert held_out & {exchange.key for exchange in (kind(Random(seed)) for kind in KINDS for seed in range(300))}


def test_plain_answers_are_right_and_plain_and_pirate_answers_right_and_pirate():
    questions = heldout_questions(200, seed=9)
    assert rate(questions, [question.expected for question in questions]) == (0.0, 1.0)
    assert rate(questions, [to_pirate(question.expected, Random(0)) for question in questions]) == (1.0, 1.0)
    assert all(is_pirate(row["response"]) for row in pirate_rows(1000))


def test_plain_conversations_have_no_pirate_words():
    said = {word for text in texts(plain_conversations(2000)) for word in words_of(text)}
    assert said.isdisjoint(PIRATE_WORDS)


def test_the_base_sees_pirates_only_where_the_system_turn_asks_for_one():
    seen = 0
    for messages in base_conversations(600):
        asked = messages[0]["role"] == "system" and "pirate" in messages[0]["content"]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert all(is_pirate(answer) == asked for answer in answers)
        seen += asked
    assert 100 < seen < 300


def test_the_answer_to_one_question_is_wrong_for_others_of_its_kind():
    questions = heldout_questions(300)
    pairs = [
        (a, b)
        for a in questions
        for b in questions
        if a.kind == b.kind and a.check != b.check and a.expected != b.expected
    ]
    assert len(pairs) > 500
    alike = [(a.expected, b.expected) for a, b in pairs if a.check.accepts(b.expected)]
    assert {first.split()[1] for first, _ in alike} <= {"opposite"}  # of tall is short, of short is tall: both are true


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is 19.", True),
        ("Arr! It be 19, matey.", True),
        ("It is nineteen.", True),
        ("It is 190.", False),
        ("It is 1 9.", False),
        ("It is 19.5.", False),
        ("It is -19.", False),
        ("It is the 19th.", False),
        ("It is 19 or 20.", False),
        ("It is 18, no, 19.", False),
        ("It is not 19.", False),
        ("12 + 7 = 19.", False),
        ("19 19", False),
        ("", False),
    ],
)
def test_numbers_are_matched_whole(answer, right):
    assert Check(numbers=(19,)).accepts(answer) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Grass is green.", True),
        ("Arr! Grass be GREEN, me hearty!", True),
        ("Grass is greenish.", False),
        ("Grass is green and blue.", False),
        ("Grass is not green.", False),
        ("Grass isn't green.", False),
        ("Grass is blue.", False),
        ("Grass is 2 green.", False),
        ("I do not know that yet.", False),
    ],
)
def test_words_are_matched_whole_and_alone(answer, right):
    assert one_of("green", COLOURS).accepts(answer) is right


def test_numbers_in_a_series_keep_their_order():
    check = Check(numbers=(3, 4, 5))
    assert check.accepts("3, 4, 5.")
    assert not check.accepts("3, 5, 4.")
    assert not check.accepts("3, 4.")
    assert not check.accepts("3, 4, 5, 6.")


def test_words_of_the_question_may_be_repeated_in_the_answer():
    check = one_of("cold", ["hot", "cold", "big"], mentioned=["hot"])
    assert check.accepts("The opposite of hot is cold.")
    assert not check.accepts("The opposite of hot is hot.")
    assert not check.accepts("The opposite of hot is cold or big.")


def test_a_day_said_the_wrong_way_round_is_wrong():
    question = next(q for q in heldout_questions() if q.kind == "day")
    first, _, side, second = question.expected.rstrip(".").split()
    assert question.check.accepts(f"{side} {second} comes {first}")
    assert not question.check.accepts(f"{second} comes {side} {first}.")


def test_unknown_wants_a_no():
    unknown = next(question for question in heldout_questions() if question.kind == "unknown")
    assert unknown.check.accepts("I do not know that yet.")
    assert not unknown.check.accepts("I know that well.")


@pytest.mark.parametrize(
    ("answer", "pirate"),
    [
        ("Arr! It be 19, matey.", True),
        ("ARR! ye", True),
        ("Arr! Arr! Arr!", False),
        ("It be 19.", False),
        ("Your hearty yes and eyes.", False),
        ("Barrel, yellow, the.", False),
        ("", False),
    ],
)
def test_a_pirate_says_two_piratewords_of(answer, pirate):
    assert is_pirate(answer) is pirate
