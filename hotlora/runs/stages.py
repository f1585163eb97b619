"""Runs of more than one training: LoRI's dense run before the sparse one, and HELLoRA's warm-up before the profile.

Each stage is a run of its own in a folder inside, so a stage that is done is not done again.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapter.load import load_adapter
from ..adapter.mask import SparseMask, check_share, draw_mask
from ..base.precision import say_once
from ..base.processes import is_main, start, wait_for_all
from ..base.records import Record, read_record, write_record
from ..hf.models import load_tokenizer
from ..routing.plan import select_experts
from ..routing.profile import RoutingProfile, jaccard
from ..tasks.data import data_hash, load_examples
from ..tasks.split import drawn, held_out
from ..training.identity import check_same
from .checks import check_run
from .folder import data_time, load_base
from .options import BUDGETS, PROFILE_FRACTION, WARM_UP, RunOptions
from .profiling import Watching, profile_data, profile_sample
from .training import run_training


def run_method(
    options: RunOptions, output: str | Path, *, progress: bool = False, begin: Callable[[], None] = lambda: None
) -> Record:
    """`training.run_training`, with the stages that come before it in some methods.

    With `warmup` "lora", LoRA on all experts is trained for an epoch of a tenth of the data, and that model is profiled
    in place of the base (HELLoRA s4.1): `output`/warmup gets the run, and `run.json` how far the hot experts moved.
    With `keep` and no `mask` (LoRI-S), a dense run in `output`/dense comes first, and its mask becomes
    `output`/mask.safetensors; `run.json` has its time, too.

    begin: as `run_training` takes it, for each of the trainings.

    Raises:
        HotLoraError: as `run_training`.
    """
    output = Path(output)
    start(options.device)
    _tell_given(options)
    if options.keep is not None:
        check_share(options.keep, options.granularity)
        _dense(options)
    check_run(options)
    warmed, dense_seconds = None, None
    if options.warmup == "lora":
        profile, warmed = _warm_up(options, output / "warmup", progress, begin)
        options = replace(options, profile=profile, warmup="none")
    if options.keep is not None and options.mask is None:
        mask = _drawn(options, output, progress, begin)
        if (output / "dense" / "run.json").is_file():
            dense_seconds = read_record(output / "dense")["training"]["seconds"]
        without: dict[str, Any] = dict.fromkeys((*BUDGETS, "plan_seed", "profile"))
        options = replace(
            options, **without, mask=mask, plan=output / "dense" / "plan.json",
            profile_fraction=None, profile_until=None,
        )  # fmt: skip
        if options.fresh_a:
            options = replace(options, a_seed=SparseMask.load(mask).a_seed + 1)
    record = run_training(options, output, progress=progress, begin=begin)
    before = dict(record)
    if warmed is not None:
        record = {"warmup": warmed} | record
    if dense_seconds is not None:
        record["training"] = {"dense_seconds": dense_seconds} | record["training"]
    if record != before and is_main():
        write_record(output, record)
    return record


def _tell_given(options: RunOptions) -> None:
    """What a plan or a mask leaves without effect; some of it may be a method's or a preset's."""
    beside = {
        "plan": ("rule", "signal", "plan_seed", "profile_until", "profile_fraction"),
        "mask": ("dense_learning_rate", "granularity", "fresh_a"),
    }
    for what, names in beside.items():
        if getattr(options, what) is not None and (given := options.changed(names)):
            say_once(f"a {what} is given, beside which these options change nothing: {', '.join(given)}")


def _drawn(options: RunOptions, output: Path, progress: bool, begin: Callable[[], None]) -> Path:
    """Trains B in whole, and keeps the mask of its largest entries."""
    assert options.keep is not None
    file = output / "mask.safetensors"
    if options.extend and file.is_file():  # of the dense run, which stays as it is
        return file
    dense = replace(_dense(options), condition="dense", evaluate=False)
    record = run_training(dense, output / "dense", progress=progress, begin=begin)
    source = {"plan_hash": record["plan"]["hash"], "data_hash": record["data"]["hash"], "seed": options.seed}
    if file.is_file():
        found = SparseMask.load(file)
        names = ("keep", "granularity", "source")
        then = {name: getattr(found, name) for name in names}
        if then == (now := {"keep": options.keep, "granularity": options.granularity, "source": source}):
            return file
        if (output / "run.json").is_file():  # the run that the mask there is of
            check_same(then, now, output)
    trained = load_adapter(load_base(options.model, **options.loading()), output / "dense" / "adapter")
    mask = draw_mask(trained, keep=options.keep, granularity=options.granularity, source=source)
    if is_main():
        mask.save(file)
    wait_for_all()
    return file


def _dense(options: RunOptions) -> RunOptions:
    rate = options.learning_rate if options.dense_learning_rate is None else options.dense_learning_rate
    return replace(options, train_a=False, learning_rate=rate)


def _warm_up(
    options: RunOptions, output: Path, progress: bool, begin: Callable[[], None]
) -> tuple[Path, dict[str, Any]]:
    """(the profile of the warmed-up model, what changed against the base's)."""
    file, before = output / "warm-profile.safetensors", output / "profile.safetensors"
    model, data = options.model, options.data
    tokenizer = load_tokenizer(model)
    read = {"tokenizer": tokenizer, **options.reading()}
    examples = load_examples(data, "train", limit=options.limit, tell=False, **read)  # the training tells
    number = len(profile_sample(examples, options.profile_fraction or PROFILE_FRACTION))
    # Of the rows that the training has, where it has not all; one that was begun before that goes on with its own.
    limit, sample = (number, None) if options.limit is None else (options.limit, number)
    if sample is not None and (output / "run.json").is_file():
        of_all = load_examples(data, "train", limit=number, tell=False, **read)
        of_all = of_all if options.test_split is None else held_out(of_all, options.test_split)[0]
        if read_record(output)["config"].get("data_hash") == data_hash(of_all):
            limit, sample = number, None
    others = ("plan_seed", "max_steps", "mask")
    without: dict[str, Any] = dict.fromkeys((*BUDGETS, *others))
    warming = replace(
        options, **without,
        warmup="none", rule="all", signal="count", epochs=1, extend=False, limit=limit, profile_fraction=1.0,
        profile_until=None,
        **WARM_UP,
        eval_steps=None, load_best=False, early_stopping_patience=None,
        keep_hot=False, test_limit=None, evaluate=False, condition="warm-up",
    )  # fmt: skip
    run_training(warming, output, progress=progress, begin=begin, sample=sample)
    some = drawn(load_examples(data, "train", limit=limit, now=data_time(output), tell=False, **read), sample)
    some = some if options.test_split is None else held_out(some, options.test_split)[0]
    if not file.is_file():
        warmed = profile_data(
            load_adapter(load_base(model, **options.loading()), output / "adapter"), tokenizer, some, data, model,
            batch_size=options.batch_size, max_length=options.max_length, progress=progress,
            watching=Watching(saliency=Watching.of(options).saliency),
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
