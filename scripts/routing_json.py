"""Routing that others published, rewritten as JSON files of one form, which scripts/routers.py reads.

git clone https://github.com/pjordanandrsn/experts4bit-qlora     # the study's numbers are of 6abb0ad
git clone https://github.com/Dorijan10/glm-expert-pruning        # and of 6cb4469
python scripts/routing_json.py experts4bit-qlora routing/olmoe_alpaca
python scripts/routing_json.py glm-expert-pruning routing/glm_5_2

The form, one file a data set, .json or .json.gz: `model`, `dataset`, `num_experts_per_tok` or `num_tokens`, `layers`
(decoder indices), `counts` and `mass` [L][E]; where there are any, `examples`, each a list by layer of pairs
(expert, count), which may stand for `counts`, and `reap` [L][E], the sum of gate times output norm.
"""

import argparse
import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hotlora.base.files import atomic_path

JOBS = Path("runs/results/postaudit/postaudit_jobs")
OLMOE = {"model": "allenai/OLMoE-1B-7B-0924", "dataset": "alpaca", "num_experts": 64, "num_experts_per_tok": 8}
_JOB = re.compile(r"(null|sb)1024_(adapted_)?olmoe_(\w+)_resident")
_SHARD = re.compile(r"sal_(\w+)_calib_\d+\.json")


def olmoe_alpaca(clone: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """OLMoE on 1,024 rows of Alpaca in each precision, and after LoRA training."""
    for folder in sorted((clone / JOBS).iterdir()):
        if (match := _JOB.fullmatch(folder.name)) and (file := folder / "routed_sets.jsonl.gz").is_file():
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line)["routed"] for line in lines]
            examples = [[row[str(layer)] for layer in range(len(row))] for row in rows]
            yield match[3] + ("_after_lora" if match[2] else ""), OLMOE | {"examples": examples}


def glm(clone: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """GLM-5.2 on ten kinds of text, each in eight consecutive parts, which stand for examples."""
    shards = defaultdict(list)
    for file in sorted((clone / "saliency").iterdir()):
        if match := _SHARD.fullmatch(file.name):
            shards[match[1]].append(json.loads(file.read_text(encoding="utf-8")))
    for name, parts in shards.items():
        layers = sorted(map(int, parts[0]["layers"]))
        tables = {key: [[part["layers"][str(layer)][key] for layer in layers] for part in parts] for key in _KEYS}
        sums = {
            ours: [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*tables[key], strict=True)]
            for key, ours in _KEYS.items()
        }
        examples = [[list(enumerate(row)) for row in part] for part in tables["cnt"]]
        head = {"model": "GLM-5.2", "dataset": name, "num_tokens": sum(part["tokens"] for part in parts)}
        yield name, head | {"layers": layers} | sums | {"examples": examples}


_KEYS = {"cnt": "counts", "gate": "mass", "sal": "reap"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    readers = {JOBS: olmoe_alpaca, Path("saliency"): glm}
    read = next((read for there, read in readers.items() if (args.clone / there).is_dir()), None)
    if read is None:
        sys.exit(f"{args.clone} has neither {JOBS} nor saliency: give a clone of one of the two repositories")
    for name, found in read(args.clone):
        with atomic_path(args.folder / f"{name}.json.gz") as path, gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump(found, file)
        print(f"wrote {args.folder / name}.json.gz")


if __name__ == "__main__":
    main()
