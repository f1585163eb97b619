"""Saved adapters in other forms: another format, a merged checkpoint, one adapter of several."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..adapter.combine import check_weights
from ..adapter.formats.export import adapter_in, check_base, check_config, check_export, export_adapter
from ..adapter.formats.room import SERVERS, Room, room_of
from ..adapter.load import CONFIG_FILE, load_adapter, planned_experts, saved_config
from ..adapter.model import check_combined
from ..base.errors import HotLoraError
from ..base.files import atomic_folder, check_writable
from ..base.quiet import quiet
from ..hf.models import checkpoint_dtype, load_tokenizer, named_base, structure
from ..hf.stopping import save_stop_tokens, saved_stop_tokens
from .checks import check_adapters
from .folder import load_base, underneath
from .options import check_offload


def export_saved(
    model: str,
    adapter: str | Path,
    output: str | Path,
    *,
    format: str,
    on_top_of: Sequence[str | Path] = (),
    merge_router: bool = False,
    drop_router: bool = False,
    merge_attention: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    offload: str = "none",
    offload_folder: str | Path | None = None,
) -> Path:
    """`export.export_adapter` of a saved adapter; checkpoints that it writes get the base's tokenizer, and a
    plain PEFT adapter the one that lies beside the saved one.

    Args:
        on_top_of: saved adapters that are merged into the model, in this order, before; those that the adapter was
            trained on top of are merged by themselves.
        dtype: "auto" is the base checkpoint's own; sums are made in float32 at least.
        device: "auto" is the CPU: a base that trained in 4 bits, or offloaded, may not fit a GPU as it is written.
        offload, offload_folder: as in training: a model that is larger than the memory is merged in a mapped file.

    Raises:
        HotLoraError, FileError: as `export_adapter`; or the export would be an adapter alone, for a base that is
            nowhere.
        PlanError: the adapter is another model's.
    """
    check_export(format, output)  # before a model is loaded, which may take long
    check_offload(offload, offload_folder)
    config = saved_config(adapter)
    check_config(config, format, merge_router=merge_router, drop_router=drop_router)
    check_base(
        config, structure(model), format, merge_router=merge_router, drop_router=drop_router,
        merge_attention=merge_attention,
    )  # fmt: skip
    on_top_of = underneath(model, on_top_of, adapter)
    if on_top_of and format != "merged" and not (merge_router or merge_attention):
        raise HotLoraError(
            f"format {format!r} holds the adapter alone, and its base is {model} with "
            f"{' and '.join(map(str, on_top_of))} merged in: merge those first (hotlora merge) and export with the "
            "merged model as the base, or use format 'merged'."
        )
    check_adapters(model, (*on_top_of, adapter), dtype=dtype, device=device)
    check_writable(output)
    own_tokenizer = (Path(adapter).expanduser() / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(model) if format != "peft" else load_tokenizer(adapter) if own_tokenizer else None
    own = checkpoint_dtype(model) if dtype == "auto" else dtype
    writes_base = format == "merged" or merge_router or merge_attention
    base = load_base(
        model, on_top_of, dtype=own, device=_device(device), quantize=0 if writes_base else None, offload=offload,
        offload_folder=offload_folder, adapter=adapter,
    )  # fmt: skip
    adapted = load_adapter(base, adapter)
    folder = export_adapter(
        adapted, output, format=format, merge_router=merge_router, drop_router=drop_router,
        merge_attention=merge_attention, tokenizer=tokenizer, restores=False,
    )  # fmt: skip
    beside = adapter_in(folder)
    if (beside / CONFIG_FILE).is_file():  # a whole checkpoint has them already
        save_stop_tokens(adapted.get_base_model(), saved_stop_tokens(adapter), beside)
    return folder


def served_room(model: str, output: Path, *, format: str, dtype: str = "auto") -> Room | None:
    """What an adapter that `export_saved` wrote takes on a server; None for a format of no server."""
    if format not in SERVERS:
        return None
    own = checkpoint_dtype(model) if dtype == "auto" else getattr(torch, dtype)
    return room_of(structure(model), format, output, own)


def combine_saved(
    model: str,
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    on_top_of: Sequence[str | Path] = (),
    weights: Sequence[float] | None = None,
    how: str = "cat",
    density: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """One adapter out of several tasks', by `add_weighted_adapter`: what LoRI calls merging (its section 4.3).

    Args:
        on_top_of, device: as `export_saved` takes them; all adapters must have been trained on top of the same ones.
        weights: of each adapter; None: 1.0 each.
        how, density: a combination_type of `add_weighted_adapter`, and what share of each factor it keeps.
        seed: of DARE's draws.

    Raises:
        HotLoraError: fewer than two adapters, other than one weight each, or adapters that cannot be combined.
        FileError: `output` is taken.
        PlanError: an adapter is another model's.
    """
    output = check_export("peft", output)
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise HotLoraError(
            f"{len(adapters)} adapters and {len(weights)} weights: give two adapters or more, a weight each."
        )
    check_weights(weights)
    names = [f"task{i}" for i in range(len(adapters))]
    check_combined([saved_config(folder) for folder in adapters], how, density)  # before a model is loaded
    check_adapters(model, adapters, device=device)
    check_writable(output)
    combined: Any = load_base(
        model, on_top_of, dtype=checkpoint_dtype(model), adapter=adapters[0], device=_device(device)
    )
    for name, folder in zip(names, adapters, strict=True):
        combined = load_adapter(combined, folder, name)
    own = combined.device
    with torch.random.fork_rng([own] if own.type == "cuda" else []):
        torch.manual_seed(seed)
        combined.add_weighted_adapter(names, weights, "default", combination_type=how, density=density)
    with atomic_folder(output) as beside, quiet():
        combined.peft_config["default"].base_model_name_or_path = named_base(model)
        combined.save_pretrained(beside, selected_adapters=["default"], save_embedding_layers=False)
        load_tokenizer(model).save_pretrained(beside)
        ends = [i for folder in adapters for i in saved_stop_tokens(folder)]
        save_stop_tokens(combined.get_base_model(), ends, beside)
        (beside / "README.md").unlink(missing_ok=True)  # PEFT's blank form, with a path of this machine
    return output


def _device(asked: str) -> str:
    return "cpu" if asked == "auto" else asked


def shared_experts(adapters: Sequence[str | Path]) -> list[str]:
    """A line for each two saved adapters: how many experts each has, how many both, and their Jaccard."""
    lines = []
    for (a, one), (b, other) in combinations([(folder, _experts(folder)) for folder in adapters], 2):
        both, either = len(one & other), len(one | other)
        overlap = f", Jaccard {both / either:.2f}" if either else ""
        lines.append(f"{a} has {len(one):,} experts, {b} {len(other):,}, and {both:,} are of both{overlap}")
    return lines


def _experts(adapter: str | Path) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, ids in planned_experts(adapter).items() for expert in ids}
