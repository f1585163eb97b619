"""The command `import`: a profile out of what others measured."""

from pathlib import Path
from typing import Annotated

import typer

from .options import out


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            help="Files of one form, which add up: counts or saliency (JSON), routed experts of vLLM or SGLang or "
            "router_logits (.npy, .npz, .safetensors, .json, .jsonl), or ESFT's; or a folder of them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .safetensors file or a folder; a .json file: scores alone.")
    ] = Path("profile.safetensors"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="A config.json, its folder, a name on the Hub, or nano: no weights are read."
        ),
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="Of a layer, where neither --model nor a file says.")] = None,
    num_experts_per_tok: Annotated[int | None, typer.Option(help="Of a token, where neither says.")] = None,
) -> None:
    """Make a profile from routing that was measured elsewhere: no model is run.

    Production traffic can choose the experts: `hotlora import routed.npy --model MODEL`, then `hotlora plan`. Scores
    beside the counts are written beside the profile, for --rule scores.
    """
    from ..routing.imported import imported, imported_scores

    sizes = (model, num_experts, num_experts_per_tok)
    if output.suffix == ".json":
        told, written = imported_scores(files, output, *sizes)
    else:
        profile, told, written = imported(files, output, *sizes)
        if model is None:
            told += "; not bound to a model: give --model to have layers and experts checked"
    out.print(told)
    for path in written:
        out.print(f"scores, for --rule scores --scores: {path}")
    if output.suffix != ".json":
        out.print(f"mean layer CV {profile.mean_layer_cv():.2f}, global CV {profile.global_cv():.2f}")
        out.print(f"profile: {output}")
