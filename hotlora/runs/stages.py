"""Runs of more than one training: LoRI's dense run before the sparse one, and HELLoRA's warm-up before the profile.

Each stage is a run of its own in a folder inside, so a stage that is done is not done again.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..adapter.load import load_adapter
from ..adapter.mask import SparseMask, check_share, draw_mask
from ..base.errors import HotLoraError
from ..base.processes import is_main, wait_for_all
from ..base.records import Record, read_record, write_record
from ..hf.models import load_tokenizer
from ..routing.plan import select_experts
from ..routing.profile import RoutingProfile, jaccard
from ..tasks.data import load_examples
from ..train.config import PROFILE_FRACTION, TrainConfig
from .checks import check_run
from .folder import data_time, load_base
from .training import profile_data, profile_sample, run_training

WARMUPS = ("none", "lora")


def run_method(
    model: str,
    data: str,
    output: str | Path,
    *,
    config: TrainConfig,
    warmup: str = "none",
    keep: float | None = None,
    granularity: str = "model",
    dense_learning_rate: float | None = None,
    fresh_a: bool = False,
    mask: str | Path | None = None,
    profile: str | Path | None = None,
    **options: Any,
) -> Record:
    """`run.run_training`, with the stages that come before it in some methods.

    Args:
        warmup: "lora": train LoRA on all experts for an epoch of a tenth of the data, and profile that model in place
            of the base (HELLoRA s4.1). `output`/warmup gets the run, and `run.json` how far the hot experts moved.
        keep: share of B that trains (LoRI-S). Without a `mask`, a dense run in `output`/dense comes first, and its
            mask becomes `output`/mask.safetensors.
        granularity: of the mask, as `mask.draw_mask` takes it.
        dense_learning_rate: of the dense run; None: the same.
        fresh_a: another A for the sparse run than for the dense one, as in LoRI's own code.
        options: of `run.run_training`.

    Raises:
        HotLoraError: as `run.run_training`; or a warm-up without a profile to make.
    """
    output = Path(output)
    if warmup not in WARMUPS:
        raise HotLoraError(f"warmup {warmup!r} does not exist: choose one of {', '.join(WARMUPS)}.")
    if keep is not None:
        check_share(keep, granularity)
        _dense(config, dense_learning_rate)
    check_run(model, config=config, profile=profile, **options)
    warmed = None
    if warmup == "lora":
        if profile is not None or options.get("plan") is not None or options.get("full"):
            raise HotLoraError("a warm-up is there to make a profile: leave out profile, plan and full fine-tuning.")
        profile, warmed = _warm_up(model, data, output / "warmup", config, options)
    if keep is not None and mask is None:
        mask = _drawn(model, data, output, config, keep, granularity, dense_learning_rate, profile, options)
        options = {**_without_budget(options), "plan": output / "dense" / "plan.json"}
        profile = None
        if fresh_a:
            config = dataclasses.replace(config, a_seed=SparseMask.load(mask).a_seed + 1)
    record = run_training(model, data, output, config=config, mask=mask, profile=profile, **options)
    if warmed is not None and "warmup" not in record:
        record["warmup"] = warmed
        if is_main():
            write_record(output, record)
    return record


def _without_budget(options: dict[str, Any]) -> dict[str, Any]:
    budgets = ("fraction", "experts_per_layer", "p", "budget", "fillers", "scores", "plan_seed", "profile_fraction")
    return {name: value for name, value in options.items() if name not in budgets}


def _drawn(
    model: str,
    data: str,
    output: Path,
    config: TrainConfig,
    keep: float,
    granularity: str,
    dense_learning_rate: float | None,
    profile: str | Path | None,
    options: dict[str, Any],
) -> Path:
    """Trains B in whole, and keeps the mask of its largest entries."""
    dense = _dense(config, dense_learning_rate)
    once = {**options, "condition": "dense", "evaluate": False}
    record = run_training(model, data, output / "dense", config=dense, profile=profile, **once)
    file = output / "mask.safetensors"
    source = {"plan_hash": record["plan"]["hash"], "data_hash": record["data"]["hash"], "seed": config.seed}
    if file.is_file():
        found = SparseMask.load(file)
        if (found.keep, found.granularity, found.source) == (keep, granularity, source):
            return file
    trained = load_adapter(_base(model, options), output / "dense" / "adapter")
    mask = draw_mask(trained, keep=keep, granularity=granularity, source=source)
    if is_main():
        mask.save(file)
    wait_for_all()
    return file


def _dense(config: TrainConfig, learning_rate: float | None) -> TrainConfig:
    rate = config.learning_rate if learning_rate is None else learning_rate
    return dataclasses.replace(config, train_a=False, learning_rate=rate)


def _base(model: str, options: dict[str, Any]) -> Any:
    names = ("on_top_of", "dtype", "device", "quantize", "expert_parallel")
    return load_base(model, **{name: options[name] for name in names if name in options})


def _warm_up(
    model: str, data: str, output: Path, config: TrainConfig, options: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """(the profile of the warmed-up model, what changed against the base's)."""
    file, before = output / "warm-profile.safetensors", output / "profile.safetensors"
    tokenizer = load_tokenizer(model)
    examples = load_examples(data, "train", limit=options.get("limit"), tokenizer=tokenizer)
    share = options.get("profile_fraction", PROFILE_FRACTION)
    number = len(profile_sample(examples, share))
    names = ("on_top_of", "test_data", "dtype", "device", "quantize", "expert_parallel", "progress")
    run_training(
        model,
        data,
        output,
        config=dataclasses.replace(
            config, epochs=1, max_steps=None, train_a=True, use_dora=False, train_full_experts=False
        ),
        rule="all",
        limit=number,
        profile_fraction=1.0,
        evaluate=False,
        condition="warm-up",
        **{name: options[name] for name in names if name in options},
    )
    some = load_examples(data, "train", limit=number, tokenizer=tokenizer, now=data_time(output))
    if not file.is_file():
        warmed = profile_data(
            load_adapter(_base(model, options), output / "adapter"), tokenizer, some, data, model,
            batch_size=config.batch_size, max_length=config.max_length, progress=options.get("progress", False),
        )  # fmt: skip
        if is_main():
            warmed.save(file)
    wait_for_all()
    return file, _overlap(RoutingProfile.load(before), RoutingProfile.load(file), read_record(output))


def _overlap(before: RoutingProfile, after: RoutingProfile, record: Record) -> dict[str, Any]:
    """Jaccard of both profiles' hot experts, K of each layer and a quarter (HELLoRA's figure 3)."""
    found: dict[str, Any] = {"seconds": record["seconds"]}
    for name, number in (
        ("top_k", before.num_experts_per_tok),
        ("quarter", max(1, round(before.num_experts / 4))),
    ):
        plans = [select_experts(routing, rule="hot", experts_per_layer=number).experts for routing in (before, after)]
        layers = {layer: jaccard({layer: plans[0][layer]}, {layer: plans[1][layer]}) for layer in before.layers}
        found[name] = {
            "experts_per_layer": number,
            "jaccard": sum(layers.values()) / len(layers),
            "jaccard_by_layer": {str(layer): value for layer, value in layers.items()},
        }
    return found
