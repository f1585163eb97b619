"""The command `profile`: one data set's routing, or with --compare the study of several."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import api
from ..base.errors import DataError, HotLoraError
from ..runs.options import PROFILE_LEAVES, ProfileOptions
from .options import err, options_of, out


@options_of(ProfileOptions, leave=("model", *PROFILE_LEAVES))
def profile(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Data sets, as --data takes them; with --compare also profiles made before (.safetensors files).",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A folder, a name on the Hub, or nano.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="A task (nano-math, gsm8k, …), a task and its files (spider:DIR); a file or a folder of rows (JSONL, "
            "JSON, CSV, Parquet); or a Hub id (owner/name:split).",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Study several data sets: numbers, pictures and a page in a folder.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .safetensors file or a folder (default profile.safetensors); with --compare a folder (runs/study).",
        ),
    ] = None,
    **given: Any,
) -> None:
    """Watch which experts the router uses on the data: one pass without gradients.

    With several data sets and --compare: how skewed each is, by layer and depth, how the hot experts overlap, and how
    robust they are, beside what MoE-Sieve published.
    """
    chosen = [*(sources or ()), *(data or ())]
    if not chosen:
        raise typer.BadParameter("give a data set", param_hint="--data")
    if compare:
        if given.pop("expert_parallel", 1) != 1:
            raise HotLoraError("--compare profiles in one process: leave --expert-parallel out.")
        if given.pop("profile_until", 1) != 1 or given.pop("saliency", False):
            raise HotLoraError(
                "--compare reads all of the data (with --limit so much of it), by count and mass: leave "
                "--profile-until and --saliency out."
            )
        _compare(chosen, model, output or Path("runs/study"), given)
        return
    if len(chosen) > 1:
        raise DataError(f"{', '.join(chosen)} are {len(chosen)} data sets: add --compare to study them together.")
    if model is None:
        raise typer.BadParameter("give the model to profile", param_hint="--model")
    output = output or Path("profile.safetensors")
    from ..base.processes import is_main

    (source,) = chosen
    result = api.profile(model, source, output, **given)
    if not is_main():
        return
    table = Table(title=f"Routing of {model} on {source}: {result.num_tokens:,} tokens")
    for column in ("layer", "CV", "cold experts", "coverage of the top 25%", "entropy"):
        table.add_column(column, justify="right")
    columns = (result.layer_cv(), result.cold_share(), result.coverage(fraction=0.25), result.entropy())
    rows = zip(result.layers, *columns, strict=True)
    for layer, cv, cold, coverage, entropy in rows:
        table.add_row(str(layer), f"{cv:.2f}", f"{cold:.0%}", f"{coverage:.0%}", f"{entropy:.3f}")
    out.print(table)
    out.print(f"mean layer CV {result.mean_layer_cv():.2f}, global CV {result.global_cv():.2f}")
    out.print(f"profile: {output}")


def _compare(sources: list[str], model: str | None, output: Path, given: dict[str, Any]) -> None:
    from ..base.files import check_writable
    from ..report.study_report import write_study
    from ..runs.study import run_study

    check_writable(output / "study.md")

    def tell(text: str) -> None:
        err.print(text)

    reading: dict[str, Any] = {
        name: given.pop(name) for name in ("train_on", "columns", "apply_chat_template") if name in given
    }
    result, profiles = run_study(sources, model, tell=tell, reading=reading, **given)
    page = write_study(result, profiles, output, shlex.join(["hotlora", *sys.argv[1:]]))
    table = Table(title=f"Routing of {result['model']['name']} on {len(profiles)} data sets")
    table.add_column("data set", no_wrap=True)
    columns = ("tokens", "CV", "global", "ratio", "cold", "covered", "sample")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in result["datasets"].items():
        stable = f"{row['stability']['mean']:.2f}" if "stability" in row else "–"
        table.add_row(
            name, f"{row['tokens']:,}", f"{row['layer_cv']:.2f}", f"{row['global_cv']:.2f}", f"{row['ratio']:.1f}",
            f"{row['cold_share']:.0%}", f"{row['coverage']:.0%}", stable,
        )  # fmt: skip
    out.print(table)
    out.print(f"page: {page}")
