"""The command `train`, and how a run's outcome is printed."""

import shlex
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import api
from ..base.options import ALIASES
from ..report.text import loss_word
from ..runs.methods import METHODS, PLACEMENTS
from ..runs.options import RunOptions
from .evaluate import print_evaluation
from .options import options_of, out


@options_of(RunOptions, aliases=ALIASES)
def train(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder (default runs/MODEL-DATA-METHOD-SEED).")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(rich_help_panel="Method", help=f"One of {', '.join(METHODS)} (default: hot experts, a quarter)."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Method",
            help="A method with its paper's hyperparameters: METHOD-math, -code or -safety, sieve, dr-lora, "
            "esft-token or esft-gate. Options given beside it come first.",
        ),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Method",
            help=f"{', '.join(PLACEMENTS)}: all that the method adapts; experts and router; experts alone.",
        ),
    ] = None,
    preflight: Annotated[
        bool,
        typer.Option("--preflight/--no-preflight", help="Say first whether it fits into memory; stop if it cannot."),
    ] = True,
    **given: Any,
) -> None:
    """Profile the router, choose experts, train their adapter, evaluate. Run again to go on after a stop.

    `hotlora train --model MODEL --data FILE.jsonl` is enough: hot experts, a quarter of each layer's.

    Over several GPUs: `accelerate launch --config_file configs/fsdp2.yaml -m hotlora train …`, or torchrun.
    """
    from ..base.processes import is_main

    run = api.train(output=output, method=method, preset=preset, placement=placement, preflight=preflight, **given)
    if is_main():
        print_run(run.record, run.folder)


def times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def print_run(record: dict[str, Any], output: Path) -> None:
    """What a run came to, and where everything lies."""
    parameters, training = record["parameters"], record["training"]
    if "warmup" in record:
        overlap = record["warmup"]["top_k"]
        out.print(
            f"warm-up: {overlap['jaccard']:.0%} of the {overlap['experts_per_layer']} hottest experts of a layer are "
            "the base model's (Jaccard)",
        )
    out.print(
        f"{record['name']}: {parameters['trainable']:,} parameters trained ({parameters['percent']:.2f}%), "
        f"{training['steps']} steps, loss {training['loss_first']:.4f} → {training['loss_last']:.4f}, "
        f"{training['tokens_per_second']:,.0f} tokens/s",
    )
    if moves := record.get("reprofile"):
        came, alike = sum(row["came"] for row in moves), statistics.mean(row["jaccard"] for row in moves)
        out.print(
            f"re-profiled {times(len(moves))}: {came:,} experts came, mean Jaccard with the plan before {alike:.2f} "
            f"({output / 'reprofile.jsonl'})"
        )
    if ranks := record.get("ranks"):
        low, high = ranks[-1]["smallest"], ranks[-1]["largest"]
        out.print(f"ranks grew {times(len(ranks))}, to {low} to {high} ({output / 'ranks.jsonl'})")
    if record.get("config", {}).get("load_best") and training.get("best_step"):
        loss = training["best_eval_loss"]
        out.print(f"kept: the weights after step {training['best_step']}, held-out loss {loss:.4f}")
    if "test_loss" in training:
        before = f"{loss_word(training['test_loss_before'])} → " if "test_loss_before" in training else ""
        out.print(f"held-out response loss {before}{loss_word(training['test_loss'])}")
    print_evaluation(record, output)
    for name, what in (
        ("adapter", "adapter"),
        ("model", "model"),
        ("mask.safetensors", "mask"),
        ("plan.json", "plan"),
        ("run.json", "record"),
    ):
        if (output / name).exists():
            out.print(f"{what}: {output / name}")
    out.print(f"pictures: {shlex.join(['hotlora', 'report', str(output)])}")
