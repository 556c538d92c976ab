"""The kinds of question that need numbers: counting, sums, prices, change and comparisons."""

from __future__ import annotations

from random import Random

from parley.data.world import words
from parley.data.world.exchange import Exchange, a, counted, plurals, sentence, shuffled, two_people
from parley.data.world.phrases import WAYS
from parley.data.world.scoring import Check


def count(rng: Random) -> Exchange:
    first = rng.choice([1, rng.randint(2, 30)])
    last = first + rng.randint(2, 7)
    ask = rng.choice(WAYS["count"]).format(first, last)
    if first == 1 and rng.random() < 0.5:
        ask = rng.choice(WAYS["count_to"]).format(last)
    numbers = tuple(range(first, last + 1))
    return Exchange("count", ("count", first, last), ask, f"{', '.join(map(str, numbers))}.", Check(numbers=numbers))


def next_number(rng: Random) -> Exchange:
    given, (side, step) = rng.randint(2, 98), rng.choice([("after", 1), ("before", -1)])
    ask = rng.choice(WAYS["next_number"]).format(side, given)
    return _number("next_number", ("next_number", side, given), ask, given + step)


def plus(rng: Random) -> Exchange:
    one, two = rng.randint(1, 30), rng.randint(1, 30)
    return _number("plus", ("plus", one, two), rng.choice(WAYS["plus"]).format(one, two), one + two)


def minus(rng: Random) -> Exchange:
    rest, two = rng.randint(1, 20), rng.randint(1, 20)
    one = rest + two
    return _number("minus", ("minus", one, two), rng.choice(WAYS["minus"]).format(one, two), rest)


def bigger(rng: Random) -> Exchange:
    one, two = rng.sample(range(1, 100), 2)
    side = rng.choice(["bigger", "greater", "larger", "smaller", "less"])
    right = min(one, two) if side in ("smaller", "less") else max(one, two)
    return _number("bigger", ("bigger", one, two), rng.choice(WAYS["bigger"]).format(side, one, two), right)


def _number(kind: str, key: tuple[str | int, ...], ask: str, right: int) -> Exchange:
    return Exchange(kind, key, ask, f"It is {right}.", Check(numbers=(right,)))


def price(rng: Random) -> Exchange:
    (ware, *_), (cost, *_), context = _prices(rng)
    ask = rng.choice(WAYS["price"]).format(a(ware))
    answer = sentence(f"{a(ware)} costs {counted(cost, 'coin')}")
    return Exchange("price", ("price", ware, cost), ask, answer, Check(numbers=(cost,)), context)


def total(rng: Random) -> Exchange:
    (first, second, *_), (one, two, *_), context = _prices(rng)
    ask = rng.choice(WAYS["total"]).format(a(first), a(second))
    answer = f"Together they cost {counted(one + two, 'coin')}."
    return Exchange("total", ("plus", one, two), ask, answer, Check(numbers=(one + two,)), context)


def change(rng: Random) -> Exchange:
    rest, cost, ware = rng.randint(1, 20), rng.randint(1, 20), rng.choice(words.WARES)
    have = rest + cost
    context = shuffled(rng, [f"I have {counted(have, 'coin')}.", sentence(f"{a(ware)} costs {counted(cost, 'coin')}")])
    ask = rng.choice(WAYS["change"]).format(ware)
    answer = f"You have {counted(rest, 'coin')} left."
    return Exchange("change", ("minus", have, cost), ask, answer, Check(numbers=(rest,)), context)


def cheaper(rng: Random) -> Exchange:
    (first, second, *_), (one, two, *_), context = _prices(rng)
    side = rng.choice(["cheaper", "less expensive", "dearer", "more expensive"])
    low = side in ("cheaper", "less expensive")
    right = first if (one < two) == low else second
    ask = rng.choice(WAYS["cheaper"]).format(side, *rng.sample([first, second], 2))
    answer = f"The {right} is {'cheaper' if low else 'more expensive'}."
    key = ("cheaper", side, one, two)
    return Exchange("cheaper", key, ask, answer, Check.one_of(right, words.WARES), context)


def older(rng: Random) -> Exchange:
    people, ages, facts = _ages(rng)
    side = rng.choice(["older", "younger"])
    first, second = rng.sample(people, 2)
    ask = f"Who is {side}{rng.choice(['', f', {first} or {second}', f': {first} or {second}', ' of the two'])}?"
    who, other = people if (ages[0] > ages[1]) == (side == "older") else people[::-1]
    check = Check.name(who, not_name=other)
    return Exchange("older", ("older", side, ages[0], ages[1]), ask, f"{who} is {side}.", check, facts)


def age(rng: Random) -> Exchange:
    (who, _), (years, _), facts = _ages(rng)
    ask = rng.choice(WAYS["age"]).format(who)
    return Exchange("age", ("age", years, ask), ask, f"{who} is {years} years old.", Check(numbers=(years,)), facts)


def how_many(rng: Random) -> Exchange:
    fruit, *rest = rng.sample(words.FRUITS, rng.choice([2, 3]))
    number = rng.randint(1, 6)
    basket = [fruit] * number + rng.choices(rest, k=rng.randint(1, 5))
    rng.shuffle(basket)
    ask = rng.choice(WAYS["how_many"]).format(plurals(fruit))
    answer = f"There {'is' if number == 1 else 'are'} {counted(number, fruit)}."
    return Exchange("how_many", ("how_many", *basket), ask, answer, Check(numbers=(number,)), ", ".join(basket))


def _prices(rng: Random) -> tuple[list[str], list[int], str]:
    """Two or three wares, their different prices, and the sentences that tell them."""
    wares = rng.sample(words.WARES, rng.choice([2, 2, 3]))
    costs = rng.sample(range(1, 21), len(wares))
    told = rng.choice(["{} costs {}", "{} is {}", "the price of {} is {}"])
    facts = [sentence(told.format(a(w), counted(c, "coin"))) for w, c in zip(wares, costs, strict=True)]
    return wares, costs, shuffled(rng, facts)


def _ages(rng: Random) -> tuple[list[str], list[int], str]:
    people, ages = list(two_people(rng)), rng.sample(range(2, 80), 2)
    return (
        people,
        ages,
        shuffled(rng, [f"{who} is {years} years old." for who, years in zip(people, ages, strict=True)]),
    )
