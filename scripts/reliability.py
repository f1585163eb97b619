"""Kill runs, fill disks, break files and garble commands, many times; keep the counts for docs/reliability.md.

python scripts/reliability.py kills      # SIGKILL, 20 times in each of three runs: about 3 minutes
python scripts/reliability.py ended      # SIGTERM, a second run, full disks: about 2 minutes
python scripts/reliability.py ranks      # SIGKILL of one process of several, or of all, 21 times: about a minute
python scripts/reliability.py files      # every file format, 1,000 inputs each: about 15 minutes
python scripts/reliability.py commands   # every command, 300 inputs each: about 10 minutes
python scripts/reliability.py page       # docs/reliability.md from what these have kept

Each writes results/reliability/NAME.json, and fails where something did not hold. The tests do less of the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from marks import filled

from hotlora.base.files import read_json, write_json, write_text
from hotlora.base.records import environment

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
RESULTS = ROOT / "results" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- made by scripts/reliability.py from results/reliability -->"
KINDS = {
    "step": "milliseconds after a random step",
    "save": "in the middle of a save",
    "time": "after a random time, loading and profiling included",
}
WAYS = {("ddp", 2): "2 processes, DDP", ("fsdp", 2): "2 processes, FSDP2", ("ddp", 4): "4 processes, DDP"}


def script(name: str, *words: object) -> dict[str, Any]:
    """The JSON that one of the scripts beside the tests prints."""
    paths = {"PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TESTS / name), folder, *map(str, words)]
        done = subprocess.run(command, env={**os.environ, **paths}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def kills(count: int, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Whole runs under SIGKILL, against calm ones."""
    kinds, same = Counter[str](), True
    for seed in seeds:
        report = script("killed_run.py", seed, count)
        same &= all(report["same"].values()) and not report["leftovers"] and report["code"] == 0
        kinds.update(kill["kind"] for kill in report["kills"] if kill["code"] == -9)
        print(f"seed {seed}: {len(report['kills'])} kills, {report['same']}")
    how = "loss of every step, adapter, plan and record equal to the calm run's" if same else "NOT THE SAME"
    rows = [[f"SIGKILL {KINDS[kind]}", kinds[kind], how] for kind in KINDS]
    return {"seeds": list(seeds), "kills_each": count, "kinds": dict(kinds), "holds": same, "rows": rows}


def ranks(count: int) -> dict[str, Any]:
    """Runs of several processes, of which one or all get a SIGKILL, against calm ones."""
    holds, runs, rows = True, [], []
    for (scenario, many), name in WAYS.items():
        report = script("killed_ranks.py", scenario, many, 0, count)
        done = report["kills"]
        exact = not any(report["codes"]) and all(report["same"].values())
        # DDP sums in another order after a first step, and then the rounding of three or more is another.
        same = exact or (many > 2 and not any(report["codes"]) and report["close"] and report["same"]["plan"])
        holds &= same and len(done) == count and not report["leftovers"]
        how = "loss of every step, adapter, plan and record equal to the calm run's"
        if same and not exact:
            how = (
                f"the calm run's plan; its losses to {report['furthest']['loss']:.0e}, relative, its adapter's weights "
            )
            how += f"to {report['furthest']['weight']:.0e}"
        for who in ("one", "all"):
            some = [kill for kill in done if (len(kill["victims"]) == many) == (who == "all")]
            # A group that a launcher has not brought together yet waits for who is missing.
            left = [code for kill in some for rank, code in enumerate(kill["codes"]) if rank not in kill["victims"]]
            itself = f"{sum(code == 1 for code in left)} of {len(left)} left ended by themselves; " if left else ""
            rows.append([f"SIGKILL of {who}: {name}", len(some), itself + (how if same else "NOT THE SAME")])
        runs.append({"scenario": scenario, "processes": many, **report})
        print(f"{name}: {len(done)} kills, {report.get('same')}", file=sys.stderr)
    return {"kills_each": count, "holds": holds, "runs": runs, "rows": rows}


def ended(count: int) -> dict[str, Any]:
    """SIGTERM, Ctrl-C, a second run in the folder, and full disks."""
    report = script("ended_runs.py", count)
    told, both = report["sigterm"], report["two"]
    term = (told["code"], told["again"], told["same"]) == (143, 0, True) and told["checkpoint"] == told["steps"]
    refused = both["code"] == 1 and "in use by process" in both["said"] and both["same"]
    rows = [
        ["SIGTERM", 1, "a checkpoint of the last step, exit code 143; the same command ends as a calm run"],
        ["a second run in one folder", 1, "refused; the first one ends as a calm run"],
    ]
    study = report["sweep"]
    swept = (study["code"], study["again"], study["same"]) == (143, 0, True) and study["resumed_from"] >= study["steps"]
    rows.insert(1, ["SIGTERM to a sweep", 1, "its worker saves, exit code 143; the same command ends as a calm run"])
    pressed = report["ctrl-c"]
    ctrl_c = (pressed["code"], pressed["again"], pressed["same"]) == (130, 0, True)
    ctrl_c &= pressed["checkpoint"] == pressed["steps"]
    rows.insert(2, ["Ctrl-C", 1, "a checkpoint of the last step, exit code 130; the same command ends as a calm run"])
    holds = term and refused and swept and ctrl_c
    names = {"full": "a disk that fills up in a checkpoint", "limit": "a file that may not grow on in a checkpoint"}
    for kind, name in names.items():
        disks = report[kind] or []
        good = [
            d for d in disks if d["code"] == 1 and d["checkpoint"] == d["step"] - 3 and d["again"] == 0 and d["same"]
        ]
        holds &= len(good) == len(disks)
        whole = "the checkpoint before whole, one message; with room again the same command ends as a calm run"
        rows.append([name, len(disks), whole if disks else "not possible on this system"])
    return {"holds": holds, "rows": rows}


def files(count: int) -> dict[str, Any]:
    """Broken files of every format."""
    import fuzz

    with tempfile.TemporaryDirectory() as folder:
        found = {target.name: drawn(target.inputs(), count, lambda data, of=target: fuzz.outcome(of, data))
                 for target in fuzz.targets(Path(folder))}  # fmt: skip
    total = sum(sum(counts.values()) for counts in found.values())
    text = "read or refused with one message; no traceback, no file changed or left over"
    return {"holds": True, "formats": found, "rows": [[f"broken files, of {len(found)} kinds", total, text]]}


def commands(count: int) -> dict[str, Any]:
    """Commands with random arguments."""
    import fuzz_cli

    with tempfile.TemporaryDirectory() as folder:
        bench = fuzz_cli.Bench(Path(folder) / "inputs", Path(folder) / "work")
        found = {name: drawn(fuzz_cli.arguments(name), count, lambda words: f"exit code {bench.run(words)}")
                 for name in fuzz_cli.COMMANDS}  # fmt: skip
    total = sum(sum(counts.values()) for counts in found.values())
    text = "exit code 0, or 1 or 2 with a message; no traceback, no input changed, nothing half-written"
    return {"holds": True, "commands": found, "rows": [[f"command lines, of {len(found)} commands", total, text]]}


def drawn(inputs: Any, count: int, judge: Callable[[Any], str]) -> dict[str, int]:
    """How often `judge` said what, of so many inputs. It raises where a rule is broken, with a small such input."""
    from hypothesis import HealthCheck, given, settings

    found = Counter[str]()

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def check(value: Any) -> None:
        found[judge(value)] += 1

    check()
    return dict(found)


PARTS = {
    "kills": (kills, 20),
    "ranks": (ranks, 7),
    "ended": (ended, 10),
    "files": (files, 1000),
    "commands": (commands, 300),
}


def page() -> str:
    """docs/reliability.md with its tables made anew."""
    kept = {path.stem: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    lines = ["| what | times | what came of it | command |", "|---|---:|---|---|"]
    for record in kept.values():
        lines += [f"| {what} | {times:,} | {came} | `{record['command']}` |" for what, times, came in record["rows"]]
    if "files" in kept:
        lines += ["", "| file | inputs | read | refused |", "|---|---:|---:|---:|"]
        for name, counts in kept["files"]["formats"].items():
            read, refused = counts.get("read", 0), counts.get("refused", 0)
            lines.append(f"| {name} | {read + refused:,} | {read:,} | {refused:,} |")
    if "commands" in kept:
        codes = ("exit code 0", "exit code 1", "exit code 2")
        lines += ["", f"| command | inputs | {' | '.join(codes)} |", "|---|---:|---:|---:|---:|"]
        for name, counts in kept["commands"]["commands"].items():
            numbers = [counts.get(code, 0) for code in codes]
            lines.append(f"| {name} | {sum(numbers):,} | {' | '.join(f'{number:,}' for number in numbers)} |")
    dates = ", ".join(f"{name} {record['started'][:10]}" for name, record in kept.items())
    machines = sorted({record["environment"]["device"] for record in kept.values()})
    lines += ["", f"Made on {' and on '.join(machines)}: {dates}."]
    return filled(PAGE.read_text(encoding="utf-8"), MARK, "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "page"])
    parser.add_argument("--count", type=int, help="kills, full disks or inputs, in place of the part's own number")
    args = parser.parse_args()
    if args.part == "page":
        write_text(PAGE, page())
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(TESTS))
    make, count = PARTS[args.part]
    began, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    result = make(count if args.count is None else args.count)
    about = f" --count {args.count}" if args.count is not None else ""
    record = {"command": f"python scripts/reliability.py {args.part}{about}", "started": started, **result}
    record |= {"seconds": round(time.perf_counter() - began), "environment": environment()}
    if not result["holds"]:
        sys.exit(json.dumps(record, indent=2))
    write_json(RESULTS / f"{args.part}.json", record)
    for what, times, came in result["rows"]:
        print(f"{what}: {times:,}; {came}")


if __name__ == "__main__":
    main()
