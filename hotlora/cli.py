"""The command line: each command is one call into the library. Heavy imports wait until a command runs."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from .errors import HotLoraError

app = typer.Typer(
    name="hotlora",
    help="Fine-tune Mixture-of-Experts language models where they already work: LoRA on the experts a task really "
    "uses. Start with `hotlora demo`, or `hotlora train --model MODEL --data FILE.jsonl`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
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
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where the results go.")]
Dtype = Annotated[str, typer.Option(help="auto: the checkpoint's own on a GPU, float32 on the CPU.")]
Device = Annotated[str, typer.Option(help="auto: cuda if there is one, else the CPU.")]
Limit = Annotated[int | None, typer.Option(help="Use at most so many examples, drawn by the seed.")]
BatchSize = Annotated[int, typer.Option(help="Sequences in a batch.")]
MaxLength = Annotated[int, typer.Option(help="Tokens in an example; longer ones are cut.")]
Rule = Annotated[str, typer.Option(help="How experts are chosen: hot, all, random or cold.")]
Fraction = Annotated[float | None, typer.Option(help="Share of each layer's experts to adapt (default 0.25).")]
ExpertsPerLayer = Annotated[int | None, typer.Option(help="Their number, in place of --fraction.")]
Signal = Annotated[str, typer.Option(help="What ranks experts: count (assignments) or mass (gate weights).")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Rank = Annotated[int, typer.Option("--r", help="Rank of every adapter.")]
Alpha = Annotated[int, typer.Option("--lora-alpha", help="Scaling is lora_alpha / r.")]
Attention = Annotated[bool, typer.Option("--train-attention/--no-attention", help="Adapt q, k, v, o.")]
Router = Annotated[bool, typer.Option("--train-router/--no-router", help="Adapt the router.")]
Shared = Annotated[bool, typer.Option("--train-shared/--no-shared", help="Adapt shared experts, where there are any.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(value: bool) -> None:
    if value:
        print(f"hotlora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="nano-math, nano-sql or nano-choice.")] = "nano-math",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where runs and page go.")] = Path("runs/demo"),
    seed: Seed = 0,
) -> None:
    """See the whole way in a few minutes, on the embedded model: no network and no GPU needed.

    Profiles nano's router on a task, trains LoRA on all experts, on the hot 25%, on as many random ones and on as
    many cold ones, evaluates each and the base model, and writes one page. Run again, it goes on where it stopped.
    """
    from .demo import run_demo

    run_demo(task, output, seed=seed, console=out)


@app.command()
def profile(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors file or a folder.")] = Path(
        "profile.safetensors"
    ),
    limit: Limit = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Watch which experts the router uses on the data: one pass without gradients."""
    from .data import load_examples
    from .models import load_model, load_tokenizer
    from .train import profile_data

    tokenizer = load_tokenizer(model)
    examples = load_examples(data, "train", limit=limit, seed=seed, tokenizer=tokenizer)
    base = load_model(model, dtype=dtype, device=device)
    result = profile_data(base, tokenizer, examples, data, model, batch_size=batch_size, max_length=max_length)
    result.save(output)
    table = Table(title=f"Routing of {model} on {data}: {result.num_tokens:,} tokens")
    for column in ("layer", "CV", "cold experts", "coverage of the top 25%", "entropy"):
        table.add_column(column, justify="right")
    rows = zip(
        result.layers,
        result.layer_cv(),
        result.cold_share(),
        result.coverage(fraction=0.25),
        result.entropy(),
        strict=True,
    )
    for layer, cv, cold, coverage, entropy in rows:
        table.add_row(str(layer), f"{cv:.2f}", f"{cold:.0%}", f"{coverage:.0%}", f"{entropy:.3f}")
    out.print(table)
    out.print(f"mean layer CV {result.mean_layer_cv():.2f}, global CV {result.global_cv():.2f}")
    out.print(f"profile: {output}")


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="A profile.safetensors, or the folder that holds it.")],
    rule: Rule = "hot",
    fraction: Fraction = None,
    experts_per_layer: ExpertsPerLayer = None,
    signal: Signal = "count",
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .json file or a folder.")] = Path("plan.json"),
) -> None:
    """Choose the experts to adapt, from a profile. The file can be edited by hand."""
    from .plan import select_experts
    from .routing import RoutingProfile

    chosen = select_experts(
        RoutingProfile.load(profile),
        rule=rule,
        fraction=fraction,
        experts_per_layer=experts_per_layer,
        signal=signal,
        seed=seed,
    )
    chosen.save(output)
    kept = sum(map(len, chosen.experts.values()))
    total = chosen.num_experts * len(chosen.experts)
    out.print(f"{rule}: {kept} of {total} experts in {len(chosen.experts)} layers; plan: {output}")


@app.command()
def params(
    config: Annotated[str, typer.Argument(help="A model's config.json, its folder, or nano.")],
    experts_per_layer: ExpertsPerLayer = None,
    fraction: Fraction = None,
    r: Rank = 32,
    train_attention: Attention = True,
    train_router: Router = True,
    train_shared: Shared = True,
    as_json: AsJson = False,
) -> None:
    """Count what would be trained, from a model's config.json alone; no weights are read."""
    from .adapter import parameters_from_config

    counts = parameters_from_config(
        config,
        experts_per_layer=experts_per_layer,
        fraction=fraction,
        r=r,
        train_attention=train_attention,
        train_router=train_router,
        train_shared=train_shared,
    )
    if as_json:
        print(json.dumps(counts))
        return
    table = Table(title=f"Trainable parameters at rank {r}")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part in ("attention", "router", "shared", "experts"):
        table.add_row(part, f"{counts[part]:,}")
    table.add_section()
    table.add_row("trainable", f"{counts['trainable']:,}")
    table.add_row("with the frozen base", f"{counts['total']:,}")
    table.add_row("share", f"{counts['percent']:.4f}%")
    out.print(table)


def main() -> None:
    """The entry point: a user's mistake is one message and exit code 1, never a traceback."""
    try:
        app()
    except HotLoraError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True, markup=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("stopped; run the same words again to go on")
        sys.exit(130)
