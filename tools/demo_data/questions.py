"""Kinds of question about people, words and things: each function samples a question, its answer and its check."""

from __future__ import annotations

from random import Random

from demo_data import phrases, words
from demo_data.checks import name_check, one_of
from demo_data.exchange import Exchange, a, person, sentence, shuffled, two_people
from demo_data.phrases import WAYS
from parley.evaluation.demo_scoring import Check

UNKNOWN = "I do not know that yet. Ask me about colours, animals, prices or sums."
# The word that only the right answer of each kind of small talk contains.
_MARKER = {
    "identity": "parley",
    "thanks": "welcome",
    "goodbye": "goodbye",
    "wellbeing": "well",
    "abilities": "colours",
}


def greeting(rng: Random, name: str = "") -> Exchange:
    name = name or person(rng)
    hello, me = rng.choice(phrases.GREETINGS), rng.choice(phrases.I_AM).format(name)
    answer = f"Hello, {name}! How can I help you?"
    return Exchange("greeting", ("greeting", hello, me), f"{hello}, {me}", answer, name_check(name))


def identity(rng: Random) -> Exchange:
    return _small_talk(rng, "identity", phrases.HELLOS, "I am Parley, a very small language model.")


def thanks(rng: Random) -> Exchange:
    return _small_talk(rng, "thanks", phrases.NICE, "You are welcome!")


def goodbye(rng: Random) -> Exchange:
    return _small_talk(rng, "goodbye", phrases.LEAVING, "Goodbye, and have a nice day!")


def wellbeing(rng: Random) -> Exchange:
    return _small_talk(rng, "wellbeing", phrases.HELLOS, "I am well, thank you for asking.")


def abilities(rng: Random) -> Exchange:
    answer = "I know colours, opposites, animals, days and prices, and I can count and add."
    return _small_talk(rng, "abilities", phrases.HELLOS, answer)


def _small_talk(rng: Random, kind: str, openers: list[str], answer: str) -> Exchange:
    opener, ask = rng.choice(openers), rng.choice(WAYS[kind])
    check = one_of(_MARKER[kind], _MARKER.values())
    return Exchange(kind, (kind, opener, ask), f"{opener} {ask}".strip(), answer, check)


def name(rng: Random) -> Exchange:
    me, other = two_people(rng)
    said = rng.choice([
        f"My name is {me}.", f"I am {me}.", f"I am {me} and I live in {rng.choice(words.TOWNS)}.", f"Call me {me}.",
        f"My name is {me} and my friend is called {other}.", f"{other} is my friend. I am {me}.",
    ])  # fmt: skip
    ask = rng.choice(WAYS["name"])
    return Exchange("name", ("name", me, ask), ask, f"Your name is {me}.", name_check(me, not_name=other), said)


def untold_name(rng: Random) -> Exchange:
    opener, ask = rng.choice(phrases.HELLOS), rng.choice(WAYS["name"])
    check = Check(frozenset({"told", "name"}), others=name_check("").others, negated=True)
    said = "You have not told me your name yet."
    return Exchange("untold_name", ("untold_name", opener, ask), f"{opener} {ask}".strip(), said, check)


def pet(rng: Random) -> Exchange:
    (animal, second), (called, other) = rng.sample(words.PETS, 2), rng.sample(words.PET_NAMES, 2)
    said = rng.choice([
        f"My {animal} is called {called}.", f"I have a {animal}. Its name is {called}.",
        f"{called} is the name of my {animal}.",
    ])  # fmt: skip
    context = said if rng.random() < 0.5 else shuffled(rng, [said, f"My {second} is called {other}."])
    ask = rng.choice(WAYS["pet"]).format(animal)
    check = one_of(called, words.PET_NAMES)
    return Exchange("pet", ("pet", animal, called), ask, f"Your {animal} is called {called}.", check, context)


def colour(rng: Random) -> Exchange:
    thing, answer = rng.choice(list(words.COLOUR_OF.items()))
    way = rng.choice(WAYS["colour"])
    check = one_of(answer, words.COLOURS)
    return Exchange("colour", ("colour", thing, way), way.format(thing), sentence(f"{thing} is {answer}"), check)


def owned_colour(rng: Random) -> Exchange:
    who, tint, thing = person(rng), rng.choice(words.COLOURS), rng.choice(words.CLOTHES)
    context = sentence(rng.choice(["{} has {} {}", "{} bought {} {}", "{} owns {} {}"]).format(who, a(tint), thing))
    ask = rng.choice(WAYS["owned_colour"]).format(who, thing)
    check = one_of(tint, words.COLOURS)
    answer = f"{who}'s {thing} is {tint}."
    return Exchange("owned_colour", ("owned_colour", thing, tint), ask, answer, check, context)


def mix(rng: Random) -> Exchange:
    pair, answer = rng.choice(list(words.MIXES.items()))
    one, two = rng.sample(pair.split(), 2)
    way = rng.choice(WAYS["mix"])
    check = one_of(answer, words.COLOURS, mentioned=[one, two])
    return Exchange(
        "mix", ("mix", one, two, way), way.format(one, two), sentence(f"{one} and {two} make {answer}"), check
    )


def opposite(rng: Random) -> Exchange:
    word, answer = rng.choice(list(words.OPPOSITE_OF.items()))
    way = rng.choice(WAYS["opposite"])
    check = one_of(answer, words.OPPOSITE_OF, mentioned=[word])
    said = f"The opposite of {word} is {answer}."
    return Exchange("opposite", ("opposite", word, way), way.format(word), said, check)


def sound(rng: Random) -> Exchange:
    animal, answer = rng.choice(list(words.SOUND_OF.items()))
    way = rng.choice(WAYS["sound"])
    check = one_of(answer, words.SOUND_OF.values())
    return Exchange(
        "sound", ("sound", animal, way), way.format(a(animal)), sentence(f"{a(animal)} says {answer}"), check
    )


def young(rng: Random) -> Exchange:
    animal, answer = rng.choice(list(words.YOUNG_OF.items()))
    way = rng.choice(WAYS["young"])
    check = one_of(answer, words.YOUNG_OF.values())
    return Exchange("young", ("young", animal, way), way.format(animal), f"A young {animal} is {a(answer)}.", check)


def day(rng: Random) -> Exchange:
    return _next_in(rng, "day", words.DAYS)


def month(rng: Random) -> Exchange:
    return _next_in(rng, "month", words.MONTHS)


def _next_in(rng: Random, kind: str, series: list[str]) -> Exchange:
    place, (side, step) = rng.randrange(len(series)), rng.choice([("after", 1), ("before", -1)])
    given, answer, way = series[place], series[(place + step) % len(series)], rng.choice(WAYS[kind])
    check = one_of(answer, series, mentioned=[given], never=[f"{side} {answer}"])
    return Exchange(kind, (kind, given, side, way), way.format(side, given), f"{answer} comes {side} {given}.", check)


def place(rng: Random) -> Exchange:
    thing, side, where = rng.choice(words.SMALL_THINGS), rng.choice(words.PREPOSITIONS), rng.choice(words.PLACES)
    fact = f"The {thing} is {side} the {where}."
    ask = rng.choice(WAYS["place"]).format(thing)
    check = Check(frozenset({side, where}), others=frozenset({*words.PLACES, *words.PREPOSITIONS} - {side, where}))
    return Exchange("place", ("place", thing, where), ask, fact, check, fact)


def unknown(rng: Random) -> Exchange:
    topic, way = rng.choice(words.TOPICS), rng.choice(WAYS["unknown"])
    check = Check(frozenset({"know"}), negated=True)
    return Exchange("unknown", ("unknown", topic, way), way.format(topic), UNKNOWN, check)
