"""The command `verify`: whether an engine applies an exported adapter."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from ..runs.options import LoadOptions
from .options import AsJson, options_of, out

if TYPE_CHECKING:
    from ..engines.verdict import PartVerdict, Verdict
    from ..engines.verify import Verification

_NAMED = 6
"""layers that are named in a row"""


@options_of(LoadOptions, only=("device",))
def verify(
    export: Annotated[Path, typer.Argument(help="What hotlora export wrote.", show_default=False)],
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="What it was exported from: a run, or an adapter.")],
    engine: Annotated[str, typer.Option("--engine", "-e", help="transformers, peft, vllm, sglang, llama.cpp or mlx.")],
    python: Annotated[
        Path | None, typer.Option(help="The Python of the environment that has the engine (default: this one).")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base (default: what the adapter notes).")
    ] = None,
    engine_base: Annotated[
        Path | None, typer.Option(help="The base in the engine's own format: llama.cpp's .gguf file.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Take texts from a task or rows (default: random tokens).")
    ] = None,
    num_texts: Annotated[
        int, typer.Option("--texts", help="At least so many; more tell more experts apart where the engine rounds.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of random tokens.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="What the engine computes in: float32, bfloat16 or float16; auto: float32 on the CPU, else the "
            "checkpoint's own."
        ),
    ] = "auto",
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Load an export in an engine, and find out whether the adapter is really applied, expert by expert.

    The engine may be in an environment of its own (--python), which needs no hotlora. The exit code is 0 where the
    engine gives the adapted model's answers, and 1 where it does not.
    """
    from ..engines.verify import verify_export

    found = verify_export(
        export, adapter, engine=engine, python=python, model=model, engine_base=engine_base, data=data,
        num_texts=num_texts, dtype=dtype, seed=seed, **given,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        out.print(_table(found))
        out.print(_last_word(found.verdict))
    if not found.is_applied:
        raise typer.Exit(1)


def _table(found: "Verification") -> Table:
    verdict = found.verdict
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("engine", f"{versions}; {found.dtype} on {found.device}")
    if found.note:
        table.add_row("", found.note)
    table.add_row(
        "base",
        f"log-probabilities differ by {verdict.base_mean:.1e} nats on average, {verdict.base_max:.1e} at most "
        f"({found.num_texts} texts, {verdict.compared:,} numbers)",
    )
    rest = "" if verdict.unexplained >= 0.9 * verdict.difference else f", {verdict.unexplained:.1e} of it unexplained"
    table.add_row(
        "adapter",
        f"changes them by {verdict.effect:.1e} (root mean square) in our model; the engine's change differs from that "
        f"by {verdict.difference:.1e}{rest}",
    )
    experts = [part for part in verdict.parts if isinstance(part.part, tuple)]
    layers = [part for part in verdict.parts if isinstance(part.part, int)]
    for what, found_of, named in (("experts", experts, _places), ("layers", layers, _layers)):
        for status in dict.fromkeys(part.status for part in sorted(found_of, key=lambda part: part.status)):
            its = [part for part in found_of if part.status == status]
            where = "" if status == "applied" else named(its)
            table.add_row(f"{what} {status}", f"{len(its)} of {len(found_of)}{where}")
    for part in verdict.parts:
        if isinstance(part.part, str):
            told = "" if part.share is None else f" (share {part.share:.2f}{_error(part)})"
            table.add_row(part.part, part.status + told)
    return table


def _error(part: "PartVerdict") -> str:
    return f" ± {part.error:.2f}" if part.error is not None and part.error >= 0.005 else ""


def _places(parts: "list[PartVerdict]") -> str:
    """Which experts, by layer."""
    layers: dict[int, list[str]] = {}
    for part in parts:
        layer, expert = cast("tuple[int, int]", part.part)
        layers.setdefault(layer, []).append(f"{expert}{_share(part)}")
    told = [f"layer {layer}: {', '.join(experts)}" for layer, experts in list(layers.items())[:_NAMED]]
    more = f"; and in {len(layers) - _NAMED} layers more (--json has all)" if len(layers) > _NAMED else ""
    return f": {'; '.join(told)}{more}"


def _layers(parts: "list[PartVerdict]") -> str:
    return ": " + ", ".join(f"{part.part}{_share(part)}" for part in parts)


def _share(part: "PartVerdict") -> str:
    return f" ({part.share:.2f})" if part.status == "in part" and part.share is not None else ""


def _last_word(verdict: "Verdict") -> str:
    if verdict.applied == "base differs":
        return "base differs: this engine's base is not the model that the adapter is for, so nothing is said of it"
    if verdict.applied == "cannot be told":
        return "cannot be told: the adapter's whole effect is below the engine's rounding (use float32, or --data)"
    if verdict.scale is not None:
        return f"applied: {verdict.applied}, as if the whole adapter had {verdict.scale:.2f} times its scale"
    if verdict.applied == "partly":
        return f"applied: partly, {verdict.share:.0%} of the whole effect"
    untold = sum(
        part.status in ("cannot be told", "not reached") for part in verdict.parts if isinstance(part.part, tuple)
    )
    more = f", as a whole; of {untold} experts alone it cannot be told (docs/verify.md)" if untold else ""
    return f"applied: {verdict.applied}{more}"
