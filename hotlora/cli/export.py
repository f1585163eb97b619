"""The commands that make something else of saved adapters: `merge`, `export` and `combine`; and `push`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import HotLoraError
from ..runs.options import LoadOptions
from .options import number_list, options_of, out
from .saved import Base, noted

if TYPE_CHECKING:
    from ..adapter.formats.room import Room


@options_of(LoadOptions, only=("on_top_of", "device", "offload", "offload_folder"))
def merge(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the merged model.")],
    model: Base = None,
    dtype: Annotated[str, typer.Option(help="auto: the base checkpoint's own.")] = "auto",
    **given: Any,
) -> None:
    """Fold an adapter into its base model: a plain checkpoint that any engine loads."""
    from ..runs.export import export_saved

    model, adapter = noted(adapter, model)
    export_saved(model, adapter, output, format="merged", dtype=dtype, **given)
    _describe(output, "merged", model, [adapter])
    out.print(f"merged model: {output}")
    _tell_of_quantization(adapter)


@options_of(LoadOptions, only=("on_top_of", "device", "offload", "offload_folder"))
def export(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the export.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="vllm, sglang, sglang-shared, peft, gguf, mlx or merged.")
    ],
    model: Base = None,
    merge_router: Annotated[
        bool,
        typer.Option("--merge-router", help="vllm, sglang: write a base model with the routers' updates in it, too."),
    ] = False,
    drop_router: Annotated[
        bool,
        typer.Option("--drop-router", help="vllm, sglang: leave the routers' updates out; answers then differ."),
    ] = False,
    merge_attention: Annotated[
        bool,
        typer.Option(
            "--merge-attention", help="vllm, gguf, mlx: what the engine does not apply of MLA goes there, too."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto: the base checkpoint's own.")] = "auto",
    **given: Any,
) -> None:
    """Write an adapter in the format of an engine, or of plain PEFT.

    vllm and sglang cannot hold a router's update: choose --merge-router or --drop-router, or train with --no-router.
    sglang-shared is for what was trained with --share-a.
    vllm and mlx apply no update to MLA's kv_b_proj, llama.cpp (gguf) to most of MLA: --merge-attention.

    `hotlora verify` loads the export in the engine, and finds out whether it is applied.
    """
    from ..adapter.formats.export import adapter_in
    from ..report.card import size_told
    from ..runs.export import export_saved, served_room

    model, adapter = noted(adapter, model)
    export_saved(
        model, adapter, output, format=format, merge_router=merge_router, drop_router=drop_router,
        merge_attention=merge_attention, dtype=dtype, **given,
    )  # fmt: skip
    room = served_room(model, output, format=format, dtype=dtype)
    card = _describe(output, format, model, [adapter], room, drop_router)
    out.print(f"{format}: {output}")
    out.print(f"how to use it: {card}")
    if format != "merged":
        out.print(size_told(adapter_in(output), room))
    if merge_router or merge_attention:
        out.print(f"serve {output / 'base'} with the adapter {output / 'adapter'}")
    _tell_of_quantization(adapter)


@options_of(LoadOptions, only=("on_top_of", "device"))
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Two runs' folders, or saved adapters, or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the adapter.")],
    model: Base = None,
    weights: Annotated[str | None, typer.Option(help="One for each adapter, with commas between (default 1).")] = None,
    how: Annotated[
        str,
        typer.Option(
            help="cat: the exact sum, at the sum of the ranks; linear: sums of the factors; ties, dare_linear, "
            "dare_ties, magnitude_prune: PEFT's sums of pruned factors."
        ),
    ] = "cat",
    density: Annotated[
        float | None, typer.Option(help="Share of each factor that ties and its like keep (default 0.5).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of DARE's draws.")] = 0,
    **given: Any,
) -> None:
    """Make one adapter out of several tasks'. Its experts are all of theirs."""
    from ..runs.export import combine_saved, shared_experts

    numbers = None if weights is None else number_list("weights", weights, float)
    found = [noted(adapter, model) for adapter in adapters]
    if len(bases := dict.fromkeys(base for base, _ in found)) > 1:
        raise HotLoraError(f"the adapters are of {' and '.join(bases)}: if these are one model, give it (--model).")
    parts = [adapter for _, adapter in found]
    combine_saved(found[0][0], parts, output, weights=numbers, how=how, density=density, seed=seed, **given)
    _describe(output, "combined", found[0][0], parts)
    for told in shared_experts(parts):
        out.print(told)
    out.print(f"adapter: {output}")


def push(
    run: Annotated[Path, typer.Argument(help="A run's folder, a saved adapter, an export or a merged model.")],
    name: Annotated[str, typer.Argument(help="NAME or OWNER/NAME on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Of a repository that is made now; one that is there stays so.")
    ] = True,
) -> None:
    """Push what was trained to the Hub: weights, config, model card and tokenizer, and nothing else of the run.

    Log in before: `hf auth login`, or HF_TOKEN in the environment.
    """
    from ..hf.hub import push as push_folder
    from ..report.card import write_card

    if (run / "run.json").is_file():
        write_card(run)
    address = push_folder(run, name, private=private)
    out.print(f"pushed: {address}{' (private)' if private else ''}")


def _describe(
    output: Path,
    format: str,
    model: str,
    adapters: list[Path],
    room: "Room | None" = None,
    dropped_router: bool = False,
) -> Path:
    from ..report.card import write_export_card

    return write_export_card(output, format, model, adapters, room, dropped_router)


def _tell_of_quantization(adapter: Path) -> None:
    from ..adapter.load import saved_config

    if found := saved_config(adapter).base_quantization:
        kept = " but the hot ones" if found.get("keep") else ""
        stored = [f"all experts{kept} in {found['bits']} bits"] if "bits" in found else []
        stored += [f"linear layers in {found['linear']} bits"] if "linear" in found else []
        if stored:  # packed experts are the same numbers as dense ones
            out.print(
                f"It was trained on a base with {' and '.join(stored)}, and is written for the base as it is: answers "
                "may differ a little, so evaluate it there.",
            )
