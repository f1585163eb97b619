"""The whole way on the embedded model: profile, plan, train, evaluate, compare, one page."""

from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from ..base.errors import DataError
from ..base.records import find_records
from ..report.page import conditions_table, write_report
from ..runs.evaluation import run_evaluation
from ..runs.options import EvalOptions, RunOptions
from ..runs.training import run_training
from ..training.config import TrainConfig

CONDITIONS = ("all", "hot", "random", "cold")
FRACTION = 0.25  # MoE-Sieve s4
TRAIN_EXAMPLES = 2000
TEST_EXAMPLES = 500

# Near the end of learning on nano-math (docs/papers.md); the same for all.
CONFIG = TrainConfig(
    max_steps=150, batch_size=16, learning_rate=4e-3, warmup_ratio=0.1, lr_scheduler="linear", r=8, lora_alpha=16,
    max_length=256, save_steps=75,
)  # fmt: skip
TASKS = ("nano-math", "nano-sql", "nano-choice")
# Folder -> what is adapted, whether attention and router are, and what to look for in the table.
PARTS = {
    "everything": (
        "attention, router and experts",
        True,
        "As in the papers. Near the end of learning a quarter of the experts, hot or not, comes close to all of them: "
        "on a model this small, attention and router carry most of the change.",
    ),
    "experts-alone": (
        "experts alone",
        False,
        "Attention and router stay as they are, and it matters which quarter it is: the experts that the router "
        "really uses learn the task, as many random ones less of it, the least used ones next to nothing.",
    ),
}


def run_demo(
    task: str,
    output: Path,
    *,
    config: TrainConfig = CONFIG,
    train_examples: int = TRAIN_EXAMPLES,
    test_examples: int = TEST_EXAMPLES,
    console: Console,
) -> Path:
    """Runs every condition of ``task`` into ``output``, with everything adapted and with experts alone, prints a table
    of each, and returns the page's path.

    Conditions that are done already are not run again. Every one has the same data, options and seed; the first
    one's routing profile serves them all.

    Raises:
        DataError: no such nano task.
    """
    if task not in TASKS:
        raise DataError(f"the demo has no task {task!r}; it has {', '.join(TASKS)}.")
    folder = output / task
    disable_progress_bar()  # nano loads in no time
    steps = len(PARTS) * len(CONDITIONS) + 1
    console.print(f"[bold]1/{steps} base[/]: nano as it is, on {test_examples} questions of {task}", markup=True)
    run_evaluation(EvalOptions(model="nano", limit=test_examples), task, folder / "base", progress=True)
    profile, number = None, 1
    for part, (_, is_whole, _) in PARTS.items():
        for rule in CONDITIONS:
            number += 1
            budget = None if rule == "all" else FRACTION
            told = "every expert" if budget is None else f"the {rule} {budget:.0%} of each layer's experts"
            console.print(
                f"[bold]{number}/{steps} {rule}[/]: LoRA on {'attention, router, ' * is_whole}{told}", markup=True
            )
            options = RunOptions(
                model="nano", data=task, **asdict(replace(config, train_attention=is_whole, train_router=is_whole)),
                rule=rule, fraction=budget, profile=profile, profile_fraction=1.0, limit=train_examples,
                test_limit=test_examples,
            )  # fmt: skip
            run_training(options, folder / part / rule, progress=True)
            profile = profile or folder / part / rule / "profile.safetensors"
    page = write_report(folder, folder)
    for part, (adapted, _, lesson) in PARTS.items():
        console.print(f"\n[bold]LoRA on {adapted}[/]\n{lesson if task == 'nano-math' else ''}", markup=True)
        base = {folder / "base": find_records(folder)[folder / "base"]}
        console.print(conditions_table(base | find_records(folder / part)))
    console.print(f"The page, with pictures of the router: [bold]{page.resolve()}[/]", markup=True, soft_wrap=True)
    return page
