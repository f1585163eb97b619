"""Write docs/memory.md's tables: which models train on which cards, and how, by the estimate and `--fit`.

python scripts/memory.py            # the page again: two minutes
python scripts/memory.py --check    # fail if the page is not what would be written
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marks import filled, table

from hotlora.base.files import write_text
from hotlora.cost.cards import CARDS, step_time
from hotlora.cost.cluster import Machine
from hotlora.cost.estimate import step_of
from hotlora.cost.fit import choose
from hotlora.cost.memory import Step
from hotlora.cost.preflight import ROOM
from hotlora.cost.setups import Setup, Setups, flag
from hotlora.runs.options import RunOptions

ROOT = Path(__file__).resolve().parent.parent
PAGE, CONFIGS = ROOT / "docs" / "memory.md", ROOT / "benchmarks" / "configs"
MARK = "<!-- {}: made by scripts/memory.py -->"
MODELS = {
    "OLMoE-1B-7B": "olmoe-1b-7b", "DeepSeek-V2-Lite": "deepseek-v2-lite", "gpt-oss-20b": "gpt-oss-20b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b", "Mixtral-8x7B": "mixtral-8x7b", "GLM-4.5-Air": "glm-4.5-air",
    "gpt-oss-120b": "gpt-oss-120b", "Qwen3-235B-A22B": "qwen3-235b-a22b",
}  # fmt: skip
RANK, FRACTION, LENGTH, EXAMPLES = 16, 0.25, 2048, 16
RAM = {"64GiB": 64 * 2**30, "128GiB": 128 * 2**30}
"""`--host`, and its bytes."""
HOST_LEFT = 4e9
SMALL: dict[str, Any] = {"quantize_linear": 4, "optim": "paged_adamw_8bit"}


@dataclass(frozen=True)
class Asked:
    """A goal that was set: bytes of the card and of RAM."""

    model: str
    card: float
    most: float
    ram: float | None
    options: Mapping[str, Any]


ASKED = (
    Asked("Qwen3-30B-A3B", 12e9, 7e9, None, {}),
    Asked("Qwen3-30B-A3B", 24e9, 20e9, None, {"quantize": 4, "offload": "none"}),
    Asked("gpt-oss-120b", 24e9, 9e9, 70e9, {}),
    Asked("Qwen3-235B-A22B", 24e9, 22e9, 128e9, {"quantize": 4, "optim": "adamw_8bit"}),
)


def steps() -> dict[str, Step]:
    """Of a batch of all examples; smaller ones are parts of it."""
    options: dict[str, Any] = {
        "batch_size": EXAMPLES, "max_length": LENGTH, "fraction": FRACTION, "r": RANK, "padded": True,
    }  # fmt: skip
    return {name: step_of(CONFIGS / folder, **options) for name, folder in MODELS.items()}


def setups_of(name: str, step: Step, card: Machine, examples: int = EXAMPLES, **options: Any) -> Setups:
    run = RunOptions(
        model=name, data="", fraction=FRACTION, r=RANK, max_length=LENGTH, batch_size=examples, **options
    )  # fmt: skip
    whole = step.of_tokens(examples * LENGTH)
    return Setups(run, lambda changes: whole, given=tuple(options), card=card)


def page(text: str, found: Mapping[str, Step]) -> str:
    return filled(filled(text, MARK.format("models"), models_table(found)), MARK.format("asked"), asked_table(found))


def models_table(found: Mapping[str, Step]) -> str:
    rows = []
    for name, step in found.items():
        for card in CARDS:
            ways = [(options, setups_of(name, step, card, **options)) for options in ({}, SMALL)]
            rows.append([name, f"{card.memory / 1e9:.0f} GB", *_cells(ways, card)])
    heads = ["model", "card", "experts", "offload", "batch", "checkpointing", "besides", "host"]
    return table([*heads, "memory, GB", "RAM, GB", "tokens/s", "bound by"], rows, left=8)


def _cells(ways: list[tuple[dict[str, Any], Setups]], card: Machine) -> list[str]:
    for host, ram in RAM.items():
        for options, setups in ways:
            if (way := choose(setups, ROOM * card.memory, ram - HOST_LEFT)) is not None:
                besides = "small" if options else "–"
                return [*_how(way, besides), host, *_numbers(way), *_speed(way, card)]
    least = min(ways[-1][1].chosen_from, key=lambda way: way.total)
    return ["–", "–", "–", "–", "–", host, f"(at least {gb(least.total)})", f"({gb(least.host)})", "–", "–"]


def _how(way: Setup, besides: str) -> list[str]:
    bits = {None: "MXFP4" if way.step.packed else "16 bits", 8: "8 bits", 4: "4 bits"}[way.storage.quantize]
    size, steps = way.step.tokens // LENGTH, way.storage.gradient_accumulation_steps
    checkpointing = "yes" if way.storage.gradient_checkpointing else "no"
    return [bits, way.storage.offload, f"{size} × {steps}", checkpointing, besides]


def _numbers(way: Setup) -> list[str]:
    return [gb(way.total), gb(way.host) if way.host else "–"]


def _speed(way: Setup, card: Machine) -> list[str]:
    time = step_time(way.step, way.storage, card)
    tokens = way.step.tokens * way.storage.gradient_accumulation_steps
    bound = "PCIe" if time.bound == "transfer" else "products"
    return [f"{tokens / time.step:,.0f}", bound]


def asked_table(found: Mapping[str, Step]) -> str:
    rows = []
    for goal in ASKED:
        card = next(card for card in CARDS if card.memory == goal.card)
        for examples, options in ((1, {}), (1, SMALL), (EXAMPLES, SMALL)):
            options = {**options, **goal.options}
            setups = setups_of(goal.model, found[goal.model], card, examples, **options)
            ram = (goal.ram or RAM["64GiB"]) + 1e6
            way = choose(setups, ROOM * goal.card, ram)
            least = min((way for way in setups.chosen_from if way.host <= ram), key=lambda way: way.total)
            asked = f"≤ {gb(goal.most)}" + (f", RAM ≤ {gb(goal.ram)}" if goal.ram else "")
            flags = " ".join(flag(*option) for option in options.items()) or "–"
            named = [goal.model, f"{examples} × {LENGTH:,}", flags, asked]
            chosen = "does not fit" if way is None else f"{gb(way.total)} ({way.flags or 'as it is'})"
            met = "yes" if least.total <= goal.most else "no"
            how = [f"{gb(least.total)} ({least.flags})", gb(least.host), *_speed(least, card), met]
            rows.append([*named, f"`--fit {goal.card / 1e9:.0f}GB`: {chosen}", *how])
    heads = ["model", "tokens of a step", "besides", "asked, GB", "chosen: memory, GB", "the least: memory, GB"]
    return table([*heads, *(f"the least: {what}" for what in ("RAM, GB", "tokens/s", "bound by")), "met"], rows, left=6)


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Fail if the page is not what would be written.")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    made = page(text, steps())
    if check:
        print("docs/memory.md is up to date" if made == text else "docs/memory.md is not: run python scripts/memory.py")
        return int(made != text)
    write_text(PAGE, made)
    print("wrote docs/memory.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
