"""The table of what hot experts cost on a GPU beside the floor, PEFT and Unsloth, in at most four minutes.

    python benchmarks/gpu_table.py --output benchmarks/gpu-table.json

It first checks on the card that the fused layer equals the unfused one, then times contenders, each in a process of its
own, one after the other, the most wanted first: a contender is begun only while there is time, and what is measured is
written after each. Settings are those of `hotlora bench`; Unsloth takes part where it is installed. On a CPU, with
`--model nano --tokens 256`, it only shows that everything runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Name -> (kind, fraction, HOTLORA_KERNELS).
CONTENDERS: dict[str, tuple[str, float | None, str]] = {
    "floor": ("floor", None, ""),
    "hot 25%": ("hot", 0.25, "fused"),
    "unsloth": ("unsloth", None, ""),
    "peft": ("peft", None, ""),
    "all": ("all", None, "fused"),
    "hot 25%, unfused": ("hot", 0.25, ""),
    "hot 25%, torch": ("hot", 0.25, "torch"),
}
# (what, of which contenders, the target, whether a larger value is better)
TARGETS = [
    ("hot 25% over the floor, step time", ("hot 25%", "floor", "step"), 0.65, False),
    ("tokens/s over Unsloth, all experts", ("unsloth", "hot 25%", "step"), 1.6, True),
    ("tokens/s over PEFT target_parameters", ("peft", "hot 25%", "step"), 1.85, True),
    ("share of the card's measured rate", ("hot 25%", None, "share_of_rate"), 0.40, True),
    ("peak memory over PEFT", ("hot 25%", "peft", "peak_memory_bytes"), 0.45, False),
    ("all experts over hot 25%, step time", ("all", "hot 25%", "step"), 1.08, False),
]


def one(name: str, settings: dict[str, Any], common: dict[str, Any] | None) -> dict[str, Any]:
    """In a process of its own: a contender's steps; with `common` None also what all share."""
    from hotlora.bench.bench import _resolved
    from hotlora.bench.contenders import BenchConfig, Contender
    from hotlora.bench.worker import Worker

    class Steady(Worker):
        """Keeps its weights, since no other contender needs the memory meanwhile."""

        def _sleep(self) -> None:
            pass

    kind, fraction, _ = CONTENDERS[name]
    steps, contender = settings.pop("steps"), Contender(kind, fraction)
    config = _resolved(BenchConfig(**settings))
    row: dict[str, Any] = {"name": name, "kind": kind, "fraction": fraction, "status": "done"}
    if contender.missing:
        return {"row": row | {"status": "missing", "reason": contender.missing}, "common": common}
    worker = Steady(config, contender)
    shared = common or worker.calibrate()
    row |= worker.prepare(shared["spreads"], shared["plans"].get(contender.name))
    times = [worker.step() for _ in range(steps + 1)][1:]
    row["seconds"] = {
        part: {"median": statistics.median(t[part] for t in times), "all": [t[part] for t in times]}
        for part in times[0]
    }
    row["tokens_per_second"] = config.tokens / row["seconds"]["step"]["median"]
    return {"row": row, "common": shared}


def check() -> str:
    """The fused layer against the unfused one, on this device."""
    import torch

    from benchmarks.time_kernels import Layer, Sizes, difference
    from hotlora.hf.experts_view import ExpertsView
    from hotlora.layer.kernels import fused

    if not torch.cuda.is_available():
        return "no GPU: not checked"
    worst = 0.0
    for dtype, sizes in (("bfloat16", {}), ("float32", {"hidden": 512, "expert_width": 256})):
        layer = Layer(Sizes(tokens=1024, experts=64, hot=16, dtype=dtype, **sizes), "cuda")
        inputs = (layer.hidden_TD, layer.index_TK, layer.weights_TK)
        view = ExpertsView(layer.experts)
        assert fused.covers(view, layer.hidden_TD, layer.weights_TK, [layer.factors])
        output = fused.FusedExperts.apply(view, layer.factors, (0, 0), *inputs, *view.tensors(), *layer.tensors)
        leaves = [layer.hidden_TD, layer.weights_TK, *layer.tensors]
        ours = [output, *torch.autograd.grad(output, leaves, output.detach())]
        worst = max(worst, difference(ours, layer.step()))
        if not worst < (0.03 if dtype == "bfloat16" else 1e-2):
            sys.exit(f"the fused layer differs from the unfused one in {dtype}: {worst:.3g}, relative")
    return f"the fused layer equals the unfused one to {worst:.2g}, relative"


def run(name: str, settings: dict[str, Any], common: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    environment = os.environ | {"HOTLORA_KERNELS": CONTENDERS[name][2]}
    given = json.dumps({"settings": settings, "common": common})
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, env=environment, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        return {"row": {"name": name, "status": "failed", "reason": "out of time"}, "common": common}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"row": {"name": name, "status": "failed", "reason": reason}, "common": common}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def value_of(rows: dict[str, dict[str, Any]], name: str | None, what: str) -> float | None:
    if name is None:
        return 1.0
    row = rows.get(name, {})
    found = row.get("seconds", {}).get("step", {}).get("median") if what == "step" else row.get(what)
    return None if found is None else float(found)


def add_shares(rows: dict[str, dict[str, Any]], settings: dict[str, Any], common: dict[str, Any]) -> None:
    """FLOPs by `hotlora bench`'s formulas, over the matrix rate measured here."""
    from hotlora.bench.bench import _add_arithmetic, _resolved, _tensor
    from hotlora.bench.contenders import BenchConfig
    from hotlora.cost.estimate import meta_model, sized_config
    from hotlora.routing.profile import RoutingProfile

    config = _resolved(BenchConfig(**{k: v for k, v in settings.items() if k != "steps"}))
    kept = {name: tuple(value) if name == "layers" else _tensor(value) for name, value in common["profile"].items()}
    profile = RoutingProfile(**kept)
    done = {name: row for name, row in rows.items() if row["status"] == "done"}
    _add_arithmetic(done, config, meta_model(sized_config(config.model, config.layers)), profile, common["rate"])


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| contender | step ms | x floor | tokens/s | peak GB | share of rate |", "|---|---:|---:|---:|---:|---:|"]
    floor = value_of(rows, "floor", "step")
    for name, row in rows.items():
        step = value_of(rows, name, "step")
        if step is None:
            lines.append(f"| {name} | {row['status']}: {row.get('reason', '')} | | | | |")
            continue
        ratio = "" if floor is None else f"{step / floor:.2f}"
        share = f"{row['share_of_rate']:.0%}" if "share_of_rate" in row else ""
        memory = f"{row['peak_memory_bytes'] / 1e9:.1f}"
        lines.append(f"| {name} | {step * 1e3:.0f} | {ratio} | {row['tokens_per_second']:,.0f} | {memory} | {share} |")
    lines += ["", "| | measured | asked |", "|---|---:|---:|"]
    for what, (above, below, key), target, is_more_better in TARGETS:
        first, second = value_of(rows, above, key), value_of(rows, below, key)
        measured = "–" if first is None or second is None else f"{first / second:.2f}"
        lines.append(f"| {what} | {measured} | {'≥' if is_more_better else '≤'} {target} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "benchmarks" / "configs" / "olmoe-1b-7b"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=240, help="no contender is begun after, or goes on")
    parser.add_argument("--output", type=Path, help="the result as JSON, written after each contender")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        asked = json.load(sys.stdin)
        print(json.dumps(one(given.one, asked["settings"], asked["common"])))
        return
    end = time.monotonic() + given.seconds
    started = datetime.now(UTC).isoformat(timespec="seconds")
    checked = check()
    print(checked, flush=True)
    settings: dict[str, Any] = {"model": given.model, "tokens": given.tokens, "r": given.r, "steps": given.steps}
    settings |= {"contenders": sorted({kind for kind, _, _ in CONTENDERS.values()}), "fractions": [0.25]}
    rows: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] | None = None
    for name in CONTENDERS:
        if (left := end - time.monotonic()) <= 0:
            rows[name] = {"name": name, "status": "missing", "reason": "out of time"}
            continue
        found = run(name, dict(settings), common, left)
        rows[name], common = found["row"], found["common"]
        print(name, rows[name]["status"], rows[name].get("reason", ""), flush=True)
        if given.output:
            write(given.output, started, settings, rows, common, checked)
    if common is not None:
        add_shares(rows, settings, common)
        if given.output:
            write(given.output, started, settings, rows, common, checked)
    print(table(rows))


def write(output: Path, started: str, settings: Any, rows: Any, common: Any, checked: str) -> None:
    from hotlora.base.files import write_json
    from hotlora.base.records import environment

    output.parent.mkdir(parents=True, exist_ok=True)
    rate = None if common is None else common["rate"]
    record = {
        "version": 1, "kind": "gpu-table", "started": started, "command": " ".join(["python", *sys.argv]),
        "settings": settings, "matrix_rate": rate, "checked": checked, "contenders": list(rows.values()),
        "environment": environment(),
    }  # fmt: skip
    write_json(output, record)


if __name__ == "__main__":
    main()
