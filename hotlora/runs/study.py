"""Data sets and a model, or saved profiles -> the study's numbers and profiles. One pass over each data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from ..base.errors import DataError
from ..hf.experts_view import ExpertsView
from ..hf.models import load_tokenizer, vocab_size
from ..hf.moe_layers import moe_layers, unwrap
from ..routing.profile import RoutingProfile
from ..routing.profiler import profile_examples
from ..routing.study import Study, study
from ..tasks import Example, without_parts
from ..tasks.data import data_hash, load_examples
from ..tasks.tokens import batches, tokenize
from .checks import check_adapters, check_sizes
from .folder import load_base

_PROFILE = "profile.safetensors"


def run_study(
    sources: Sequence[str],
    model: str | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    quantize_linear: int | None = None,
    attn_implementation: str | None = None,
    offload: str = "none",
    offload_folder: str | Path | None = None,
    reading: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Study, dict[str, RoutingProfile]]:
    """Profiles `model` on each data set, and studies the profiles together.

    Args:
        sources: data sets as `load_examples` takes them, of which the training split is read, or profiles made
            before (a .safetensors file or its folder): those have no subsamples.
        model: not needed where all are profiles.
        limit: at most so many examples of each, drawn by `seed`.
        reading: what `load_examples` takes besides, of all data sets.
        tell: hears what is going on, a line a data set.

    Raises:
        DataError: no model for a data set, two sources of one name, or profiles of another model.
    """
    names = names_of(sources)
    check_sizes(batch_size=batch_size, max_length=max_length)
    profiles: dict[str, RoutingProfile] = {}
    examples: dict[str, Tensor] = {}
    made = [source for source in sources if not is_profile(source)]
    tokenizer, base, shared = None, None, 0.0
    rows: dict[str, Sequence[Example]] = {}
    datasets: dict[str, Dataset] = {}
    if made:
        if model is None:
            raise DataError(
                f"{made[0]} is no profile made before, so a model is needed to profile it on: give --model."
            )
        check_adapters(model, (), dtype=dtype, device=device, attn_implementation=attn_implementation)
        tokenizer = load_tokenizer(model)
        # All data is read before the model runs: a wrong name or row is told at once.
        for source in made:
            rows[source] = load_examples(
                source, "train", limit=limit, seed=seed, tokenizer=tokenizer, tell_unread=False, **(reading or {})
            )
            datasets[source] = tokenize(rows[source], tokenizer, max_length, vocab_size=vocab_size(model))
        base = load_base(
            model, dtype=dtype, device=device, quantize=quantize, quantize_linear=quantize_linear, offload=offload,
            offload_folder=offload_folder, attn_implementation=attn_implementation,
        )  # fmt: skip
        shared = shared_experts(base)
    for name, source in zip(names, sources, strict=True):
        if is_profile(source):
            profiles[name] = RoutingProfile.load(source)
            shared = max(shared, float(profiles[name].source.get("shared_experts", 0)))
            continue
        dataset = datasets[source]
        origin = {
            "model": model, "data": source, "data_hash": data_hash(rows[source]), "examples": len(dataset),
            "max_length": max_length, "shared_experts": shared,
        }  # fmt: skip
        assert base is not None
        profiles[name], examples[name] = profile_examples(base, batches(dataset, tokenizer, batch_size), source=origin)
        tell(f"{name}: {len(dataset):,} examples, {profiles[name].num_tokens:,} tokens")
    result = study(profiles, examples, shared=shared, seed=seed)
    if made:
        result["settings"] |= {"limit": limit, "max_length": max_length}
        how = {"dtype": dtype, "quantize": quantize, "quantize_linear": quantize_linear}
        result["settings"] |= {name: value for name, value in how.items() if value not in (None, "auto")}
    return result, profiles


def shared_experts(model: nn.Module) -> float:
    """S: how many routed experts the shared experts of a layer are as large as (MoE-Sieve s3.1: Qwen 4, DeepSeek 2)."""
    layer = moe_layers(model)[0]
    expert = ExpertsView(unwrap(model.get_submodule(layer.experts))).num_weights_of_an_expert
    shared = sum(p.numel() for path in layer.shared for p in unwrap(model.get_submodule(path)).parameters())
    return round(shared / expert, 2)


def is_profile(source: str) -> bool:
    """Whether a source names a profile made before: a .safetensors file, or a folder with one."""
    path = Path(source).expanduser()
    return path.suffix == ".safetensors" or (path / _PROFILE).is_file()


def names_of(sources: Sequence[str]) -> list[str]:
    """A short name for each source, fit for a file: the task, or the last part of the path or Hub id."""
    names = []
    for source in sources:
        if is_profile(source):
            path = Path(source).expanduser().resolve()
            path = path.parent if path.name == _PROFILE else path
        else:
            path = Path(without_parts(source))
        names.append(path.name.partition(".")[0] or "data")
    if twice := {name for name in names if names.count(name) > 1}:
        name = min(twice)
        same = [source for source, other in zip(sources, names, strict=True) if other == name]
        raise DataError(f"{' and '.join(same)} have the same name, {name}: rename a file, or leave one out.")
    return names
