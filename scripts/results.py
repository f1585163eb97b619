"""Keep a sweep's records under results/, without its weights.

python scripts/results.py runs/auto_k results/nano/auto_k
python scripts/results.py runs/quantized results/nano/quantized
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hotlora.base.files import write_text
from hotlora.base.records import find_records
from hotlora.routing.plan import ExpertPlan

KEPT = ("run.json", "plan.json")


def take_over(runs: Path, into: Path) -> int:
    records = find_records(runs)
    for folder in records:
        target = into / folder.relative_to(runs)
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (folder / name).is_file():  # an adapter's path in it is one of the machine that made it
                text = (folder / name).read_text(encoding="utf-8")
                write_text(target / name, text.replace(str(runs.resolve()), f"runs/{into.name}"))
    return len(records)


def auto_table(folder: Path) -> str:
    """Where `auto` lands: experts kept, score and held-out loss of each condition."""
    return study_table(folder, sorted_last=("all", "auto"), kept=True)


def study_table(folder: Path, sorted_last: Sequence[str], kept: bool) -> str:
    """Conditions by tasks: a score for each seed, the mean of the held-out loss, and the share of experts `kept`."""
    found: dict[str, dict[str, list]] = {}
    for run, record in find_records(folder).items():
        if record["status"] != "done":
            continue
        task, _, condition = record["sweep"]["condition"].partition("/")
        plan = ExpertPlan.load(run)
        share = sum(map(len, plan.experts.values())) / (plan.num_experts * len(plan.experts))
        result = next(iter(record["evaluation"].values()))
        found.setdefault(condition, {}).setdefault(task, []).append(
            (share, result["accuracy"], record["training"]["test_loss"])
        )
    tasks = sorted({task for rows in found.values() for task in rows})
    width = 3 if kept else 2
    head = [f"{task}: kept | score, % | loss" if kept else f"{task}: score, % | loss" for task in tasks]
    lines = [f"| experts | {' | '.join(head)} |", "|---" + "|---:" * (width * len(tasks)) + "|"]
    order = [name for name in sorted(found) if name not in sorted_last]
    for condition in [*order, *(name for name in sorted_last if name in found)]:
        cells = []
        for task in tasks:
            runs = found[condition].get(task, [])
            if not runs:
                cells += ["–"] * width
                continue
            shares, scores, losses = zip(*runs, strict=True)
            each = ", ".join(f"{100 * score:.1f}" for score in scores)
            cells += [f"{shares[0]:.0%}"] * kept + [each, f"{sum(losses) / len(losses):.3f}"]
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("into", type=Path)
    args = parser.parse_args()
    print(f"{take_over(args.runs, args.into)} records in {args.into}")


if __name__ == "__main__":
    main()
