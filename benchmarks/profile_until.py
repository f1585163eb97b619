"""Whether a profile that is read until its hot experts are settled keeps what it promises, and what that spares.

    python benchmarks/profile_until.py routing/olmoe_alpaca/bf16.json.gz --output results/profile_until.json

No model is run on OLMoE's data: 1,024 rows of Alpaca, each with its own counts, are the population, of which rows are
drawn with replacement, so that the hot experts of endless such data are known: those of all rows. Each draw is read
until the estimate reaches the target, and then held against them. Without replacement, as data are really read, the
hot experts are those of the 1,024 rows themselves, which are nearer. nano is run on its tasks: once on all of its 2,000
training rows, then by `profile_until`, with the seconds of both.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hotlora.base.files import write_json
from hotlora.base.records import environment
from hotlora.hf.models import load_model, load_tokenizer
from hotlora.routing.plan import ExpertPlan, selected
from hotlora.routing.profile import RoutingProfile, jaccard
from hotlora.routing.profiler import profile_examples
from hotlora.routing.selection import UNTIL, Selection
from hotlora.routing.until import profile_until, settled, stability
from hotlora.tasks.data import load_examples
from hotlora.tasks.tokens import batches, tokenize

HOT = Selection(fraction=0.25)
TASKS = ("nano-math", "nano-sql", "nano-choice")
MOST = 5000  # rows of a draw with replacement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("counts", type=Path, help="counts of each example, as docs/study.md says how to make")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows, top_k = read_examples(options.counts)
    record: dict[str, Any] = {
        "draws": options.draws, "environment": environment(), "olmoe": of_population(rows, top_k, options.draws)
    }  # fmt: skip
    record["nano"] = {task: of_nano(task, options.draws) for task in TASKS}
    write_json(options.output, record)


def read_examples(file: Path) -> tuple[Tensor, int]:
    """int64 [X, L, E], and K."""
    with gzip.open(file) as stored:
        found = json.load(stored)
    counts = torch.zeros(len(found["examples"]), len(found["examples"][0]), found["num_experts"], dtype=torch.int64)
    for example, layers in zip(counts, found["examples"], strict=True):
        for row, pairs in zip(example, layers, strict=True):
            for expert, count in pairs:
                row[expert] = count
    return counts, found["num_experts_per_tok"]


def of_population(rows: Tensor, top_k: int, draws: int) -> dict[str, Any]:
    """The estimate at fixed numbers of rows, and what is promised where reading stops."""
    random = np.random.default_rng(0)
    whole = plan_of(rows, top_k)
    estimates = {}
    for number in (64, 256, 1024):
        found = []
        for draw in range(draws):
            some = rows[random.integers(0, len(rows), number)]
            plan = plan_of(some, top_k)
            guess = stability({"count": some}, plan, profile_of(some, top_k), seed=draw)
            found.append((jaccard(plan, whole), guess.mean, guess.low))
        true, mean, low = map(np.array, zip(*found, strict=True))
        estimates[str(number)] = {
            "true": spread(true), "estimate": spread(mean), "low": spread(low),
            "true_at_least_low": float((true >= low).mean()),
        }  # fmt: skip
        print(number, estimates[str(number)], flush=True)
    ways: dict[str, Callable[[], Tensor]] = {
        "with replacement": lambda: rows[random.integers(0, len(rows), MOST)],
        "without replacement": lambda: rows[random.permutation(len(rows))],
    }
    stops = {
        f"{target:g}, {way}": stopped(draw_rows, whole, top_k, target, draws)
        for target in (0.9, UNTIL)
        for way, draw_rows in ways.items()
    }
    return {"rows": len(rows), "tokens": tokens_of(rows, top_k), "estimates": estimates, "stops": stops}


def stopped(
    draw_rows: Callable[[], Tensor], whole: ExpertPlan, top_k: int, target: float, draws: int
) -> dict[str, Any]:
    """Of many draws that are read until `target`."""
    found = []
    for draw in range(draws):
        order = draw_rows()

        def read(start: int, end: int, order: Tensor = order) -> tuple[dict[str, Tensor], RoutingProfile]:
            return {"count": order[start:end]}, profile_of(order[:end], top_k)

        profile, number, guess = settled(read, len(order), target, HOT, seed=draw)
        assert guess is not None
        true = jaccard(selected(profile, HOT), whole)
        found.append((number, profile.num_tokens, guess.mean, guess.low, true))
    number, tokens, mean, low, true = map(np.array, zip(*found, strict=True))
    told = {
        "target": target, "rows": spread(number), "tokens": spread(tokens), "estimate": spread(mean),
        "true": spread(true), "true_at_least_target": float((true >= target).mean()),
        "true_at_least_low": float((true >= low).mean()),
    }  # fmt: skip
    print(told, flush=True)
    return told


def of_nano(task: str, draws: int) -> dict[str, Any]:
    """All rows and those that are enough: tokens, seconds and hot experts."""
    model, tokenizer = load_model("nano"), load_tokenizer("nano")
    dataset = tokenize(load_examples(task, "train", tokenizer=tokenizer), tokenizer, 256)
    start = time.perf_counter()
    whole, rows = profile_examples(model, batches(dataset, tokenizer, 16))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    enough = profile_until(model, lambda places: batches(dataset.select(places), tokenizer, 16), len(dataset))
    seconds_until = time.perf_counter() - start
    plan, top_k = selected(whole, HOT), whole.num_experts_per_tok
    rows, random = rows.long(), np.random.default_rng(0)
    return {
        "rows": len(dataset), "tokens": whole.num_tokens, "seconds": seconds,
        "until": {
            "rows": enough.source["examples"], "tokens": enough.num_tokens, "seconds": seconds_until,
            "estimate": enough.source["stability"], "true": jaccard(selected(enough, HOT), plan),
        },
        "stops": stopped(lambda: rows[random.permutation(len(rows))], plan, top_k, UNTIL, draws),
    }  # fmt: skip


def profile_of(rows: Tensor, top_k: int) -> RoutingProfile:
    counts = rows.sum(dim=0)
    return RoutingProfile(tuple(range(len(counts))), counts, counts.double(), tokens_of(rows, top_k), top_k)


def plan_of(rows: Tensor, top_k: int) -> ExpertPlan:
    return selected(profile_of(rows, top_k), HOT)


def tokens_of(rows: Tensor, top_k: int) -> int:
    return int(rows[:, 0].sum()) // top_k


def spread(values: Any) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "min": float(np.min(values)),
        "max": float(np.max(values)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
