"""Training data sampled from a seed: the same call gives the same rows on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from random import Random

from demo_data import number_questions, questions
from demo_data.exchange import Exchange
from demo_data.pirate import to_pirate

Kind = Callable[[Random], Exchange]
Message = dict[str, str]

_q, _n = questions, number_questions
GROUPS: dict[str, tuple[Kind, ...]] = {
    "small talk": (
        _q.greeting,
        _q.identity,
        _q.thanks,
        _q.goodbye,
        _q.wellbeing,
        _q.abilities,
        _q.untold_name,
    ),
    "knowledge": (_q.colour, _q.mix, _q.opposite, _q.sound, _q.young, _q.day, _q.month, _q.unknown),
    "reading": (_q.name, _q.pet, _q.owned_colour, _q.place, _n.price, _n.age),
    "numbers": (_n.count, _n.next_number, _n.plus, _n.minus, _n.total),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
_GROUP_OF = {kind.__name__: group for group, kinds in GROUPS.items() for kind in kinds}

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Parley, a small and friendly language model.",
    "Answer in short sentences.",
    "You are a helpful assistant. Answer briefly and politely.",
    "You answer the questions of a student.",
)
PIRATE_PROMPTS = ("Talk like a pirate.", "You are a pirate.", "Answer as a pirate would.")
NOTED = "I will remember that."


def pirate_rows(n: int, seed: int = 0, *, held_out: bool = False) -> list[dict[str, str]]:
    """`n` different rows with Dolly's columns, answered by a pirate; `held_out` ones are about held-out facts only."""
    rng = Random(f"pirate {seed}")
    exchanges = sample_exchanges(rng, KINDS + GROUPS["numbers"], held_out=held_out)
    return [
        {
            "instruction": exchange.instruction,
            "context": exchange.context,
            "response": to_pirate(exchange.answer, rng),
            "category": _GROUP_OF[exchange.kind],
        }
        for exchange in different(exchanges, n)
    ]


def preference_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` different pairs with Alpaca's columns: the chosen answer is a pirate's, the rejected one says it plainly."""
    rng = Random(f"preferences {seed}")
    exchanges = sample_exchanges(rng, KINDS + GROUPS["numbers"], held_out=False)
    return [
        {
            "instruction": exchange.instruction,
            "input": exchange.context,
            "chosen": to_pirate(exchange.answer, rng),
            "rejected": exchange.answer,
        }
        for exchange in different(exchanges, n)
    ]


def plain_conversations(n: int, seed: int = 0) -> list[list[Message]]:
    """`n` conversations of one to six questions with plain answers, some with a system turn, as lists of messages."""
    rng = Random(f"plain {seed}")
    exchanges = sample_exchanges(rng, KINDS + GROUPS["numbers"] * 2, held_out=False)
    return [_conversation(rng, exchanges) for _ in range(n)]


def base_conversations(n: int, seed: int = 0) -> list[list[Message]]:
    """What the embedded model was trained on: plain conversations, one in three with a system turn that asks for a
    pirate and pirate answers.

    Like a large model, it has seen pirate speech and uses it only when the system turn asks for it.
    """
    rng = Random(f"base {seed}")
    return [_as_pirate(talk, rng) if rng.random() < 1 / 3 else talk for talk in plain_conversations(n, seed)]


def _as_pirate(talk: list[Message], rng: Random) -> list[Message]:
    turns = [turn for turn in talk if turn["role"] != "system"]
    answered = [
        {**turn, "content": to_pirate(turn["content"], rng)} if turn["role"] == "assistant" else turn for turn in turns
    ]
    return [{"role": "system", "content": rng.choice(PIRATE_PROMPTS)}, *answered]


def sample_exchanges(
    rng: Random, kinds: Sequence[Kind], *, held_out: bool, in_turn: bool = False
) -> Iterator[Exchange]:
    """An endless stream of exchanges, kinds at random or in turn; all about held-out facts, or none."""
    turn = 0
    while True:
        kind = kinds[turn % len(kinds)] if in_turn else rng.choice(kinds)
        yield _matching(lambda kind=kind: kind(rng), held_out)  # type: ignore[misc]
        turn += 1


def different(exchanges: Iterable[Exchange], n: int) -> Iterator[Exchange]:
    """The first `n` exchanges that ask different things."""
    seen: set[str] = set()
    for exchange in exchanges:
        if len(seen) == n:
            return
        if exchange.prompt not in seen:
            seen.add(exchange.prompt)
            yield exchange


def single_turn(exchange: Exchange) -> list[Message]:
    return [{"role": "user", "content": exchange.prompt}, {"role": "assistant", "content": exchange.answer}]


def two_turns(exchange: Exchange) -> list[Message]:
    """The context in a turn of its own, acknowledged; then the question."""
    first = [{"role": "user", "content": exchange.context}, {"role": "assistant", "content": NOTED}]
    return [*first, *single_turn(replace(exchange, context=""))]


def _matching(make: Callable[[], Exchange], held_out: bool) -> Exchange:
    while (exchange := make()).held_out != held_out:
        pass
    return exchange


def _conversation(rng: Random, exchanges: Iterator[Exchange]) -> list[Message]:
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.4 else []
    turns: list[Message] = []
    for exchange in islice(exchanges, rng.choice([1, 1, 1, 2, 2, 3, 4])):
        if exchange.kind != "untold_name" or not turns:  # after other turns, the name may be known
            turns += _as_typed(rng, exchange)
    if rng.random() < 0.15:  # the name comes in the first turn, the question for it in the last
        question = next(exchange for exchange in exchanges if exchange.kind == "name")
        hello = _matching(lambda: questions.greeting(rng, str(question.key[1])), held_out=False)
        turns = [*single_turn(hello), *turns, *single_turn(replace(question, context=""))]
    return system + turns


def _as_typed(rng: Random, exchange: Exchange) -> list[Message]:
    """In one turn or two, the context on its own line or not; some without capitals or final punctuation."""
    if exchange.context and rng.random() < 0.2:
        turns = two_turns(exchange)
    elif exchange.context and rng.random() < 0.3:
        turns = single_turn(replace(exchange, instruction=f"{exchange.context} {exchange.instruction}", context=""))
    else:
        turns = single_turn(exchange)
    user = turns[-2]
    if rng.random() < 0.1:
        user["content"] = user["content"].lower()
    if rng.random() < 0.1:
        user["content"] = user["content"].rstrip(".?!")
    return turns
