"""The command `bench`: the ways to train experts, timed side by side."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, err, number_list, of, out


def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A config.json, its folder, or nano. Weights are random.")
    ] = "nano",
    layers: Annotated[int | None, typer.Option(help="Cut the model to its first layers.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 2048,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence (default 2048, or what the model and --tokens allow).")
    ] = None,
    r: of("r") = 32,  # type: ignore[valid-type]
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (the config's own; float32 on a CPU that is slow in it), float32, bfloat16 or float16."
        ),
    ] = "auto",
    device: of("device") = "auto",  # type: ignore[valid-type]
    cv: Annotated[float, typer.Option(help="Skew routers until each layer's counts have this CV.")] = 1.0,
    contenders: Annotated[
        str,
        typer.Option(
            help="Of floor, hot, all, peft, loop, unsloth, axolotl, and the papers' methods (hellora, lori-s-pure, "
            "fft, …); with commas between."
        ),
    ] = "floor,hot,all,peft,loop,unsloth,axolotl",
    fractions: Annotated[str, typer.Option(help="Shares of experts that hot takes part with.")] = "0.125,0.25",
    rounds: Annotated[int, typer.Option(help="Timed steps of each contender.")] = 5,
    grow: Annotated[
        str | None, typer.Option(help="Time steps as one thing grows: tokens, experts, rank or layers.")
    ] = None,
    values: Annotated[str | None, typer.Option(help="Values of --grow (default: four up to the options' own).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result as JSON; with --grow a picture beside it.")
    ] = None,
    seed: of("seed") = 0,  # type: ignore[valid-type]
    as_json: AsJson = False,
) -> None:
    """Time LoRA on hot experts beside other ways, on this machine: one process each, step by step in turn.

    Prints medians (quartiles) and ratios to the floor, which adapts attention alone.
    """
    from ..base.files import atomic_path, write_json
    from ..bench.bench import BenchConfig, run_bench, run_growth
    from ..bench.report import growth_figure, summary_table

    config = BenchConfig(
        model=model,
        layers=layers,
        tokens=tokens,
        length=length,
        r=r,
        dtype=dtype,
        device=device,
        cv=cv,
        contenders=tuple(contenders.split(",")),
        fractions=number_list("fractions", fractions, float),
        rounds=rounds,
        seed=seed,
    )

    def tell(text: str) -> None:
        err.print(text)

    if grow is None:
        result = run_bench(config, tell=tell)
    else:
        result = run_growth(config, grow, None if values is None else number_list("values", values, int), tell=tell)
    result["command"] = shlex.join(["hotlora", *sys.argv[1:]])
    for run in result.get("runs", ()):
        run["command"] = result["command"]
    if output is not None:
        write_json(output, result)
        if grow is not None:
            with atomic_path(output.with_suffix(".png")) as picture:
                growth_figure(result).savefig(picture, dpi=150)
    if as_json:
        print(json.dumps(result))
        return
    for run in result.get("runs", [result]):
        out.print(summary_table(run))
    if output is not None:
        out.print(f"result: {output}")
