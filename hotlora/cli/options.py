"""What several commands share: their options and their consoles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..base.errors import HotLoraError

out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", "-m", help="A folder, a name on the Hub, or nano.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="A task (nano-math, gsm8k, …), a task and its files (spider:DIR), a Hub id, or a JSONL file with "
        "prompt and completion, or messages.",
    ),
]
OnTopOf = Annotated[
    list[Path] | None,
    typer.Option(help="An adapter of an earlier task, merged into the model first; may be given several times."),
]
Dtype = Annotated[str, typer.Option(help="auto: the checkpoint's own on a GPU, float32 on the CPU.")]
Device = Annotated[str, typer.Option(help="auto: cuda if there is one, else the CPU.")]
Quantize = Annotated[
    int | None, typer.Option(help="Store the routed experts in 8 or 4 bits (pip install hotlora\\[quantize]).")
]
KeepHot = Annotated[
    bool, typer.Option("--keep-hot", help="With --quantize: store the cold experts so, and leave the adapted ones.")
]
ExpertParallel = Annotated[
    int, typer.Option(help="Processes that share out each layer's experts (torchrun, accelerate launch).")
]
Limit = Annotated[int | None, typer.Option(help="Use at most so many examples, drawn by the seed.")]
BatchSize = Annotated[int, typer.Option(help="Sequences in a batch.")]
MaxLength = Annotated[int, typer.Option(help="Tokens in an example; longer ones are cut.")]
Rule = Annotated[
    str,
    typer.Option(
        rich_help_panel="Which experts",
        help="How experts are chosen: hot, all, random, cold, global, greedy, coverage, cumulative, hot+random, "
        "scores or auto.",
    ),
]
Fraction = Annotated[
    float | None,
    typer.Option(rich_help_panel="Which experts", help="Share of each layer's experts to adapt (default 0.25)."),
]
ExpertsPerLayer = Annotated[
    int | None, typer.Option(rich_help_panel="Which experts", help="Their number, in place of --fraction.")
]
Share = Annotated[
    float | None,
    typer.Option(
        "--p",
        rich_help_panel="Which experts",
        help="Share of each layer's routing to reach: coverage (default 0.6), cumulative (0.2; by mass 0.1 of a "
        "token's gate weight).",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(rich_help_panel="Which experts", help="greedy: experts over all layers, in place of --fraction."),
]
Fillers = Annotated[
    int | None,
    typer.Option(rich_help_panel="Which experts", help="hot+random: how many are random (default half)."),
]
Scores = Annotated[
    Path | None, typer.Option(rich_help_panel="Which experts", help="scores: a JSON file of each expert's score.")
]
Signal = Annotated[
    str,
    typer.Option(
        rich_help_panel="Which experts", help="What ranks experts: count (assignments) or mass (gate weights)."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Rank = Annotated[int, typer.Option("--r", rich_help_panel="Adapter", help="Rank of every adapter.")]
Alpha = Annotated[int, typer.Option("--lora-alpha", rich_help_panel="Adapter", help="Scaling is lora_alpha / r.")]
Attention = Annotated[
    bool, typer.Option("--train-attention/--no-attention", rich_help_panel="Adapter", help="Adapt q, k, v, o.")
]
Router = Annotated[
    bool, typer.Option("--train-router/--no-router", rich_help_panel="Adapter", help="Adapt the router.")
]
Shared = Annotated[
    bool,
    typer.Option(
        "--train-shared/--no-shared", rich_help_panel="Adapter", help="Adapt shared experts, where there are any."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def number_list(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """The numbers of an option that takes several."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise HotLoraError(f"--{name} is {text!r}: give numbers with commas between, such as 1,2.") from None


def named(option: str, pairs: Sequence[str] | None) -> dict[str, str]:
    """NAME=VALUE, some times, as a dictionary."""
    found = {}
    for pair in pairs or ():
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise HotLoraError(f"{option} {pair} is not NAME=VALUE: give it as in {option} gsm8k=data/gsm8k.")
        found[name] = value
    return found
