"""Write what is generated in the docs: the commands' help, and tables from run records and logs.

python scripts/docs.py                     # write all
python scripts/docs.py --check             # fail if one is not what would be written
python scripts/docs.py --demo runs/demo    # first take over a demo's records and pictures into docs/demo
"""

import argparse
import dataclasses
import html
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import moe_sieve
from engines import MARK as ENGINES_MARK
from engines import tables as engine_tables
from gpu import gpu_tables
from gpu import readme_table as gpu_readme_table
from marks import filled, table
from models import PAGE as MODELS_PAGE
from models import page as models_page
from preregistered import STUDIES, result
from reliability import PAGE as RELIABILITY_PAGE
from reliability import page as reliability_page
from study import PAGE as STUDY_PAGE
from study import page as study_page

from hotlora.base.options import ALIASES
from hotlora.base.records import find_records
from hotlora.bench.report import speed_tables
from hotlora.report import leaderboard_page
from hotlora.report.figures import save_figure
from hotlora.report.leaderboard import leaderboard
from hotlora.report.leaderboard_page import READING, markdown_tables
from hotlora.report.sections import read_sections
from hotlora.report.tables import section_tables
from hotlora.runs.options import EVALUATE_LEAVES, PROFILE_LEAVES, EvalOptions, ProfileOptions, RunOptions
from results import auto_table

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs" / "demo"
DEMO_MARK = "<!-- made by scripts/docs.py from docs/demo: {} -->"
MOE_SIEVE_MARK = "<!-- made by scripts/docs.py from results/moe_sieve.json -->"
NANO_MARK = "<!-- pretraining: made by scripts/docs.py from hotlora/nano/{}/pretraining.jsonl -->"
AUTO_MARK = "<!-- made by scripts/docs.py from results/nano/auto_k -->"
STUDY_MARK = "<!-- made by scripts/docs.py from results/nano/{} -->"
SPEED_MARK = "<!-- made by scripts/docs.py from benchmarks -->"
README_GPU_MARK = "<!-- made by scripts/docs.py from benchmarks/gpu/h200.json -->"
GPU_MARK = "<!-- made by scripts/docs.py from benchmarks/gpu -->"
PROFILING_MARK = "<!-- made by scripts/docs.py from benchmarks/profiling -->"
IMPORT_MARK = "<!-- made by scripts/docs.py from benchmarks/import -->"
OWN_DATA_MARK = "<!-- made by scripts/docs.py from benchmarks/own_data -->"
METHODS_MARK = "<!-- made by scripts/docs.py from benchmarks/methods -->"
SINKS_MARK = "<!-- made by scripts/docs.py from benchmarks/sinks -->"
EXPERTS_MARK = "<!-- made by scripts/docs.py from benchmarks/experts -->"
UNTIL_MARK = "<!-- made by scripts/docs.py from results/profile_until.json -->"
BOARD = ROOT / "results" / "nano" / "papers-longer"
BOARD_PICTURE = ROOT / "docs" / "assets" / "leaderboard.png"
BOARD_MARK = "<!-- made by scripts/docs.py from results/nano/papers-longer -->"
READING_MARK = "<!-- made by scripts/docs.py: how to read a leaderboard -->"
OPTIONS_HEAD = """# Options of a run

Every option of a training: its name, its default and what it does.
<!-- made by scripts/docs.py from hotlora/runs/options.py -->

Each has one name everywhere. `max_length` is

- `--max-length 1024` on the command line (`hotlora train --help` has the few that are called otherwise, as `--dora`),
- `max_length: 1024` in a file that `hotlora train --config FILE.yaml` reads,
- `hotlora.train(…, max_length=1024)` in Python, and an option of a condition in a [sweep](sweep.md),
- `config.max_length` in the run's `run.json`.

```yaml
# run.yaml:  hotlora train --config run.yaml
model: allenai/OLMoE-1B-7B-0924
data: rows.jsonl
method: hellora          # method, preset, placement, output and preflight can stand here, too
learning_rate: 4e-4
max_length: 1024
```

What the command line says comes before the file, the file before a method's or preset's own values, these before the
defaults. A name that does not exist is an error that names the nearest one. `null` leaves an option to its default.
`data`, `evaluate`, `profile`, `plan`, `params`, `merge`, `export`, `combine`, `verify`, `generate`, `chat` and `demo`
take `--config`, too, with their own options.

Some are also known by the names that transformers and TRL have for them, in all of these places but `run.json`:
"""
KEYWORDS_HEAD = '''"""The options of `hotlora.train`, `profile` and `evaluate` as keywords, which type checkers read.

Made by scripts/docs.py from `options.RunOptions` and `options.ProfileOptions`, which have the defaults.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict'''
CLI_FOR = "Every command and its options, as `hotlora COMMAND --help` prints them."
SHOWN = ("accuracy", "difference", "held_out", "covered", "trained")
KEPT = ("run.json", "plan.json", "profile.safetensors", "metrics.jsonl")
PICTURES = ("heat-map",)


def cli_page() -> str:
    """Every command's help, as typer writes it."""
    command = [sys.executable, "-m", "typer", "hotlora.cli.main", "utils", "docs", "--name", "hotlora"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, rest = html.unescape(page).strip().split("\n", 1)
    return f"{head}\n\n{CLI_FOR}\n{rest}\n"


def options_page() -> str:
    """The options of `hotlora train`, from the dataclasses that hold them."""
    lines = [OPTIONS_HEAD, "| theirs | here |", "|---|---|"]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, ours in ALIASES.items()]
    lines += [
        "",
        "The other names of a training's options are theirs as they are. Both names at once are an error.",
        "",
    ]
    chosen = [field for field in dataclasses.fields(RunOptions) if field.metadata["cli"]]
    chosen.sort(key=lambda field: field.default is not dataclasses.MISSING)  # the required first
    for panel in ("", "Data", "Which experts", "Method", "Adapter", "Training", "LoRI"):
        lines += [f"## {panel or 'Model, data, run'}", "", "| name | default | |", "|---|---|---|"]
        for field in chosen:
            if (field.metadata["panel"] or "") == panel:
                is_given = field.default is not dataclasses.MISSING
                default = json.dumps(list(field.default) if field.default == () else field.default) if is_given else ""
                help = field.metadata["help"].replace("|", "\\|")
                lines.append(f"| `{field.name}` | {default and f'`{default}`'} | {help} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def keywords_module() -> str:
    """The options as `TypedDict`s, which type checkers and editors read."""
    lines = [KEYWORDS_HEAD]
    for name, function, options, leave in (
        ("TrainKeywords", "train", RunOptions, ("model", "data", "test_data")),
        ("ProfileKeywords", "profile", ProfileOptions, ("model", *PROFILE_LEAVES)),
        ("EvaluateKeywords", "evaluate", EvalOptions, ("model", *EVALUATE_LEAVES)),
    ):
        lines += [f"\n\nclass {name}(TypedDict, total=False):", f'    """Of `hotlora.{function}`."""\n']
        chosen = [f for f in dataclasses.fields(options) if f.metadata["cli"] and f.name not in leave]
        lines += [f"    {field.name}: {_written(field.type)}" for field in chosen]
        if options is RunOptions:
            types = {field.name: _written(field.type) for field in chosen} | {"output": "str | os.PathLike[str] | None"}
            lines += [
                "",
                "    # transformers' names of these",
                *(f"    {a}: {types[name]}" for a, name in ALIASES.items()),
            ]
    return "\n".join(lines) + "\n"


def _written(kind: Any) -> str:
    """A field's type as code has it."""
    if get_origin(kind) is Sequence:
        return f"Sequence[{_written(get_args(kind)[0])}]"
    if get_origin(kind) is Mapping:
        return f"Mapping[{', '.join(map(_written, get_args(kind)))}]"
    if get_args(kind):
        return " | ".join(map(_written, get_args(kind)))
    return "None" if kind is NoneType else kind.__name__


def demo_tables(readme: str) -> str:
    """README.md with the demo's tables, one for each kind of runs."""
    (section,) = read_sections(find_records(DEMO))
    for shown in section_tables(section):
        columns = [key for key in SHOWN if key in shown.columns]
        heads = [f"{section.model} on {shown.task}", *(shown.columns[key] for key in columns)]
        rows = [[row.name, *(row.cells[key] for key in columns)] for row in shown.rows]
        readme = filled(readme, DEMO_MARK.format(shown.adapted), table(heads, rows))
    return readme


def nano_table(folder: str) -> str:
    """Routing of an embedded model by domain, and its held-out loss, from the log of its pretraining."""
    log = ROOT / "hotlora" / "nano" / folder / "pretraining.jsonl"
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    routing, losses = dict(last["routing"]), last["held_out_loss"]
    overlaps = routing.pop("jaccard_25")
    lines = [
        f"After {last['step']:,} steps, {last['tokens'] / 1e6:.1f}M tokens, {last['seconds'] / 60:.0f} minutes "
        "(other work ran beside it for a part of them), on held-out text:",
        "",
        "| text of | layer CV | global CV | ratio | cold experts | top 25% cover |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {row['layer_cv']:.2f} | {row['global_cv']:.2f} | {row['ratio']:.1f} | {row['cold_share']:.0%} | "
        f"{row['coverage_25']:.0%} |"
        for name, row in routing.items()
    ]
    lines += ["", "| the hot 25% of two tasks | Jaccard |", "|---|---:|"]
    lines += [f"| {pair} | {value:.2f} |" for pair, value in overlaps.items()]
    lines += ["", "| held-out domain | loss, nats a token |", "|---|---:|"]
    lines += [f"| {domain} | {loss:.2f} |" for domain, loss in sorted(losses.items())]
    return "\n".join(lines)


def profiling_table() -> str:
    """What a routing profile costs over a forward, from the results of benchmarks/time_profiling.py."""
    lines = [
        "| result | tokens | a profile over the decoder alone | over a forward with logits |",
        "|---|---:|---:|---:|",
    ]
    for file in sorted((ROOT / "benchmarks" / "profiling").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        ratios = [result["profile_over"][name] for name in ("decoder", "forward with logits")]
        cells = [f"{ratio['median']:.3f} ({ratio['q1']:.3f}–{ratio['q3']:.3f})" for ratio in ratios]
        lines.append(
            f"| `{result['command']}`, {result['environment']['device']} | {result['tokens']:,} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def import_table() -> str:
    """What reading a large array of routed experts takes, from the results of benchmarks/time_import.py."""
    heads = ["the file", "`cat` twice, s", "import, s", "import over the two passes", "peak memory over the file"]
    rows = []
    for file in sorted((ROOT / "benchmarks" / "import").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        size = f"{result['bytes'] / 1e9:.2f} GB, {result['environment']['device']}"
        for state, seconds in result["seconds"].items():
            ratio = result["import_over_two_passes"][state]
            rows.append(
                [
                    f"{size}, {'in' if state == 'cached' else 'not in'} the system's cache",
                    f"{seconds['two passes']['median']:.1f}",
                    f"{seconds['import']['median']:.1f}",
                    f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['most']:.2f})",
                    f"{result['memory']['peak']['share of the file']:.3f}",
                ]
            )
    return table(heads, rows)


def own_data_table() -> str:
    """Reading and tokenizing beside TRL, from the results of benchmarks/own_data.py."""
    heads = ["rows", "runs each", "", "seconds", "of a processor", "peak memory, MB"]
    lines = []
    for file in sorted((ROOT / "benchmarks" / "own_data").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        first = [f"{result['rows']:,}", str(len(result["runs"]["hotlora"]))]
        for way, name in (("hotlora", "hotlora"), ("trl", "SFTTrainer's preparation")):
            found = result["medians"][way]
            numbers = [f"{found['seconds']:.0f}", f"{found['cpu_seconds']:.1f}", f"{found['peak_bytes'] / 1e6:.0f}"]
            lines.append([*first, name, *numbers])
        ratios = result["hotlora against trl"]
        shares = [f"{ratios[key]:.2f}" for key in ("seconds", "cpu_seconds", "peak_bytes")]
        lines.append([*first, "hotlora over SFTTrainer's", *shares])
    return table(heads, lines)


def methods_table() -> str:
    """The challengers' steps beside what they compute by definition, from methods.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from methods import WORDS

    result = json.loads((ROOT / "benchmarks" / "methods" / "cpu.json").read_text(encoding="utf-8"))
    lines = [
        [name, f"{its['method'] * 1e3:.0f}", WORDS[name], f"{its['definition'] * 1e3:.0f}", f"{its['ratio']:.2f}"]
        for name, its in result["pairs"].items()
    ]
    made = table(["method", "step, ms", "by its definition", "step, ms", "ratio"], lines)
    return made + (
        f"\n\n*nano, all experts adapted, {result['rows']} rows of {result['length']} tokens, "
        f"{result['environment']['device']}; medians of {result['rounds']} rounds "
        "(`python benchmarks/methods.py --output benchmarks/methods/cpu.json`).*"
    )


def sinks_table() -> str:
    """Attention with sinks, fused beside eager, from attention_sinks.py."""
    lines = []
    for file in sorted((ROOT / "benchmarks" / "sinks").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        lines += [
            f"One row, {result['dtype'].removeprefix('torch.')}, {result['environment']['device']}; medians of "
            f"{result['rounds']} rounds (`{result['command']}`).",
            "",
            "| tokens | a token sees | eager, s | fused, s | fused over eager | eager keeps, MB | fused keeps, MB |",
            "|---:|---|---:|---:|---:|---:|---:|",
        ]
        for row in result["rows"]:
            seconds, kept = row["seconds"], row["kept"]
            lines.append(
                f"| {row['tokens']:,} | {'all before it' if row['sees'] == 'all' else 'a window'} | "
                f"{seconds['eager']:.2f} | {seconds['fused']:.2f} | {row['fused_over_eager']:.2f} | "
                f"{kept['eager'] / 1e6:,.0f} | {kept['fused'] / 1e6:,.0f} |"
            )
    return "\n".join(lines)


def stored_experts_table() -> str:
    """Experts in few bits or in a file beside bfloat16, from experts_elsewhere.py and larger_than_memory.py."""
    folder = ROOT / "benchmarks" / "experts"
    result = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
    heads = ["experts", "step, s", "of bfloat16's", "most memory while loading, GB", "of bfloat16's", "in a step, GB"]
    lines = []
    for way, its in result["medians"].items():
        ratio = result["against bfloat16"][way]
        step = [f"{its['seconds']:.2f}", f"{ratio['seconds']:.2f}"]
        loading = [f"{its['loading_bytes'] / 1e9:.2f}", f"{ratio['loading_bytes']:.2f}"]
        peak = [f"{its['step_bytes'] / 1e9:.2f}", f"{ratio['step_bytes']:.2f}"]
        lines.append([way, *step, *loading, *peak])
    made = table([*heads, "of bfloat16's"], lines)
    runs = len(result["runs"]["bfloat16"])
    limited = json.loads((folder / "cpu-limited.json").read_text(encoding="utf-8"))
    times = {name: run["seconds"] for name, run in limited["runs"].items()}
    equal = "the same bytes" if limited["adapters_equal"] else "OTHER BYTES"
    return made + (
        f"\n\n*{result['layers']} of OLMoE-1B-7B's layers with random weights, {result['tokens']:,} tokens a step, "
        f"{result['environment']['device']}; medians of {runs} processes each. Memory is what no file has, beyond what "
        "the process had after its imports. With `--offload` the experts are in none of it.*\n\n"
        f"{limited['layers']} such layers, {limited['experts_bytes'] / 1e9:.1f} GB of experts, trained in a process "
        f"that may use {limited['limit_bytes'] / 1e9:.1f} GB, page cache included (a memory cgroup): "
        f"{times['offloaded, limited']:.0f} s with loading, {times['in memory']:.0f} s with all the memory, and an "
        f"adapter of {equal} (`sudo python benchmarks/larger_than_memory.py --output "
        "benchmarks/experts/cpu-limited.json`)."
    )


def until_tables() -> str:
    """What `--profile-until` promises and spares, from the record of benchmarks/profile_until.py."""
    record = json.loads((ROOT / "results" / "profile_until.json").read_text(encoding="utf-8"))

    def spread(found: dict[str, float], form: str = ".3f") -> str:
        return f"{found['mean']:{form}} ({found['sd']:{form}})"

    lines = [
        "| rows that are read | overlap with the population's | as estimated | lower end | overlap above it |",
        "|---:|---:|---:|---:|---:|",
    ]
    for number, found in record["olmoe"]["estimates"].items():
        cells = [spread(found[name]) for name in ("true", "estimate", "low")]
        lines.append(f"| {int(number):,} | {' | '.join(cells)} | {found['true_at_least_low']:.0%} |")
    lines += ["", "| read until | rows drawn | rows read | tokens read | overlap | above the lower end | the least |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for name, found in record["olmoe"]["stops"].items():
        numbers = [spread(found[what], ",.0f") for what in ("rows", "tokens")]
        kept = f"{found['true_at_least_low']:.0%} | {found['true']['min']:.2f}"
        way = name.partition(", ")[2]
        lines.append(f"| {found['target']:g} | {way} | {' | '.join(numbers)} | {spread(found['true'])} | {kept} |")
    lines += ["", "And on nano, with the seconds of one pass over all 2,000 rows, and of one that stops, on a CPU:", ""]
    lines.append("| task | tokens of all | tokens read | of all | overlap with all | seconds |")
    lines.append("|---|---:|---:|---:|---:|---:|")
    for task, found in record["nano"].items():
        stops, until = found["stops"], found["until"]
        share = stops["tokens"]["mean"] / found["tokens"]
        times = f"{found['seconds']:.1f} and {until['seconds']:.1f}"
        read = spread(stops["tokens"], ",.0f")
        lines.append(f"| {task} | {found['tokens']:,} | {read} | {share:.1%} | {spread(stops['true'])} | {times} |")
    return "\n".join(lines)


def leaderboard_tables() -> str:
    """The board of nano's tasks, with its picture."""
    shown = "![Scores by method, from the least budget to the largest.](assets/leaderboard.png)"
    told = "*Seeds as small dots, means and 95% intervals; coloured: what won and did not lose.*"
    return f"{shown}\n\n{told}\n\n{markdown_tables(leaderboard(BOARD), ROOT / 'docs', level=3)}"


def take_over(runs: Path, into: Path) -> None:
    """Copy a demo's records, plans, profiles, metrics and heat map, not its weights."""
    for folder in find_records(runs):
        target = into / folder.relative_to(runs)
        target.mkdir(parents=True, exist_ok=True)
        for name in [*KEPT, *(p.name for p in folder.glob("results-*.jsonl"))]:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    for picture in runs.rglob("*.png"):
        if any(name in picture.name for name in PICTURES):
            shutil.copyfile(picture, into / picture.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", type=Path)
    args = parser.parse_args()
    if args.demo:
        shutil.rmtree(DEMO)
        take_over(args.demo, DEMO)
    readme, nano = ROOT / "README.md", ROOT / "docs" / "nano.md"
    text = filled(readme.read_text(encoding="utf-8"), MOE_SIEVE_MARK, moe_sieve.readme_table())
    text = filled(text, README_GPU_MARK, gpu_readme_table())
    papers, imports, data = (ROOT / "docs" / f"{name}.md" for name in ("papers", "import", "data"))
    speed, method = ROOT / "docs" / "speed.md", ROOT / "docs" / "method.md"
    export = ROOT / "docs" / "export.md"
    studies, of_method = ROOT / "results" / "nano", method.read_text(encoding="utf-8")
    of_method = filled(of_method, AUTO_MARK, auto_table(studies / "auto_k"))
    of_method = filled(of_method, UNTIL_MARK, until_tables())
    of_method = filled(of_method, EXPERTS_MARK, stored_experts_table())
    of_method = filled(of_method, SINKS_MARK, sinks_table())
    of_speed = filled(speed.read_text(encoding="utf-8"), SPEED_MARK, speed_tables(ROOT / "benchmarks"))
    of_speed = filled(of_speed, GPU_MARK, gpu_tables())
    of_speed = filled(of_speed, METHODS_MARK, methods_table())
    of_nano = nano.read_text(encoding="utf-8")
    for folder in ("model", "qwen"):
        of_nano = filled(of_nano, NANO_MARK.format(folder), nano_table(folder))
    preregistered = ROOT / "docs" / "preregistered.md"
    of_preregistered = preregistered.read_text(encoding="utf-8")
    for study in STUDIES:
        if (mark := STUDY_MARK.format(study)) in of_preregistered:  # else it has no result yet
            of_preregistered = filled(of_preregistered, mark, result(study, studies / study))
    board = ROOT / "docs" / "leaderboard.md"
    of_board = filled(board.read_text(encoding="utf-8"), READING_MARK, READING)
    wanted = {
        ROOT / "docs" / "cli.md": cli_page(),
        ROOT / "docs" / "options.md": options_page(),
        ROOT / "hotlora" / "runs" / "keywords.py": keywords_module(),
        readme: demo_tables(text),
        moe_sieve.PAGE: moe_sieve.recorded_page(),
        papers: filled(papers.read_text(encoding="utf-8"), MOE_SIEVE_MARK, moe_sieve.papers_table()),
        method: of_method,
        preregistered: of_preregistered,
        MODELS_PAGE: models_page(),
        STUDY_PAGE: study_page(),
        RELIABILITY_PAGE: reliability_page(),
        export: filled(export.read_text(encoding="utf-8"), ENGINES_MARK, engine_tables()),
        imports: filled(imports.read_text(encoding="utf-8"), IMPORT_MARK, import_table()),
        data: filled(data.read_text(encoding="utf-8"), OWN_DATA_MARK, own_data_table()),
        speed: filled(of_speed, PROFILING_MARK, profiling_table()),
        board: filled(of_board, BOARD_MARK, leaderboard_tables()),
        nano: of_nano,
    }
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if args.check and stale:
        sys.exit(f"not up to date: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run `make docs`")
    if not args.check:
        save_figure(leaderboard_page.picture(leaderboard(BOARD)), BOARD_PICTURE, 110)
        for path in stale:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
