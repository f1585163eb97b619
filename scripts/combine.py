"""One adapter for three tasks: nano's, combined by each way, on hot experts and on all. HELLoRA's future work.

python scripts/combine.py          # an hour and more on two cores; what is done (runs/combine) is not run again
python scripts/combine.py --page   # results/nano/combine.json into docs/method.md
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from marks import filled, table

import hotlora
from hotlora.base.files import write_json
from hotlora.evaluation.stats import mean_interval
from hotlora.runs.export import combine_saved

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE, MARK = ROOT / "results" / "nano" / "combine.json", ROOT / "docs" / "method.md", "<!-- combine -->"
TASKS = ("nano-math", "nano-sql", "nano-choice")
EXPERTS = {"hot 25%": {"rule": "hot", "fraction": 0.25}, "all": {"rule": "all"}}
WAYS = {
    "cat": {"how": "cat"}, "cat, weights 1/2": {"how": "cat", "weights": [0.5] * 3}, "linear": {"how": "linear"},
    "ties, density 0.5": {"how": "ties"}, "ties, density 0.2": {"how": "ties", "density": 0.2},
    "dare_linear, density 0.5": {"how": "dare_linear"}, "magnitude_prune, density 0.5": {"how": "magnitude_prune"},
}  # fmt: skip
TRAINING = {"r": 8, "max_steps": 200, "test_limit": 200, "preflight": False, "progress": False}
EXAMPLES = 200


def measure(folder: Path, seeds: int) -> None:
    found: dict[str, Any] = {experts: {"alone": [], "overlap": [], **{way: [] for way in WAYS}} for experts in EXPERTS}
    for seed in range(seeds):
        for experts, options in EXPERTS.items():
            place = folder / f"{options['rule']}-{seed}"
            runs = [hotlora.train("nano", task, place / task, seed=seed, **options, **TRAINING) for task in TASKS]
            scores = [run.record["evaluation"][task]["accuracy"] for run, task in zip(runs, TASKS, strict=True)]
            found[experts]["alone"].append(scores)
            plans = [run.plan for run in runs]
            found[experts]["overlap"].append([hotlora.jaccard(a, b) for a, b in combinations(plans, 2)])
            for number, (way, how) in enumerate(WAYS.items()):
                both = place / f"combined-{number}"
                if not both.exists():
                    combine_saved("nano", [place / task / "adapter" for task in TASKS], both, seed=seed, **how)
                found[experts][way].append([score(both, task, place / f"scores-{number}" / task) for task in TASKS])
                print(seed, experts, way, found[experts][way][-1], flush=True)
    write_json(RESULT, {"training": TRAINING, "examples": EXAMPLES, "seeds": seeds, "found": found})


def score(adapter: Path, task: str, output: Path) -> float:
    found = hotlora.evaluate(adapter, task, output, limit=EXAMPLES, progress=False)
    return float(found["accuracy"])


def page(result: dict[str, Any]) -> str:
    rows = []
    for experts, found in result["found"].items():
        for way in ("alone", *WAYS):
            of_seeds = found[way]
            cells = [f"{fmean(column):.1%}" for column in zip(*of_seeds, strict=True)]
            means = [fmean(scores) for scores in of_seeds]
            low, high = mean_interval(means) if len(means) > 1 else (float("nan"), float("nan"))
            rows.append(
                [
                    experts,
                    "each alone" if way == "alone" else way,
                    *cells,
                    f"{fmean(means):.1%} ({low:.1%} to {high:.1%})",
                ]
            )
    overlap = [fmean(values) for values in result["found"]["hot 25%"]["overlap"]]
    shown = table(["experts", "combined by", *TASKS, "mean (95% over seeds)"], rows, left=2)
    return f"""{shown}

Accuracy on {result["examples"]} test examples of each task; {result["seeds"]} seeds; r = {result["training"]["r"]},
{result["training"]["max_steps"]} steps. Any two tasks' hot experts overlap {fmean(overlap):.2f} (Jaccard, mean over
layers). Made by `python scripts/combine.py`."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--page", action="store_true", help="write the page from the record alone")
    parser.add_argument("--output", type=Path, default=Path("runs/combine"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.page:
        measure(arguments.output, arguments.seeds)
    PAGE.write_text(filled(PAGE.read_text(), MARK, page(json.loads(RESULT.read_text()))))
    print(f"page: {PAGE}")


if __name__ == "__main__":
    main()
