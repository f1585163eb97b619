"""Write docs/scale.md and its picture: memory, traffic and time of a step on 1 to 64 GPUs, by formula from configs.

python scripts/scale.py             # the page and the picture again: about two minutes
python scripts/scale.py --check     # fail if the page is not what would be written
python scripts/scale.py --measure   # first count the bytes that nano's processes send each other on this machine
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from gpu import records
from gpu import time_checks as gpu_checks
from marks import filled, table
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from traffic import measure

from hotlora.base.files import atomic_path, write_json, write_text
from hotlora.cost.cluster import (
    H100,
    H200,
    LAYOUTS,
    Work,
    expert_groups,
    imbalance,
    memory,
    seconds,
    smallest,
    traffic,
    work,
)
from hotlora.report.figures import INK, MUTED, SERIES, style

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.png"
BENCHMARKS = ROOT / "benchmarks"
TRAFFIC = BENCHMARKS / "traffic" / "nano.json"
MODELS = {
    "Mixtral-8x7B": "mixtral-8x7b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "gpt-oss-120b": "gpt-oss-120b",
    "DeepSeek-V3": "deepseek-v3",
}
MARK = "<!-- {}: made by scripts/scale.py -->"
GPUS = (1, 2, 4, 8, 16, 32, 64)
BATCH, LENGTH, RANK, FRACTION = 4, 2048, 32, 0.25
KERNELS = "torch"  # what an H100 and an H200 run where HOTLORA_KERNELS is not set
PLANS = {"all": None, "hot": FRACTION}
COLOURS = {"ddp": "#999999", "fsdp": SERIES["all"], "ep": SERIES["hot"], "ep-wide": "#e69f00", "sharded": "#009e73"}

Works = Mapping[str, Mapping[str, Work]]


def works() -> Works:
    """Model -> all or hot -> what there is to do. Experts that are published in few bits count as dense ones."""
    options: dict[str, Any] = {"batch_size": BATCH, "max_length": LENGTH, "r": RANK, "quantize": 0}
    return {
        name: {
            plan: work(BENCHMARKS / "configs" / folder, fraction=fraction, **options)
            for plan, fraction in PLANS.items()
        }
        for name, folder in MODELS.items()
    }


def page(text: str, found: Works) -> str:
    """docs/scale.md, with what is between its marks made anew."""
    made = {
        "settings": settings(),
        "models": models_table(found),
        "machines": machines_table(),
        "fits": smallest_table(found),
        "results": "\n\n".join(model_sections(found)),
        "wide": wide_table(found),
        "uneven": uneven_table(found),
        "memory": memory_checks(),
        "gpu": gpu_checks(),
        "time": time_checks(),
        "traffic": traffic_checks(),
    }
    for name, block in made.items():
        text = filled(text, MARK.format(name), block)
    return text


def settings() -> str:
    return (
        f"LoRA of rank {RANK} on all experts, and on the hot {FRACTION:.0%} of each layer; {BATCH} × {LENGTH:,} tokens "
        "a GPU, with gradient checkpointing. **Measured, on one H200 and one model:** a step gets "
        f"{H200.compute_shares[KERNELS]:.1%} of the peak rate with the kernels that it takes by itself "
        f"(`HOTLORA_KERNELS={KERNELS}`); by "
        f"`HOTLORA_KERNELS=triton` {H200.compute_shares['triton']:.1%}, so that computing takes "
        f"{H200.compute_shares[KERNELS] / H200.compute_shares['triton']:.0%} of the time shown. **Assumed:** "
        f"{H200.link_share:.0%} of the links, {H200.memory_share:.0%} of the memory; experts' loads with a CV of 1."
    )


def models_table(found: Works) -> str:
    rows = []
    for name, plans in found.items():
        one = plans["all"]
        trained = [f"{plans[plan].trainable / 1e6:,.0f}M" for plan in PLANS]
        state = [gb(16 * plans[plan].trainable) for plan in PLANS]
        experts = f"{one.num_experts}, {one.top_k} a token"
        weights = [f"{one.weights / 2e9:.1f}B", gb(one.weights), f"{one.experts / one.weights:.0%}"]
        rows.append([name, str(one.moe_layers), experts, *weights, *trained, *state])
    heads = ["model", "MoE layers", "experts", "parameters", "weights, GB", "of them experts"]
    heads += ["trained, all", "hot", "adapter's state, GB: all", "hot"]
    return table(heads, rows, left=3)


def machines_table() -> str:
    rows = []
    for machine in (H100, H200):
        speeds = [machine.flops / 1e12, machine.bandwidth / 1e12, machine.link / 1e9, machine.network / 1e9]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in machine.compute_shares.items())
        origin = "measured" if machine.is_measured else "assumed"
        rows.append([machine.name, f"{shares}: {origin}", gb(machine.memory), *(f"{value:,.5g}" for value in speeds)])
    heads = ["GPU", "share of the rate that a step gets", "memory, GB", "bfloat16, TFLOP/s", "own memory, TB/s"]
    return table([*heads, "to GPUs of its node, GB/s", "to other nodes, GB/s"], rows, left=2)


def smallest_table(found: Works) -> str:
    """The fewest GPUs on which a step fits."""
    rows = []
    for name, plans in found.items():
        for plan, one in plans.items():
            row = [name, plan]
            for machine in (H100, H200):
                fewest = [smallest(one, machine, layout, GPUS) for layout in LAYOUTS]
                row += ["–" if n is None else str(n) for n in fewest]
            rows.append(row)
    heads = [f"{machine.name[:4]}: {layout}" if i == 0 else layout for machine in (H100, H200)
             for i, layout in enumerate(LAYOUTS)]  # fmt: skip
    return table(["model", "experts adapted", *heads], rows, left=2)


def model_sections(found: Works) -> list[str]:
    parts = []
    for name, plans in found.items():
        pairs = [(layout, plan) for layout in ("ddp", "fsdp", "ep") for plan in PLANS]
        heads = ["GPUs", *(f"{layout}, {plan}" for layout, plan in pairs)]
        size = [[str(n), *(fitting(plans[p], n, layout) for layout, p in pairs)] for n in GPUS]
        time = [[str(n), *(timed(plans[p], n, layout) for layout, p in pairs)] for n in GPUS]
        parts += [f"### {name}", "Memory of the fullest GPU, GB; **bold** where an H200 holds it:", table(heads, size)]
        parts += ["Seconds of a step on H200s, where they hold it:", table(heads, time)]
        parts += [f"What a GPU sends in a step, GB, and the seconds of a step's parts, on {GPUS[-1]} GPUs:"]
        parts += [parts_table(plans)]
    return parts


def parts_table(plans: Mapping[str, Work]) -> str:
    heads = ["", "weights", "tokens", "gradients", "compute, s", "weights, s", "tokens, s", "gradients, s", "AdamW, s"]
    rows = []
    for layout in LAYOUTS:
        for plan, one in plans.items():
            sent, times = traffic(one, GPUS[-1], layout), seconds(one, H200, GPUS[-1], layout, kernels=KERNELS)
            row = [f"{layout}, {plan}", *(number(sent[kind] / 1e9) for kind in ("gather", "exchange", "reduce"))]
            kinds = ("compute", "gather", "exchange", "reduce", "optimizer")
            rows.append([*row, *(number(times[kind]) for kind in kinds)])
    return table(heads, rows)


def wide_table(found: Works) -> str:
    rows = []
    for name, plans in found.items():
        one, row = plans["hot"], [name]
        for layout in ("fsdp", "ep", "ep-wide"):
            times = seconds(one, H200, GPUS[-1], layout, kernels=KERNELS)
            parts, _ = expert_groups(one.num_experts, GPUS[-1], layout)
            row += [str(parts) if layout != "fsdp" else "", number(times["step"])]
        rows.append([row[0], row[2], row[3], row[4], row[5], row[6]])
    return table(["model", "fsdp, s", "ep: GPUs", "s", "ep-wide: GPUs", "s"], rows)


def uneven_table(found: Works) -> str:
    rows = []
    for name, plans in found.items():
        one = plans["hot"]
        for layout in ("ep", "ep-wide"):
            parts, _ = expert_groups(one.num_experts, GPUS[-1], layout)
            factors = [f"{imbalance(one.num_experts, parts, cv):.2f}" for cv in (0.25, 0.5, 1.0)]
            times = [number(seconds(one, H200, GPUS[-1], layout, cv, KERNELS)["step"]) for cv in (0.25, 0.5, 1.0)]
            rows.append([name, layout, *(f"{a} → {b} s" for a, b in zip(factors, times, strict=True))])
    return table(["model", "layout", "CV 0.25", "CV 0.5", "CV 1"], rows, left=2)


def memory_checks() -> str:
    """Every measured peak that has an estimate beside it."""
    rows = []
    for file, contender in contenders("bench"):
        if contender.get("estimated_memory_bytes"):
            formula, peak = contender["estimated_memory_bytes"], contender["peak_memory_bytes"]
            rows.append([file, contender["name"], f"{formula / 1e9:.3f}", f"{peak / 1e9:.3f}", percent(formula / peak)])
    for machine, record in records():
        for row in record["contenders"]:
            if formula := row.get("estimated_memory_bytes"):
                peak = row["peak_memory_gb"]
                cells = [f"{formula / 1e9:.1f}", f"{peak:.1f}", percent(formula / 1e9 / peak)]
                rows.append([f"gpu/{machine.name}", row["name"], *cells])
    return table(["measured", "", "formula, GB", "peak, GB", "formula against peak"], rows, left=2)


def time_checks() -> str:
    """Seconds by FLOPs alone, at the rate that one file's floor got, for all that its machine ran after it."""
    rows = []
    for base, prefix in (("cpu-nano", "cpu-nano"), ("cpu-olmoe-layers", "cpu-olmoe-layers")):
        floor = next(row for file, row in contenders("bench") if file == base and row["name"] == "floor")
        rate = floor["flops"] / floor["seconds"]["step"]["median"]
        groups: dict[str, list[tuple[str, float]]] = {}
        for kind in ("bench", "growth"):
            for file, row in contenders(kind):
                if file.startswith(prefix) and row["kind"] in ("floor", "hot", "all") and row is not floor:
                    ratio = row["flops"] / rate / row["seconds"]["step"]["median"]
                    groups.setdefault(file, []).append((row["name"], ratio))
        for file, ratios in groups.items():
            errors = sorted((ratio - 1 for _, ratio in ratios), key=abs)
            middle = median(ratio - 1 for _, ratio in ratios)
            rows.append([file, str(len(ratios)), percent(1 + middle), percent(1 + errors[-1])])
    return table(["measured", "runs", "formula against measured, median", "the furthest off"], rows)


def contenders(kind: str) -> list[tuple[str, dict]]:
    """(file's name, row) of all that ran to its end."""
    found = []
    for file in sorted(BENCHMARKS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("kind") == kind:
            for run in result.get("runs", [result]):
                found += [(file.stem, row) for row in run["contenders"] if row["status"] == "done"]
    return found


def traffic_checks() -> str:
    """Bytes by formula against bytes counted in real processes."""
    if not TRAFFIC.is_file():
        return "Not counted yet."
    result = json.loads(TRAFFIC.read_text(encoding="utf-8"))
    rows = []
    for run in result["runs"]:
        one = Work(**run["work"])
        wanted = traffic(one, run["processes"], run["layout"])
        for kind in ("gather", "exchange", "reduce"):
            counted = run["sent"].get(kind, 0.0)
            if counted or wanted[kind]:
                again = "yes" if one.passes == 3 else "no"
                cells = [run["layout"], str(run["processes"]), again, kind, f"{wanted[kind] / 1e6:.3f}"]
                rows.append([*cells, f"{counted / 1e6:.3f}", percent(wanted[kind] / counted) if counted else "–"])
    heads = ["layout", "processes", "checkpointing", "what", "formula, MB", "counted, MB", "formula against counted"]
    return table(heads, rows, left=4)


def picture(found: Works) -> Figure:
    """Memory above, time below, a column a model."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, len(found), sharex=True)
    for column, (name, plans) in enumerate(found.items()):
        for row, value in enumerate((total_memory, step_time)):
            own = axes[row][column]
            for layout in LAYOUTS:
                for plan, dashes in (("all", "--"), ("hot", "-")):
                    points = [value(plans[plan], n, layout) for n in GPUS]
                    own.plot(GPUS, points, dashes, color=COLOURS[layout], linewidth=1.8, marker="o", markersize=3)
            own.set_xscale("log", base=2)
            own.set_yscale("log")
            own.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            own.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            own.yaxis.set_minor_locator(NullLocator())
            own.set_xticks(GPUS, [str(n) for n in GPUS])
            style(own)
        for machine in (H100, H200):
            axes[0][column].axhline(machine.memory / 1e9, color=MUTED, linewidth=0.9)
            axes[0][column].annotate(machine.name[:4], (1, machine.memory / 1e9), fontsize=8, color=MUTED, va="bottom")
        axes[0][column].set_title(name, fontsize=11, color=INK)
        axes[1][column].set_xlabel("GPUs", color=INK)
    axes[0][0].set_ylabel("GB on the fullest GPU", color=INK)
    axes[1][0].set_ylabel("seconds of a step, H200", color=INK)
    lines = [axes[0][0].plot([], [], color=COLOURS[layout], label=layout)[0] for layout in LAYOUTS]
    lines += [axes[0][0].plot([], [], dashes, color=INK, label=label)[0]
              for label, dashes in (("LoRA on all experts", "--"), ("on hot 25%", "-"))]  # fmt: skip
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


def total_memory(one: Work, gpus: int, layout: str) -> float:
    return memory(one, gpus, layout)["total"] / 1e9


def step_time(one: Work, gpus: int, layout: str) -> float:
    """Nothing where no GPU of these holds it."""
    fits = H200.holds(memory(one, gpus, layout)["total"])
    return seconds(one, H200, gpus, layout, kernels=KERNELS)["step"] if fits else float("nan")


def fitting(one: Work, gpus: int, layout: str) -> str:
    size = memory(one, gpus, layout)["total"]
    return f"**{gb(size)}**" if H200.holds(size) else gb(size)


def timed(one: Work, gpus: int, layout: str) -> str:
    time = step_time(one, gpus, layout)
    return "–" if time != time else number(time)


def gb(size: float) -> str:
    return f"{size / 1e9:,.0f}" if size >= 1e10 else f"{size / 1e9:.1f}"


def number(value: float) -> str:
    return "0" if value < 0.0005 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    if args.measure:
        write_json(TRAFFIC, measure())
    found = works()
    old = PAGE.read_text(encoding="utf-8")
    text = page(old, found)
    if args.check:
        if text != old:
            sys.exit("docs/scale.md is not up to date: run `python scripts/scale.py`")
        return
    write_text(PAGE, text)
    with atomic_path(PICTURE) as file:
        picture(found).savefig(file, dpi=120)
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
