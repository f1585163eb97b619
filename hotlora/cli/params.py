"""The command `params`: what would be trained, and what a step takes, from a model's config.json alone."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from ..base.errors import HotLoraError
from ..base.options import ALIASES
from ..runs.methods import METHODS, PLACEMENTS, counted_options, resolve
from ..runs.options import RunOptions
from .options import AsJson, of, options_of, out

_COUNTED = (
    "experts_per_layer", "r", "train_attention", "train_router", "train_shared", "share_a", "normalize_moe_lora",
)  # fmt: skip
_NOT_LORA = {"full", "use_dora", "train_full_experts", "perft"}
_OF_STEP = ("batch_size", "max_length")
_STORED = (
    "quantize", "keep_hot", "quantize_linear", "offload", "offload_folder", "optim", "gradient_checkpointing",
    "activation_offloading", "gradient_accumulation_steps",
)  # fmt: skip


@options_of(RunOptions, only=(*_COUNTED, *_OF_STEP, *_STORED, "fit"), aliases=ALIASES)
def params(
    model: Annotated[str, typer.Argument(metavar="CONFIG", help="A model's config.json, its folder, or nano.")],
    fraction: of(  # type: ignore[valid-type]
        "fraction",
        help="Share of each layer's experts to adapt (default: what --method says, or all of them; with --estimate and "
        "--fit 0.25, as train has it).",
    ) = None,
    method: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(METHODS)} (default: LoRA on what the budget says).")
    ] = None,
    placement: Annotated[
        str | None, typer.Option(help=f"{', '.join(PLACEMENTS)}: all; experts and router; experts alone.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", rich_help_panel="Estimate", help="Also a step's memory and time.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Estimate",
            help="What the step is to run on: cuda or cpu. It need not be here (default: cuda; with --fit auto what "
            "is here).",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            rich_help_panel="Estimate",
            help="Of the base: auto (the config's own; float32 with --device cpu), float32, bfloat16, float16.",
        ),
    ] = "auto",
    coverage: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Estimate",
            help="Share of the routing that the experts cover (default: as in a layer whose loads have a CV of 1).",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Estimate", help="What the machine gets through, in 10^12 FLOP/s: `hotlora bench` has it."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Estimate", help="RAM that --fit may offload to, as 64GiB (default: what is free here)."
        ),
    ] = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Count what would be trained, from a model's config.json alone; no weights are read.

    Beside them the adapter's own FLOPs; with --estimate also the memory of a training step by kind, its FLOPs, and its
    time at a given rate; with --fit what `hotlora train --fit` would choose. Both count the hot quarter of the
    experts, as train has it, where neither a budget nor a method is given.
    """
    from ..adapter.formats.room import places
    from ..cost.estimate import device_of
    from ..routing.plan import DEFAULT_FRACTION

    fit = given.pop("fit", None)
    if host is not None and fit is None:
        raise HotLoraError("--host is for --fit: give --fit, too.")
    _check_stored(model, given)
    if not estimate and fit is None:
        own = {"device": device, "tflops": tflops, "dtype": None if dtype == "auto" else dtype}
        _check_counted(
            [name for name in (*_OF_STEP, *_STORED) if name in given] + [n for n in own if own[n] is not None]
        )
    if device not in (None, "auto") and device_of(device).type not in ("cuda", "cpu"):
        raise HotLoraError(f"device is {device!r}: give cuda or cpu.")
    options = {"fraction": fraction, **{name: given[name] for name in _COUNTED if name in given}}
    foresees, has_budget = estimate or fit is not None, fraction is not None or "experts_per_layer" in given
    is_default = foresees and not has_budget and method is None
    if is_default:
        options["fraction"] = DEFAULT_FRACTION
    counts: dict[str, Any] = {"fraction": DEFAULT_FRACTION} if is_default else {}
    run = None
    if foresees:
        where = device or ("auto" if fit == "auto" else "cuda")
        run = _run(model, method, placement, fit=fit, device=where, dtype=dtype, **given | options)
    try:
        named = counted_options(method, placement)
    except HotLoraError as error:
        if run is None:
            raise
        counts["not_counted"] = str(error)
    else:
        if has_budget:
            if named.get("full") or named.get("perft") in ("R", "D"):
                budget = "--experts-per-layer" if fraction is None else "--fraction"
                raise HotLoraError(f"method {method!r} chooses no experts: leave {budget} out.")
            named = {name: value for name, value in named.items() if name not in ("experts_per_layer", "fraction")}
        named = {name: value for name, value in named.items() if name not in given}
        counts |= _counted(model, method, {**options, **named}, named.keys() & _NOT_LORA, coverage)
    rooms = {}
    if "adapter_flops" in counts:
        rooms = places(model, given.get("r", RunOptions.r), share_a=given.get("share_a", False))
        counts["server_bytes"] = {format: room.place_bytes for format, room in rooms.items()}
    if run is not None:
        if fit is not None:
            run, counts["fit"] = _fitted(run, given, host)
        counts["estimate"] = _estimated(run, coverage, tflops)
    if as_json:
        print(json.dumps(counts))
        return
    if is_default:
        out.print(
            f"Experts: the hottest {DEFAULT_FRACTION:.0%} of each layer's, as `hotlora train` has it by default "
            "(--fraction 1: all)"
        )
    _print_counts(counts, method, given, rooms)
    if run is not None:
        _print_step(counts["estimate"], run)
    for line in counts.get("fit", {}).get("told", ()):  # last: it is what was asked for
        out.print(line)


def _check_counted(given: Sequence[str]) -> None:
    """HotLoraError: options that no count of parameters reads."""
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        change = "changes" if len(given) == 1 else "change"
        raise HotLoraError(f"{flags} {change} what a step takes, not what is trained: give --estimate or --fit, too.")


def _check_stored(model: str, given: Mapping[str, Any]) -> None:
    """ModelError: `train` would not quantize or offload this checkpoint so, as it is quantized already."""
    from ..adapter.quantize import experts_in
    from ..hf.models import check_packed, is_stored_quantized, model_from_config

    names = ("quantize", "quantize_linear", "offload")
    if not given.keys() & set(names) or not is_stored_quantized(model):
        return
    bits, linear, offload = (given.get(name, getattr(RunOptions, name)) for name in names)
    stored = experts_in(bits, linear=linear, offload=offload != "none", offload_folder=given.get("offload_folder"))
    check_packed(model, model_from_config(model).config, stored, bits == 0)


def _run(model: str, method: str | None, placement: str | None, **given: Any) -> RunOptions:
    """What `hotlora train` would make of these. A budget is of hot experts, whatever the method's own rule.

    HotLoraError: a run that the estimate does not know.
    """
    from ..cost.preflight import UNKNOWN, unknown_to_estimate

    if any(given.get(name) is not None for name in ("fraction", "experts_per_layer")):
        given["rule"] = "hot"
    run = resolve(method, placement=placement, model=model, data="", **given)
    if reason := unknown_to_estimate(run):
        told = "--estimate" if run.fit is None else "--fit"
        known = ", ".join(name for name, changes in METHODS.items() if not changes.keys() & UNKNOWN.keys())
        raise HotLoraError(
            f"method {method!r} is {reason}, which {told} does not know: leave {told} out, or give one of {known}."
        )
    return run


def _counted(
    model: str, method: str | None, options: dict[str, Any], is_not_lora: Collection[str], coverage: float | None
) -> dict[str, Any]:
    """What is trained, and LoRA's FLOPs."""
    from ..adapter.count import parameters_from_config

    counts: dict[str, Any] = dict(parameters_from_config(model, **options))
    if is_not_lora and coverage is not None:
        raise HotLoraError(f"coverage is of LoRA's FLOPs, which {method} has none of: leave it out.")
    if not is_not_lora:
        counts["adapter_flops"] = _adapter_flops(model, options, counts, coverage)
    return counts


def _fitted(run: RunOptions, given: Collection[str], host: str | None) -> tuple[RunOptions, dict[str, Any]]:
    """The run with what `--fit` chooses, and what there is to say of it."""
    from ..base.sizes import parse_size
    from ..cost.fit import AUTO, fit

    elsewhere = None if AUTO in (run.fit, run.device) else run.device
    ram = None if host is None else parse_size("host", host)
    found = fit(run, given, host=ram, device=elsewhere, by_params=True)
    told = {"chosen": dict(found.chosen), "memory": dict(found.memory), "told": list(found.lines)}
    return found.options, told


def _estimated(run: RunOptions, coverage: float | None, tflops: float | None) -> dict[str, Any]:
    from ..cost.estimate import estimate
    from ..cost.preflight import estimated_options

    rate = None if tflops is None else tflops * 1e12
    return estimate(run.model, coverage=coverage, flops_per_second=rate, **estimated_options(run))


def _adapter_flops(
    model: str, options: dict[str, Any], counts: dict[str, Any], coverage: float | None
) -> dict[str, float]:
    """Of LoRA as placed by these options: a frozen or shared A or a mask saves none."""
    from ..adapter.count import parameters_from_config
    from ..cost.adapter import adapter_flops

    budget = {name: options.get(name) for name in ("experts_per_layer", "fraction")}
    saves_none = ("train_a", "keep", "share_a")
    if options.keys() & set(saves_none):
        plain = {name: value for name, value in options.items() if name not in saves_none}
        counts = dict(parameters_from_config(model, **plain))
    return adapter_flops(model, counts, coverage=coverage, **budget)


def _print_counts(
    counts: Mapping[str, Any], method: str | None, given: Mapping[str, Any], rooms: Mapping[str, Any]
) -> None:
    """What is trained, the adapter's FLOPs and the room that servers keep for it."""
    from ..report.text import human_bytes

    if "not_counted" in counts:
        out.print(f"Parameters are not counted: {counts['not_counted']}")
    else:
        rank = f"rank {given.get('r', RunOptions.r)}"
        rank += " (r / K in experts)" if given.get("normalize_moe_lora") else ""
        table = Table(title=f"Trainable parameters at {rank}" + (f", {method}" if method else ""))
        table.add_column("part")
        table.add_column("parameters", justify="right")
        for part in ("attention", "router", "shared", "experts"):
            table.add_row(part, f"{counts[part]:,}")
        table.add_section()
        table.add_row("trainable", f"{counts['trainable']:,}")
        table.add_row("with the frozen base", f"{counts['total']:,}")
        table.add_row("share", f"{counts['percent']:.4f}%")
        out.print(table)
    if flops := counts.get("adapter_flops"):
        told = f"{flops['per_token'] / 1e6:,.1f} MFLOP a token forward for the adapter"
        share = "" if flops["coverage"] == 1 else f", where its experts take {flops['coverage']:.1%} of the routing"
        out.print(f"{told}{share}")
        servers = [f"{name} {human_bytes(room.place_bytes)} ({room.option})" for name, room in rooms.items()]
        out.print(f"Served, each adapter takes in {next(iter(rooms.values())).dtype}: {', '.join(servers)}")


def _print_step(found: Mapping[str, Any], run: RunOptions) -> None:
    """The estimate of a step: memory by kind, FLOPs, and time where a rate was given."""
    from ..report.text import human_bytes, human_flops

    title = f"A step of {run.batch_size} × {run.max_length:,} tokens on {found['device']}, in {found['dtype']}"
    table = Table(title=title, min_width=len(title))
    table.add_column("memory")
    table.add_column("takes", justify="right")
    words = {"staging": "on its way", "host": "in RAM beside it", "disk": "mapped from disk beside it"}
    for kind, size in found["memory"].items():
        if kind == "total":
            table.add_section()
        if size or kind not in words:
            table.add_row(words.get(kind, kind), human_bytes(size))
    out.print(table)
    out.print(f"{human_flops(found['flops']['step'])} a step; adapted experts take {found['coverage']:.0%}")
    if "time" in found:
        time = found["time"]
        out.print(f"{time['seconds_per_step']:.3g} s a step, {time['tokens_per_second']:,.0f} tokens/s")
    elif run.fit is None:
        out.print("for seconds and tokens/s give --tflops, or --fit and a card's memory, such as --fit 24GB")
