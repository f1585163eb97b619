"""nano-math: two-step word problems in GSM8K's own row format.

A row: ``{"question": "Leo has 14 pens. He buys 7 more pens. Then he gives away 5 pens. How many pens does Leo
have now?", "answer": "14 + 7 = 21\\n21 - 5 = 16\\n#### 16"}``. All numbers lie in 0–99. The base model has seen
one- and two-step sums in other words and in another form; comparisons ("twice as many", "fewer") and boxes it
meets here.
"""

import random
from collections.abc import Callable, Iterator

from .splits import draw_rows
from .words import THINGS, person, two_people

Problem = tuple[str, list[tuple[int, str, int]]]
"""A question, and its steps as (left operand, operator, right operand)."""

GAIN = ("buys", "finds", "gets", "picks", "wins")
LOSE = ("gives away", "loses", "sells", "breaks", "drops")
OPERATE: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def _change_twice(rng: random.Random) -> Problem:
    name, he = person(rng)
    thing = rng.choice(THINGS)
    start = rng.randint(5, 40)
    story, steps, have = f"{name} has {start} {thing}.", [], start
    for sentence_start in (he.capitalize(), f"Then {he}"):
        amount = rng.randint(2, 20)
        if rng.random() < 0.5 and have > amount:
            verb, operator, more = rng.choice(LOSE), "-", ""
        else:
            verb, operator, more = rng.choice(GAIN), "+", "more "
        story += f" {sentence_start} {verb} {amount} {more}{thing}."
        steps.append((have, operator, amount))
        have = OPERATE[operator](have, amount)
    return f"{story} How many {thing} does {name} have now?", steps


def _twice_as_many(rng: random.Random) -> Problem:
    (a, _), (b, _) = two_people(rng)
    thing, n = rng.choice(THINGS), rng.randint(3, 30)
    question = f"{a} has {n} {thing}. {b} has twice as many. How many {thing} do they have together?"
    return question, [(n, "*", 2), (n, "+", 2 * n)]


def _fewer(rng: random.Random) -> Problem:
    (a, _), (b, _) = two_people(rng)
    thing, n = rng.choice(THINGS), rng.randint(12, 45)
    less = rng.randint(2, 10)
    question = f"{a} has {n} {thing}. {b} has {less} fewer. How many {thing} do they have together?"
    return question, [(n, "-", less), (n, "+", n - less)]


def _boxes(rng: random.Random) -> Problem:
    name, he = person(rng)
    thing, have = rng.choice(THINGS), rng.randint(3, 40)
    boxes, each = rng.randint(2, 5), rng.randint(2, 9)
    question = (
        f"{name} has {have} {thing}. {he.capitalize()} buys {boxes} boxes with {each} {thing} in each. "
        f"How many {thing} does {name} have now?"
    )
    return question, [(boxes, "*", each), (have, "+", boxes * each)]


KINDS = (_change_twice, _change_twice, _twice_as_many, _fewer, _boxes)


def _generate(rng: random.Random) -> Iterator[dict]:
    while True:
        question, steps = rng.choice(KINDS)(rng)
        lines = [f"{a} {operator} {b} = {OPERATE[operator](a, b)}" for a, operator, b in steps]
        a, operator, b = steps[-1]
        yield {"question": question, "answer": "\n".join([*lines, f"#### {OPERATE[operator](a, b)}"])}


def rows(split: str, n: int, seed: int = 0) -> list[dict]:
    """``n`` rows of ``split`` ("train" or "test"); no question is in both splits, whatever the seeds."""
    return draw_rows("nano-math", split, n, seed, _generate, key=lambda row: row["question"])
