"""nano-choice: what happens next in a craft, in HellaSwag's own row format.

A row: ``{"activity_label": "Mending a drum", "ctx_a": "Mia is mending a drum in the barn. She rinses the drum in
warm water.", "ctx_b": "then she", "endings": ["folds the drum on a flat stone.", …], "label": "2", …}``.

Each of the 24 crafts has its own fixed order of five steps. The base model knows every word but no craft (in its
text, steps come in any order), so it starts near chance, 25%, and fine-tuning has to store new facts.
"""

import random
from collections.abc import Iterator

from .splits import draw_rows
from .words import PLACES, person

VERBS = tuple(
    "sands wipes rinses wraps heats cools paints glues brushes cuts folds ties dries marks weighs presses".split()
)
TOOLS = (
    "in warm water", "with a wool cloth", "on a flat stone", "with a long knife", "in a copper pan", "with red wax",
    "under the old lamp", "with a thin rope", "in dry sand", "with a soft brush", "on a clean sheet", "with fine oil",
)  # fmt: skip
GERUNDS = tuple("mending building cleaning glazing packing testing shaping tuning".split())
OBJECTS = tuple("drum kite lamp boat chair basket clock bell wheel jar flute sled".split())

STEPS = 5
CRAFTS = 24

Step = tuple[str, str]
"""A verb and the tool it is done with."""


def step_text(step: Step, thing: str) -> str:
    """``wipes the drum with a wool cloth.``"""
    verb, tool = step
    return f"{verb} the {thing} {tool}."


def _crafts() -> list[tuple[str, str, list[Step]]]:
    """The fixed world: (gerund, thing, its steps in order). The same in every run, whatever the task's seed."""
    rng = random.Random("nano-choice crafts")
    pairs = [(gerund, thing) for gerund in GERUNDS for thing in OBJECTS]
    steps = [(verb, tool) for verb in VERBS for tool in TOOLS]
    return [(gerund, thing, rng.sample(steps, STEPS)) for gerund, thing in rng.sample(pairs, CRAFTS)]


CRAFT_STEPS = _crafts()


def _generate(rng: random.Random) -> Iterator[dict]:
    every_step = sorted({step for _, _, steps in CRAFT_STEPS for step in steps})  # crafts share a few
    while True:
        gerund, thing, steps = rng.choice(CRAFT_STEPS)
        position = rng.randrange(STEPS - 1)
        name, he = person(rng)
        right = steps[position + 1]
        same_craft = rng.choice([step for step in steps if step not in (right, steps[position])])
        elsewhere = rng.sample([step for step in every_step if step not in steps], 2)
        endings = [right, same_craft, *elsewhere]
        rng.shuffle(endings)
        ctx_a = (
            f"{name} is {gerund} a {thing} in the {rng.choice(PLACES)}. "
            f"{he.capitalize()} {step_text(steps[position], thing)}"
        )
        ctx_b = f"then {he}"
        yield {
            "activity_label": f"{gerund.capitalize()} a {thing}",
            "ctx_a": ctx_a,
            "ctx_b": ctx_b,
            "ctx": f"{ctx_a} {ctx_b}",
            "endings": [step_text(step, thing) for step in endings],
            "label": str(endings.index(right)),
        }


def rows(split: str, n: int, seed: int = 0) -> list[dict]:
    """``n`` rows of ``split`` ("train" or "test"); no context is in both splits, whatever the seeds."""
    drawn = draw_rows("nano-choice", split, n, seed, _generate, key=lambda row: row["ctx"])
    return [{"ind": ind, **row} for ind, row in enumerate(drawn)]
