"""The kinds of question that need numbers: counting, sums, prices and ages."""

from __future__ import annotations

from random import Random

from demo_data import words
from demo_data.exchange import Exchange, a, counted, person, sentence, shuffled
from demo_data.phrases import WAYS
from parley.evaluation.demo_scoring import Check


def count(rng: Random) -> Exchange:
    first = rng.choice([1, rng.randint(2, 12)])
    last = first + rng.randint(2, 5)
    ask = rng.choice(WAYS["count"]).format(first, last)
    if first == 1 and rng.random() < 0.5:
        ask = rng.choice(WAYS["count_to"]).format(last)
    numbers = tuple(range(first, last + 1))
    return Exchange(
        "count", ("count", first, last, ask), ask, f"{', '.join(map(str, numbers))}.", Check(numbers=numbers)
    )


def next_number(rng: Random) -> Exchange:
    given, (side, step) = rng.randint(2, 50), rng.choice([("after", 1), ("before", -1)])
    ask = rng.choice(WAYS["next_number"]).format(side, given)
    return _number("next_number", ("next_number", given, ask), ask, given + step)


def plus(rng: Random) -> Exchange:
    one, two = rng.randint(1, 20), rng.randint(1, 20)
    ask = rng.choice(WAYS["plus"]).format(one, two)
    return _number("plus", ("plus", ask), ask, one + two)


def minus(rng: Random) -> Exchange:
    rest, two = rng.randint(1, 12), rng.randint(1, 12)
    one = rest + two
    ask = rng.choice(WAYS["minus"]).format(one, two)
    return _number("minus", ("minus", ask), ask, rest)


def _number(kind: str, key: tuple[str | int, ...], ask: str, right: int) -> Exchange:
    return Exchange(kind, key, ask, f"It is {right}.", Check(numbers=(right,)))


def price(rng: Random) -> Exchange:
    (ware,), (cost,), context = _prices(rng, 1)
    ask = rng.choice(WAYS["price"]).format(a(ware))
    answer = sentence(f"{a(ware)} costs {counted(cost, 'coin')}")
    return Exchange("price", ("price", ware, cost), ask, answer, Check(numbers=(cost,)), context)


def total(rng: Random) -> Exchange:
    (first, second), (one, two), context = _prices(rng, 2)
    ask = rng.choice(WAYS["total"]).format(a(first), a(second))
    answer = f"Together they cost {counted(one + two, 'coin')}."
    return Exchange("total", ("total", one, two, ask), ask, answer, Check(numbers=(one + two,)), context)


def age(rng: Random) -> Exchange:
    who, years = person(rng), rng.randint(2, 20)
    ask = rng.choice(WAYS["age"]).format(who)
    context = f"{who} is {years} years old."
    return Exchange("age", ("age", years, ask), ask, context, Check(numbers=(years,)), context)


def _prices(rng: Random, number: int) -> tuple[list[str], list[int], str]:
    """`number` wares, their different prices, and the sentences that state them."""
    wares = rng.sample(words.WARES, number)
    costs = rng.sample(range(1, 13), number)
    pattern = rng.choice(["{} costs {}", "{} is {}", "the price of {} is {}"])
    facts = [sentence(pattern.format(a(w), counted(c, "coin"))) for w, c in zip(wares, costs, strict=True)]
    return wares, costs, shuffled(rng, facts)
