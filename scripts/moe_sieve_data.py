"""What MoE-Sieve's author published, read from a clone of the repository, or from the same numbers as plain JSON.

A clone (https://github.com/amanzoni1/MoE_Sieve) has outputs/MODEL/TASK/*_summary.json and outputs/telemetry/**/*.pt.
The plain form has MODEL/DATASET.json (counts and mass, [layers][experts]) and seeds.json.
"""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotlora.base.errors import HotLoraError
from hotlora.base.files import read_json
from hotlora.report.published import MODELS
from hotlora.routing.profile import RoutingProfile

SOURCE = "https://github.com/amanzoni1/MoE_Sieve"
COMMIT = "8a58e7a2a3a1e3afb93e84edda4c6389f3797f44"  # that the plain form was made of
KEYS = {"olmoe": "OLMoE-1B-7B", "qwen": "Qwen1.5-MoE-A2.7B", "deepseek": "DeepSeek-MoE-16B"}
"""the repository's names -> the paper's"""
_TASKS = {"alpaca": "codealpaca", "wikitext": "wikitext2"}  # the repository's names -> those of our tasks
_FIELDS = ("model", "dataset", "layers", "counts", "mass", "num_experts_per_tok")
_RUN = re.compile(r"(?P<model>[a-z]+)_(?P<task>[a-z0-9]+)_s(?P<seed>\d+)_(?P<condition>\w+)_summary\.json")

Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]
"""model (olmoe, qwen) -> task -> condition -> seed -> accuracy in points"""


@dataclass(frozen=True)
class Data:
    """profiles: the paper's name of a model -> data set, spelled as our task -> counts and mass."""

    commit: str
    profiles: Mapping[str, Mapping[str, RoutingProfile]]
    scores: Scores


def read(folder: Path) -> Data:
    """Either form. Ends the script where the folder has neither profiles nor scores."""
    try:
        data = _clone(folder) if (folder / "outputs").is_dir() else _plain(folder)
    except HotLoraError as error:
        sys.exit(str(error))
    if not data.profiles and not data.scores:
        sys.exit(f"{folder} has neither outputs/ (a clone of {SOURCE}) nor MODEL/DATASET.json and seeds.json")
    return data


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


def plain_scores(file: Path) -> Scores:
    """seeds.json: shares of right answers; Spider's is that of the official evaluation ("execution")."""
    return {
        model: {
            task: {
                condition: {int(seed): 100 * run.get("execution", run.get("accuracy")) for seed, run in runs.items()}
                for condition, runs in conditions.items()
            }
            for task, conditions in tasks.items()
        }
        for model, tasks in read_json(file).items()
    }


def _clone(folder: Path) -> Data:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    profiles: dict[str, dict[str, RoutingProfile]] = {}
    for file in sorted((folder / "outputs" / "telemetry").glob("*/*/*.pt")):
        task, model = file.parent.name, KEYS[file.parent.parent.name]
        layers = torch.load(file, weights_only=True)
        top_k = layers.pop("meta")["k"]
        rows = [[layers[layer][what] for layer in sorted(layers)] for what in ("counts", "mass")]
        counts, mass = (torch.stack([torch.as_tensor(row) for row in some]) for some in rows)
        made = _profile(file, model, sorted(layers), counts, mass, top_k)
        profiles.setdefault(model, {})[_TASKS.get(task, task)] = made
    return Data(found.stdout.strip() or "unknown", profiles, read_runs(folder))


def _plain(folder: Path) -> Data:
    profiles: dict[str, dict[str, RoutingProfile]] = {}
    for file in sorted(folder.glob("*/*.json")):
        raw = read_json(file)
        if lacking := [key for key in _FIELDS if key not in raw]:
            sys.exit(f"{file} has no {lacking[0]!r}: it must be one data set's profile, with {', '.join(_FIELDS)}")
        name, task = str(raw["model"]).rpartition("/")[2], str(raw["dataset"])
        model = next((known for known in MODELS if name.lower().startswith(known.lower())), name)
        counts, mass = torch.tensor(raw["counts"]), torch.tensor(raw["mass"], dtype=torch.float64)
        made = _profile(file, model, raw["layers"], counts, mass, raw["num_experts_per_tok"])
        profiles.setdefault(model, {})[_TASKS.get(task, task)] = made
    seeds = folder / "seeds.json"
    return Data(COMMIT, profiles, plain_scores(seeds) if seeds.is_file() else {})


def _profile(file: Path, model: str, layers: list[int], counts: Any, mass: Any, top_k: int) -> RoutingProfile:
    sums = set(counts.sum(dim=1).tolist())
    if len(sums) != 1 or min(sums) % top_k:
        sys.exit(f"{file}: its layers have {sorted(sums)} assignments, which must be equal and tokens times {top_k}")
    source = {"model": model, "data": file.parent.name}
    return RoutingProfile(tuple(layers), counts, mass, min(sums) // top_k, top_k, source)
