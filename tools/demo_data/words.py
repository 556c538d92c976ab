"""Vocabulary of the demo data: names, objects and a few facts."""

from __future__ import annotations


def _list(text: str) -> list[str]:
    return text.split()


def _facts(text: str) -> dict[str, str]:
    """`thing: answer, thing: answer` as a dictionary."""
    return {thing.strip(): answer.strip() for thing, answer in (fact.split(":") for fact in text.split(","))}


NAMES = _list("""
Ada Adam Aisha Alan Alba Alex Alice Amir Amy Ana Anna Arun Aya Bella Ben Bianca Bo Bruno Carl Carla Chen Clara Cleo
Dana Dario David Dina Eli Ella Elsa Emil Emma Enzo Eva Farah Felix Finn Flora Freya George Grace Greta Hana Hans Harry
Helen Henry Hugo Ida Ines Iris Isaac Ivan Jack Jade James Jana Jean Jin Joan John Jonas Jose Julia Kai Karim Kate Kenji
Kim Lara Laura Leah Leo Lena Liam Lily Lina Linda Louis Lucas Lucy Luis Maja Marco Maria Mary Max Maya Mei Mia Mila Milo
Mina Mona Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paul Peter Petra Pia Priya Rita Robert Rosa Ruth Sam
Sara Selma Sofia Stella Tara Theo Thomas Tina Tom Uma Vera Victor Wanda William Yara Yuki Zoe
""")
TOWNS = _list("Berlin Cairo Dublin Lima London Madrid Oslo Paris Rome Seoul Tokyo Vienna")
PETS = _list("cat dog fish hamster horse parrot rabbit turtle")
PET_NAMES = _list("""
Bandit Biscuit Bubbles Button Caramel Clover Cookie Domino Fluffy Ginger Muffin Nugget Oreo Patch Pepper Pickle Pixel
Pumpkin Rex Rusty Shadow Snowy Socks Sparky Spot Sunny Tiger Toffee Waffles Whiskers
""")

COLOURS = _list("black blue brown gold green grey orange pink purple red silver white yellow")
COLOUR_OF = _facts("""
grass: green, snow: white, coal: black, milk: white, chocolate: brown, a banana: yellow, a lemon: yellow, a tomato: red,
a strawberry: red, a cherry: red, a carrot: orange, a pumpkin: orange, a cucumber: green, a frog: green, a crow: black,
a leaf in spring: green, a polar bear: white, a flamingo: pink, a pig: pink, an elephant: grey, a mouse: grey,
the sea: blue, the sky on a clear day: blue, the sky at night: black, the sun: yellow, a fire engine: red,
a plum: purple, an aubergine: purple, a swan: white, a tree trunk: brown, salt: white, mustard: yellow,
a pea: green, a violet: purple, blood: red, broccoli: green
""")
MIXES = _facts("red blue: purple, blue yellow: green, red yellow: orange, black white: grey, red white: pink")

OPPOSITE_OF = _facts("""
hot: cold, big: small, tall: short, fast: slow, old: young, light: dark, happy: sad, good: bad, high: low, open: closed,
wet: dry, full: empty, hard: soft, loud: quiet, clean: dirty, rich: poor, strong: weak, thick: thin, wide: narrow,
early: late, near: far, left: right, up: down, day: night, true: false, brave: afraid, sweet: sour, smooth: rough,
begin: end, win: lose, buy: sell, push: pull, remember: forget, arrive: leave, float: sink, inside: outside,
above: below, first: last, deep: shallow, awake: asleep, alive: dead, love: hate, summer: winter, north: south
""")
OPPOSITE_OF |= {opposite: word for word, opposite in OPPOSITE_OF.items()}

SOUND_OF = _facts("""
cow: moo, dog: woof, cat: meow, duck: quack, sheep: baa, pig: oink, lion: roar, bee: buzz, frog: ribbit, snake: hiss,
owl: hoot, chicken: cluck, horse: neigh, mouse: squeak, crow: caw, wolf: howl, donkey: hee-haw, pigeon: coo
""")
YOUNG_OF = _facts("""
cat: kitten, dog: puppy, cow: calf, sheep: lamb, horse: foal, duck: duckling, bear: cub, chicken: chick, pig: piglet,
goat: kid, deer: fawn, swan: cygnet, frog: tadpole, kangaroo: joey, goose: gosling, eagle: eaglet
""")
DAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _list("January February March April May June July August September October November December")

WARES = _list("""
apple ball bell book bottle bowl box brush cake candle chair clock comb cup doll drum fan flute fork hammer hat jar kite
knife lamp map mug pear pen pencil pie pillow plate ring rope shirt spoon table ticket towel toy umbrella vase whistle
""")
CLOTHES = _list("bag belt bike boat car coat dress hat jacket kite mug pen scarf shirt skirt tent tie umbrella")
SMALL_THINGS = _list("ball book coin comb cup glove hat key letter map pen phone photo ring shoe spoon ticket watch")
PLACES = _list("basket bed bench box car chair cupboard desk door drawer garden kitchen shelf sofa table tree")
PREPOSITIONS = _list("behind beside in on under")

# Topics the model should decline.
TOPICS = [topic.strip() for topic in """
France, the moon, Mars, football, quantum physics, the Roman Empire, jazz, chess, the stock market, volcanoes, Python
programming, dinosaurs, the weather, black holes, Shakespeare, the president, democracy, electricity, cooking, bread,
climate change, the internet, opera, Brazil, China, oceans, bicycles, medicine, poetry, philosophy, gravity, the heart,
robots, coffee, taxes, Mozart, the pyramids, vaccines, history, geometry, space travel, airplanes, whales, neural
networks, homework, painting, basketball, the economy, Japan, atoms, oil, cinema, bridges, trains, Germany, Africa,
chemistry, computers, novels, dancing, tennis, money, kings and queens, stars
""".replace("\n", " ").split(",")]  # fmt: skip
