"""The command line: each command is one call into the library. Heavy imports wait until a command runs."""

import dataclasses
import json
import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import __version__
from .cli_measure import bench, params
from .cli_options import (
    Alpha,
    AsJson,
    Attention,
    BatchSize,
    Data,
    Device,
    Dtype,
    ExpertsPerLayer,
    Fraction,
    Limit,
    MaxLength,
    Model,
    Quantize,
    Rank,
    Router,
    Rule,
    Seed,
    Shared,
    Signal,
    err,
    out,
)
from .config import PROFILE_FRACTION, TrainConfig
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
DEFAULTS = TrainConfig()


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
    train_attention: Attention = True,
    train_router: Router = True,
) -> None:
    """See the whole way in a few minutes, on the embedded model: no network and no GPU needed.

    Profiles nano's router on a task, trains LoRA on all experts, on the hot 25%, on as many random ones and on as
    many cold ones, evaluates each and the base model, and writes one page. Run again, it goes on where it stopped.
    """
    from .demo import CONFIG, run_demo

    config = dataclasses.replace(CONFIG, seed=seed, train_attention=train_attention, train_router=train_router)
    run_demo(task, output, config=config, console=out)


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
    quantize: Quantize = None,
) -> None:
    """Watch which experts the router uses on the data: one pass without gradients."""
    from .data import load_examples
    from .models import load_model, load_tokenizer
    from .quantize import experts_in
    from .run import profile_data

    tokenizer = load_tokenizer(model)
    examples = load_examples(data, "train", limit=limit, seed=seed, tokenizer=tokenizer)
    base = load_model(model, dtype=dtype, device=device, quantization_config=experts_in(quantize))
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
def train(
    model: Model,
    data: Data,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder (default runs/MODEL-DATA-RULE-SEED).")
    ] = None,
    rule: Rule = "hot",
    fraction: Fraction = None,
    experts_per_layer: ExpertsPerLayer = None,
    signal: Signal = "count",
    profile: Annotated[
        Path | None, typer.Option(rich_help_panel="Which experts", help="Use this profile; none is made.")
    ] = None,
    profile_fraction: Annotated[
        float,
        typer.Option(rich_help_panel="Which experts", help="Share of the training data to profile the router on."),
    ] = PROFILE_FRACTION,
    plan: Annotated[
        Path | None, typer.Option(rich_help_panel="Which experts", help="Use this plan; no profile is made.")
    ] = None,
    test_data: Annotated[str | None, typer.Option(help="Held-out data; a task has its own.")] = None,
    limit: Limit = None,
    test_limit: Annotated[int | None, typer.Option(help="The same for the held-out data.")] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Score a task after training.")] = True,
    epochs: Annotated[float, typer.Option(rich_help_panel="Training", help="Passes over the data.")] = DEFAULTS.epochs,
    max_steps: Annotated[
        int | None, typer.Option(rich_help_panel="Training", help="Optimizer steps, in place of --epochs.")
    ] = None,
    batch_size: BatchSize = DEFAULTS.batch_size,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(rich_help_panel="Training", help="Batches added up for one step.")
    ] = DEFAULTS.gradient_accumulation_steps,
    learning_rate: Annotated[
        float, typer.Option(rich_help_panel="Training", help="Peak rate of AdamW.")
    ] = DEFAULTS.learning_rate,
    lr_scheduler: Annotated[
        str, typer.Option(rich_help_panel="Training", help="constant, constant_with_warmup, linear or cosine.")
    ] = DEFAULTS.lr_scheduler,
    warmup: Annotated[
        float, typer.Option(rich_help_panel="Training", help="Share of the steps in which the rate rises.")
    ] = DEFAULTS.warmup,
    weight_decay: Annotated[
        float, typer.Option(rich_help_panel="Training", help="AdamW's decay.")
    ] = DEFAULTS.weight_decay,
    max_length: MaxLength = DEFAULTS.max_length,
    packing: Annotated[
        bool, typer.Option("--packing", rich_help_panel="Training", help="Several examples in one row.")
    ] = False,
    save_steps: Annotated[
        int, typer.Option(rich_help_panel="Training", help="Steps between checkpoints.")
    ] = DEFAULTS.save_steps,
    seed: Seed = DEFAULTS.seed,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", rich_help_panel="Training", help="Less memory, slower.")
    ] = False,
    aux_loss_coef: Annotated[
        float, typer.Option(rich_help_panel="Training", help="Weight of the router's balancing loss; 0 is off.")
    ] = DEFAULTS.aux_loss_coef,
    r: Rank = DEFAULTS.r,
    lora_alpha: Alpha = DEFAULTS.lora_alpha,
    lora_dropout: Annotated[
        float, typer.Option(rich_help_panel="Adapter", help="Dropout before A.")
    ] = DEFAULTS.lora_dropout,
    train_attention: Attention = True,
    train_router: Router = True,
    train_shared: Shared = True,
    report_to: Annotated[
        str, typer.Option(rich_help_panel="Training", help="Also send metrics to: wandb, trackio, …")
    ] = DEFAULTS.report_to,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
) -> None:
    """Profile the router, choose experts, train their adapter, evaluate. Run again to go on after a stop.

    `hotlora train --model MODEL --data FILE.jsonl` is enough: hot experts, a quarter of each layer's.
    """
    from .run import run_training

    options = locals()
    config = TrainConfig(**{f.name: options[f.name] for f in dataclasses.fields(TrainConfig) if f.name in options})
    output = output or Path("runs") / "-".join(_slug(part) for part in (model, data, rule, f"seed{seed}"))
    err.print(f"training {model} on {data} into {output}", highlight=False)
    record = run_training(
        model,
        data,
        output,
        config=config,
        rule=rule,
        fraction=fraction,
        experts_per_layer=experts_per_layer,
        signal=signal,
        profile=profile,
        profile_fraction=profile_fraction,
        plan=plan,
        test_data=test_data,
        limit=limit,
        test_limit=test_limit,
        evaluate=evaluate,
        dtype=dtype,
        device=device,
        quantize=quantize,
        progress=True,
    )
    _print_run(record, output)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option("--data", "-d", help="A task, or a task and its files (gsm8k:DIR).")],
    adapter: Annotated[Path | None, typer.Option(help="A saved adapter; none: the model as it is.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep run.json and every example's result here.")
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Score a model, or a model with an adapter, on a task's test split."""
    from .run import run_evaluation

    record, _ = run_evaluation(
        model,
        data,
        output,
        adapter=adapter,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        quantize=quantize,
        progress=True,
    )
    if as_json:
        print(json.dumps(record["evaluation"]))
    else:
        _print_evaluation(record, output)


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the merged model.")],
    dtype: Annotated[str, typer.Option(help="auto: the base checkpoint's own.")] = "auto",
    device: Device = "auto",
) -> None:
    """Fold an adapter into its base model: a plain checkpoint that any engine loads."""
    from .run import export_saved

    export_saved(model, adapter, output, format="merged", dtype=dtype, device=device)
    out.print(f"merged model: {output}", soft_wrap=True)


@app.command()
def export(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the export.")],
    format: Annotated[str, typer.Option("--format", "-f", help="vllm, sglang, peft or merged.")],
    merge_router: Annotated[
        bool,
        typer.Option("--merge-router", help="vllm, sglang: write a base model with the routers' updates in it, too."),
    ] = False,
    drop_router: Annotated[
        bool,
        typer.Option("--drop-router", help="vllm, sglang: leave the routers' updates out; answers then differ."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto: the base checkpoint's own.")] = "auto",
    device: Device = "auto",
) -> None:
    """Write an adapter in the format of a server, or of plain PEFT.

    vllm and sglang cannot hold a router's update: choose --merge-router or --drop-router, or train with --no-router.
    """
    from .run import export_saved

    export_saved(
        model,
        adapter,
        output,
        format=format,
        merge_router=merge_router,
        drop_router=drop_router,
        dtype=dtype,
        device=device,
    )
    out.print(f"{format}: {output}", soft_wrap=True)
    if merge_router:
        out.print(f"serve {output / 'base'} with the adapter {output / 'adapter'}", soft_wrap=True)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="A folder with runs in it.")] = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes (default: into RUNS).")
    ] = None,
) -> None:
    """Make one page with tables and pictures from the runs' records alone."""
    from .records import find_records
    from .report import conditions_table, write_report

    page = write_report(runs, output or runs)
    out.print(conditions_table(find_records(runs)))
    out.print(f"page: {page}", soft_wrap=True)


def _slug(text: str) -> str:
    """The last part of a name or path, fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", Path(text.rstrip("/")).stem if "/" in text else text).strip("_.") or "x"


def _print_evaluation(record: dict[str, Any], output: Path | None) -> None:
    for task, result in (record.get("evaluation") or {}).items():
        out.print(
            f"{task}: {result['metric']} {result['accuracy']:.1%} "
            f"(95% {result['ci_low']:.1%} to {result['ci_high']:.1%}, n = {result['n']})",
            highlight=False,
        )
        if output is not None:
            out.print(f"  every example: {output / result['results']}", highlight=False, soft_wrap=True)


def _print_run(record: dict[str, Any], output: Path) -> None:
    """What a run came to, and where everything lies."""
    parameters, training = record["parameters"], record["training"]
    out.print(
        f"{record['name']}: {parameters['trainable']:,} parameters trained ({parameters['percent']:.2f}%), "
        f"{training['steps']} steps, loss {training['loss_first']:.4f} → {training['loss_last']:.4f}, "
        f"{training['tokens_per_second']:,.0f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    if "test_loss" in training:
        before = f"{training['test_loss_before']:.4f} → " if "test_loss_before" in training else ""
        out.print(f"held-out response loss {before}{training['test_loss']:.4f}", highlight=False)
    _print_evaluation(record, output)
    for name, what in (("adapter", "adapter"), ("plan.json", "plan"), ("run.json", "record")):
        out.print(f"{what}: {output / name}", highlight=False, soft_wrap=True)
    out.print(f"pictures: hotlora report {output}", highlight=False, soft_wrap=True)


app.command()(params)
app.command()(bench)


def main() -> None:
    """The entry point: a user's mistake is one message and exit code 1, never a traceback."""
    # PEFT imports it where it is installed, and it says that an optional kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except HotLoraError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("stopped; run the same words again to go on")
        sys.exit(130)
