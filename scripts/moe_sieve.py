"""MoE-Sieve's results on two real models, computed again from the runs that its author published.

git clone https://github.com/amanzoni1/MoE_Sieve
python scripts/moe_sieve.py MoE_Sieve      # reads its runs and writes results/moe_sieve.json

Means, intervals and tests are ours (hotlora/evaluate/stats.py); the runs are the author's. `python scripts/docs.py`
makes the tables in README.md and docs/papers.md of the file.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marks import table

from hotlora.base.files import read_json, write_json
from hotlora.evaluate.stats import mean_sd, paired_test

RESULT = Path(__file__).resolve().parent.parent / "results" / "moe_sieve.json"
SOURCE = "https://github.com/amanzoni1/MoE_Sieve"
MODELS = {"olmoe": "OLMoE-1B-7B", "qwen": "Qwen1.5-MoE-A2.7B"}
TASKS = {"gsm8k": "GSM8K", "hellaswag": "HellaSwag", "spider": "Spider"}
QUARTER = {"olmoe": "hotk16", "qwen": "hotk15"}
ALL, MARGIN = "full_lora", 2.0  # points; MoE-Sieve's own margin
# Trained LoRA parameters of OLMoE-1B-7B at rank 32, by `hotlora params` (tests/test_moe_sieve.py counts them).
ROWS = {
    "full_lora": ("all 64 experts", 311_459_840),
    "hotk16": ("**hot quarter** (16)", 84_967_424),
    "randk16": ("random quarter", 84_967_424),
    "hotk8": ("hot eighth (8)", 47_218_688),
    "randk8": ("random eighth", 47_218_688),
}
_RUN = re.compile(r"(?P<model>[a-z]+)_(?P<task>[a-z0-9]+)_s(?P<seed>\d+)_(?P<condition>\w+)_summary\.json")

Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]
"""model -> task -> condition -> seed -> accuracy in points"""


def read_runs(clone: Path) -> Scores:
    """Every run in a clone of the author's repository. Spider's score is that of the official evaluation."""
    scores: dict[str, Any] = {}
    for file in sorted((clone / "outputs").rglob("*_summary.json")):
        if not (match := _RUN.fullmatch(file.name)):
            sys.exit(f"{file} is no run's summary: its name is not MODEL_TASK_sSEED_CONDITION_summary.json")
        share = read_json(file)["acc"]
        if match["task"] == "spider":
            official = Path(str(file).replace("_summary.json", "_ts_inputs")) / "official_eval_output.txt"
            share = float(re.findall(r"^execution .* ([\d.]+)\s*$", official.read_text(encoding="utf-8"), re.M)[0])
        of_task = scores.setdefault(match["model"], {}).setdefault(match["task"], {})
        of_task.setdefault(match["condition"], {})[int(match["seed"])] = 100 * share
    return scores


def results(scores: Scores) -> list[dict[str, Any]]:
    """One dict a model, task and condition with several seeds: mean and deviation, and the difference to all experts,
    paired by seed, with its 95% interval and the p of equivalence within MARGIN."""
    rows = []
    for model, task, condition in sorted((m, t, c) for m in scores for t in scores[m] for c in scores[m][t]):
        runs, every = scores[model][task][condition], scores[model][task][ALL]
        if len(runs) == 1:
            continue  # one run has no spread
        found = mean_sd(list(runs.values()))
        row: dict[str, Any] = {"model": model, "task": task, "condition": condition, "seeds": sorted(runs)}
        row |= {"mean": round(found.mean, 4), "sd": round(found.sd or 0.0, 4)}
        if condition != ALL:
            seeds = sorted(runs.keys() & every.keys())
            test = paired_test([runs[s] for s in seeds], [every[s] for s in seeds], bounds=(MARGIN,))
            assert test.interval and test.p is not None
            row["against_all"] = {
                "mean": round(test.mean, 4), "low": round(test.interval.low, 4), "high": round(test.interval.high, 4),
                "p": test.p, "p_equivalent": test.tost[MARGIN],
            }  # fmt: skip
        rows.append(row)
    return rows


def readme_table() -> str:
    """OLMoE-1B-7B on GSM8K."""
    found = {row["condition"]: row for row in _rows() if (row["model"], row["task"]) == ("olmoe", "gsm8k")}
    heads = ["OLMoE-1B-7B on GSM8K", "accuracy, %", "against all experts, points", "trained parameters"]
    lines = []
    for condition, (label, trained) in ROWS.items():
        row = found[condition]
        lines.append([label, f"{row['mean']:.1f} ± {row['sd']:.1f}", _against(row), f"{trained / 1e6:.1f}M"])
    pairs = [row for row in _rows() if row["condition"] == QUARTER[row["model"]]]
    passed = sum(row["against_all"]["p_equivalent"] < 0.05 for row in pairs)
    told = (
        f"*Mean ± standard deviation over {len(found[ALL]['seeds'])} seeds; in brackets the 95% interval, paired by "
        f"seed. Of the paper's {len(pairs)} pairs of a model and a task the hot quarter is equivalent to all experts "
        f"within {MARGIN:g} points in {passed}; of the others it cannot be told. Random experts were tried on this "
        "pair alone.*"
    )
    return f"{table(heads, lines)}\n\n{told}"


def papers_table() -> str:
    """Both models on the three tasks, the hot quarter against all."""
    found = {(row["model"], row["task"], row["condition"]): row for row in _rows()}
    heads = ["model", "task", "all experts, %", "hot quarter, %", "difference, points", "within 2 points"]
    lines = []
    for (model, task, condition), every in found.items():
        if condition != ALL:
            continue
        quarter = found[model, task, QUARTER[model]]
        scores = [f"{row['mean']:.1f} ± {row['sd']:.1f}" for row in (every, quarter)]
        p = quarter["against_all"]["p_equivalent"]
        told = f"{'yes' if p < 0.05 else 'cannot tell'} (p {'<0.001' if p < 0.001 else f'= {p:.3f}'})"
        lines.append([MODELS[model], TASKS[task], *scores, _against(quarter), told])
    return table(heads, lines, 2)


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["results"]
    return rows


def _against(row: Mapping[str, Any]) -> str:
    if "against_all" not in row:
        return "–"
    mean, low, high = (f"{row['against_all'][key]:+.1f}".replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} [{low} to {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    clone = parser.parse_args().clone
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    rows = results(read_runs(clone))
    write_json(RESULT, {"version": 1, "source": SOURCE, "commit": commit, "margin": MARGIN, "results": rows})
    print(f"{len(rows)} conditions in {RESULT}")


if __name__ == "__main__":
    main()
