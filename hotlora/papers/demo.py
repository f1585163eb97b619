"""The whole way on the embedded model: profile, plan, train, evaluate, compare, one page."""

from dataclasses import asdict
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

# Enough steps for LoRA on all experts to learn the tasks, few enough that a difference can show; the same for all.
CONFIG = TrainConfig(
    max_steps=100, batch_size=24, learning_rate=2e-3, warmup_ratio=0.1, lr_scheduler="linear", r=8, lora_alpha=16,
    max_length=256, save_steps=50,
)  # fmt: skip
TASKS = ("nano-math", "nano-sql", "nano-choice")


def run_demo(
    task: str,
    output: Path,
    *,
    config: TrainConfig = CONFIG,
    train_examples: int = TRAIN_EXAMPLES,
    test_examples: int = TEST_EXAMPLES,
    console: Console,
) -> Path:
    """Runs every condition of ``task`` into ``output``, prints their table, and returns the page's path.

    Conditions that are done already are not run again. Every one has the same data, options and seed; the first
    one's routing profile serves them all.

    Raises:
        DataError: no such nano task.
    """
    if task not in TASKS:
        raise DataError(f"the demo has no task {task!r}; it has {', '.join(TASKS)}.")
    folder = output / task
    disable_progress_bar()  # nano loads in no time
    steps = len(CONDITIONS) + 1
    console.print(f"[bold]1/{steps} base[/]: nano as it is, on {test_examples} questions of {task}")
    run_evaluation(EvalOptions(model="nano", limit=test_examples), task, folder / "base", progress=True)
    profile = None
    for number, rule in enumerate(CONDITIONS, start=2):
        budget = None if rule == "all" else FRACTION
        told = "every expert" if budget is None else f"the {rule} {budget:.0%} of each layer's experts"
        rest = "attention, " * config.train_attention + "router, " * config.train_router
        console.print(f"[bold]{number}/{steps} {rule}[/]: LoRA on {rest}{told}")
        options = RunOptions(
            model="nano", data=task, **asdict(config), rule=rule, fraction=budget, profile=profile,
            profile_fraction=1.0, limit=train_examples, test_limit=test_examples,
        )  # fmt: skip
        run_training(options, folder / rule, progress=True)
        profile = folder / CONDITIONS[0] / "profile.safetensors"
    page = write_report(folder, folder)
    console.print()
    console.print(conditions_table(find_records(folder)))
    console.print(f"The page, with pictures of the router: [bold]{page.resolve()}[/]", soft_wrap=True)
    return page
