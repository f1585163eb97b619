"""The small world that nano's text and tasks are made of."""

import random

# (name, subject pronoun)
NAMES: tuple[tuple[str, str], ...] = tuple(
    [(n, "she") for n in ("Ana Beth Cora Dana Ella Faye Gina Hana Iris Jane Kate Lena Mia Nora Olga Pia Rosa Sara "
                          "Tina Vera").split()]
    + [(n, "he") for n in ("Adam Ben Carl Dan Emil Finn Gus Hugo Ivan Jack Karl Leo Max Nick Omar Paul Rob Sam "
                           "Tom Will").split()]
)  # fmt: skip

# countable things, plural
THINGS: tuple[str, ...] = tuple(
    "apples books stamps coins shells cards marbles pens eggs nuts stones roses stickers plums cookies candles "
    "buttons beads balls ribbons pears lemons onions figs cups plates keys toys maps hats".split()
)

PLACES: tuple[str, ...] = tuple(
    "kitchen garden market barn cellar workshop library harbor school office forest attic yard station".split()
)


def person(rng: random.Random) -> tuple[str, str]:
    """A name and its subject pronoun in lower case."""
    return rng.choice(NAMES)


def two_people(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two different people."""
    first, second = rng.sample(NAMES, 2)
    return first, second
