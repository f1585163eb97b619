"""The command `train`, and how a run's outcome is printed."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import HotLoraError
from ..train.config import PROFILE_FRACTION, TrainConfig
from ..train.methods import METHODS, PLACEMENTS, resolve
from .options import (
    Alpha,
    Attention,
    BatchSize,
    Budget,
    Data,
    Device,
    Dtype,
    ExpertParallel,
    ExpertsPerLayer,
    Fillers,
    Fraction,
    KeepHot,
    Limit,
    MaxLength,
    Model,
    OnTopOf,
    Quantize,
    Rank,
    Router,
    Rule,
    Scores,
    Seed,
    Share,
    Shared,
    Signal,
    err,
    out,
)

DEFAULTS = TrainConfig()


def train(
    context: typer.Context,
    model: Model,
    data: Data,
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
            help="A method with its paper's hyperparameters: METHOD-math, -code or -safety, sieve, esft-token or "
            "esft-gate. Options given beside it come first.",
        ),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Method",
            help=f"{', '.join(PLACEMENTS)}: all that the method adapts; experts and router; experts alone.",
        ),
    ] = None,
    warmup: Annotated[
        str,
        typer.Option(
            rich_help_panel="Method", help="lora: profile after a short LoRA on all experts (HELLoRA); or none."
        ),
    ] = "none",
    on_top_of: OnTopOf = None,
    rule: Rule = "hot",
    fraction: Fraction = None,
    experts_per_layer: ExpertsPerLayer = None,
    p: Share = None,
    budget: Budget = None,
    fillers: Fillers = None,
    scores: Scores = None,
    signal: Signal = "count",
    plan_seed: Annotated[
        int | None,
        typer.Option(rich_help_panel="Which experts", help="Of rules that draw (default: --seed, a new draw each)."),
    ] = None,
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
    reprofile_every: Annotated[
        int | None,
        typer.Option(rich_help_panel="Which experts", help="Profile and choose again after every so many steps."),
    ] = None,
    reprofile_left: Annotated[
        str,
        typer.Option(
            rich_help_panel="Which experts", help="What experts that are not chosen again had learned: drop or merge."
        ),
    ] = "drop",
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
    warmup_ratio: Annotated[
        float, typer.Option(rich_help_panel="Training", help="Share of the steps in which the rate rises.")
    ] = DEFAULTS.warmup_ratio,
    weight_decay: Annotated[
        float, typer.Option(rich_help_panel="Training", help="AdamW's decay.")
    ] = DEFAULTS.weight_decay,
    adam_beta2: Annotated[
        float, typer.Option(rich_help_panel="Training", help="Decay of AdamW's second moment.")
    ] = DEFAULTS.adam_beta2,
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
    use_rslora: Annotated[
        bool, typer.Option("--rslora", rich_help_panel="Adapter", help="Scale by lora_alpha over the root of r.")
    ] = False,
    use_dora: Annotated[
        bool, typer.Option("--dora", rich_help_panel="Adapter", help="A magnitude for each output, too.")
    ] = False,
    lora_fa: Annotated[
        bool, typer.Option("--lora-fa", rich_help_panel="Adapter", help="Freeze A; its seed is saved in its place.")
    ] = False,
    a_seed: Annotated[int | None, typer.Option(rich_help_panel="Adapter", help="Of a frozen A (default 0).")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(rich_help_panel="LoRI", help="lori-s: train the entries of this mask; no dense run comes first."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(rich_help_panel="LoRI", help="Share of B that trains (lori-s: 0.1).")
    ] = None,
    granularity: Annotated[
        str,
        typer.Option(
            rich_help_panel="LoRI", help="The largest of what are kept: model, module, projection, layer or matrix."
        ),
    ] = "model",
    dense_learning_rate: Annotated[
        float | None, typer.Option(rich_help_panel="LoRI", help="Of the dense run (default: the same).")
    ] = None,
    fresh_a: Annotated[
        bool, typer.Option("--fresh-a", rich_help_panel="LoRI", help="Another A than in the dense run.")
    ] = False,
    report_to: Annotated[
        str, typer.Option(rich_help_panel="Training", help="Also send metrics to: wandb, trackio, …")
    ] = DEFAULTS.report_to,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    keep_hot: KeepHot = False,
    expert_parallel: ExpertParallel = 1,
    preflight: Annotated[
        bool,
        typer.Option("--preflight/--no-preflight", help="Say first whether it fits into memory; stop if it cannot."),
    ] = True,
) -> None:
    """Profile the router, choose experts, train their adapter, evaluate. Run again to go on after a stop.

    `hotlora train --model MODEL --data FILE.jsonl` is enough: hot experts, a quarter of each layer's.

    Over several GPUs: `accelerate launch --config_file configs/fsdp2.yaml -m hotlora train …`, or torchrun.
    """
    from ..base.processes import is_main, start
    from ..runs.stages import run_method

    values = locals()
    given = {
        name: values[name]
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    if given.pop("lora_fa", False):
        given["train_a"] = False
    for name in ("model", "data", "output", "method", "preset", "placement", "preflight"):
        given.pop(name, None)
    options = resolve(method, preset=preset, placement=placement, **given)
    name = preset or options.get("condition") or rule
    output = output or Path("runs") / "-".join(_slug(part) for part in (model, data, name, f"seed{seed}"))
    start(device)
    if is_main():
        from ..train.checkpoints import last_complete

        last = last_complete(output / "checkpoints")
        resumed = f", resuming from {last.name}" if last else ""
        err.print(f"training {model} on {data} into {output}{resumed}", highlight=False)
    if preflight:
        _check_memory(model, options)
    record = run_method(model, data, output, progress=True, **options)
    if is_main():
        print_run(record, output)


def _check_memory(model: str, options: dict[str, Any]) -> None:
    """Says whether it fits; an error where it cannot. Of several processes the first one finds out, for all."""
    from ..base.processes import all_objects, is_main
    from ..cost.preflight import preflight

    found = all_objects(preflight(model, **options) if is_main() else None)[0]
    if found is None:
        return
    if found.is_hopeless:
        raise HotLoraError(f"{found} --no-preflight tries it all the same.")
    if is_main():
        err.print(str(found), style=None if found.fits else "yellow", highlight=False, markup=False)


def print_evaluation(record: dict[str, Any], output: Path | None) -> None:
    for task, result in (record.get("evaluation") or {}).items():
        out.print(
            f"{task}: {result['metric']} {result['accuracy']:.1%} "
            f"(95% {result['ci_low']:.1%} to {result['ci_high']:.1%}, n = {result['n']})",
            highlight=False,
        )
        passes = [f"{name} {value:.1%}" for name, value in result.items() if name.startswith("pass@")]
        if passes:
            out.print(f"  {', '.join(passes)}", highlight=False)
        if output is not None:
            out.print(f"  every example: {output / result['results']}", highlight=False, soft_wrap=True)


def print_run(record: dict[str, Any], output: Path) -> None:
    """What a run came to, and where everything lies."""
    parameters, training = record["parameters"], record["training"]
    if "warmup" in record:
        overlap = record["warmup"]["top_k"]
        out.print(
            f"warm-up: {overlap['jaccard']:.0%} of the {overlap['experts_per_layer']} hottest experts of a layer are "
            "the base model's (Jaccard)",
            highlight=False,
        )
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
    print_evaluation(record, output)
    for name, what in (
        ("adapter", "adapter"),
        ("model", "model"),
        ("mask.safetensors", "mask"),
        ("plan.json", "plan"),
        ("run.json", "record"),
    ):
        if (output / name).exists():
            out.print(f"{what}: {output / name}", highlight=False, soft_wrap=True)
    out.print(f"pictures: hotlora report {output}", highlight=False, soft_wrap=True)


def _slug(text: str) -> str:
    """The last part of a name or path, fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", Path(text.rstrip("/")).stem if "/" in text else text).strip("_.") or "x"
