"""Write docs/study.md from the numbers in results; the page names the commands that made those.

python scripts/study.py             # the page, and the pictures again
python scripts/study.py --check     # fail if the page is not what would be written
"""

import argparse
import re
import sys
from pathlib import Path

import study_routers

from hotlora.base.files import write_text
from hotlora.report.published import HELLORA_OVERLAP
from hotlora.report.study_report import page as study_page
from hotlora.report.study_report import write_page
from hotlora.routing.study import load_study

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "nano" / "study"
WARM_UP = ROOT / "results" / "nano" / "warm-up"
PAGE = ROOT / "docs" / "study.md"
PREFACE = (
    "nano is the small embedded model ([nano.md](nano.md)). It was trained on what its own three synthetic tasks are "
    "made of (sums, queries, people at crafts) and on generic text: HellaSwag's and PIQA's training splits, from "
    "which the examples below are drawn too. It has read none of the other eight data sets, and no code but generated "
    "SQL, so code, science and encyclopaedic text are foreign to it, and a claim about what a router *knows* can fail "
    "here for that reason alone. The structure of the routing is what can be compared; nano proves nothing about the "
    "paper's models.\n\n"
    "`data/` holds the data sets in their authors' formats, as the files in `hotlora/tasks/` show them."
)

WARM_UP_COMMANDS = """\
    hotlora train --model nano --data nano-math --rule all --limit 200 --epochs 1 --no-evaluate -o runs/warm-up
    hotlora merge --model nano runs/warm-up/adapter -o runs/warm-up/merged
    hotlora profile --model nano --data nano-math -o runs/warm-up/base.safetensors
    hotlora profile --model nano --data nano-math --limit 200 -o runs/warm-up/slice.safetensors
    hotlora profile --model runs/warm-up/merged --data nano-math -o runs/warm-up/warmed-up.safetensors
"""


def page() -> str:
    """docs/study.md."""
    nano = study_page(
        load_study(RESULTS / "study.json"),
        pictures_in=_from_docs(RESULTS),
        title="nano",
        preface=PREFACE,
        with_claims=False,
    )
    inside = re.sub(r"^#(#*) ", r"##\1 ", nano, flags=re.M)  # a level down
    return f"{study_routers.page()}\n{inside}\n{warm_up()}"


def warm_up() -> str:
    """HELLoRA's figure 3: the hot experts of a warm-up against the real ones."""
    result = load_study(WARM_UP / "study.json")
    names, layered = result["overlap"]["names"], result["overlap"]["by_layer"]
    kept, rows = result["settings"]["experts_per_layer"], []
    for name in ("slice", "warmed-up"):
        values = layered[names.index("base")][names.index(name)]
        by_layer = ", ".join(f"{value:.2f}" for value in values)
        same = f"{sum(value == 1 for value in values)} of {len(values)}"
        rows.append(f"| {name} | {same} | {sum(values) / len(values):.2f} | {by_layer} |")
    table = "\n".join(["| against base | same in | mean Jaccard | by layer |", "|---|---:|---:|---|", *rows])
    same, layers = HELLORA_OVERLAP["same"], HELLORA_OVERLAP["layers"]
    return f"""\
## HELLoRA's figure 3

Does a warm-up find the hot experts? *base* is nano on all of nano-math's training data, *slice* nano on a tenth as
much of it, and *warmed-up* nano after a warm-up, one epoch of LoRA on all experts over that tenth, on all of the data:

{WARM_UP_COMMANDS}    {result["command"]}

{table}

The sets are of {kept} experts of {result["model"]["num_experts"]}. HELLoRA (section 4.1, figure 3) finds the same
{HELLORA_OVERLAP["experts_per_layer"]} experts in {same} of OLMoE's {layers} layers, and all but one in the others.

![Jaccard of the hot experts in each layer.]({_from_docs(WARM_UP)}/overlap-by-layer.png)
"""


def _from_docs(folder: Path) -> str:
    return f"../{folder.relative_to(ROOT).as_posix()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE.relative_to(ROOT)} is not up to date: run `python scripts/study.py`")
        return
    for folder in (RESULTS, WARM_UP):
        write_page(folder)
    write_text(PAGE, page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
