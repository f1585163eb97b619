"""What is wrong with a run's options, told before a model is loaded, which may take long: by its config alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapter.config import HotLoraConfig
from ..adapter.load import saved_config
from ..adapter.quantize import experts_in
from ..base.errors import HotLoraError, PlanError
from ..base.files import file_in
from ..hf.models import checked_device, checked_dtype, fingerprint, moe_layers, num_experts_per_tok, structure
from ..routing.plan import ExpertPlan, select_experts
from ..routing.profile import RoutingProfile
from ..train.config import TrainConfig
from ..train.reprofile import LEFT
from ..train.trainer import check_report_to

SELECTION = ("rule", "fraction", "experts_per_layer", "p", "budget", "fillers", "scores", "signal")


def check_run(
    model: str,
    *,
    config: TrainConfig,
    rule: str = "hot",
    signal: str = "count",
    plan_seed: int | None = None,
    profile: str | Path | None = None,
    plan: str | Path | None = None,
    full: bool = False,
    reprofile_every: int | None = None,
    reprofile_left: str = "drop",
    eval_batch_size: int = 64,
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    **options: Any,
) -> None:
    """Raises what `run.run_training` with these options would raise for them sooner or later; else does nothing.

    The rule is tried on the given profile, or on one in which all experts are used alike; the plan is held against
    the model's modules on the meta device.

    options: of `run.run_training`; those that are no rule's are not looked at.

    HotLoraError: an option out of range, or that does not go with another. ModelError: no such model, or without MoE
    layers. PlanError: a rule, budget, plan or profile that does not fit the model.
    """
    check_sizes(eval_batch_size=eval_batch_size, reprofile_every=reprofile_every)
    check_report_to(config.report_to)
    checked_device(device)
    checked_dtype(dtype)
    experts_in(quantize)
    if reprofile_left not in LEFT:
        raise HotLoraError(f"reprofile_left is {reprofile_left!r}: choose one of {', '.join(LEFT)}.")
    if reprofile_every is not None and (not config.train_a or config.use_dora or config.train_full_experts):
        raise HotLoraError(
            "re-profiling moves plain LoRA factors only: leave out reprofile_every, or DoRA, a frozen A and full "
            "experts."
        )
    there = structure(model)
    if full:
        return
    if plan is not None:
        chosen = ExpertPlan.load(plan)
    else:
        routing = _alike(there) if profile is None else RoutingProfile.load(profile)
        check_made_on(routing, fingerprint(there), profile, model)
        selection = {"rule": rule, "signal": signal, **{key: options.get(key) for key in SELECTION[1:-1]}}
        chosen = select(routing, selection, config.seed if plan_seed is None else plan_seed)
    names = ("train_attention", "train_router", "train_shared", "use_dora", "train_a", "train_full_experts")
    HotLoraConfig(plan=chosen, r=config.r, **{name: getattr(config, name) for name in names}).bind(there)


def check_sizes(**sizes: int | None) -> None:
    """HotLoraError, naming the option, where a number is less than 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise HotLoraError(f"{name} = {size} is out of range: it must be 1 or more.")


def check_adapters(model: str, adapters: Sequence[str | Path], **options: str) -> None:
    """Raises where saved adapters do not fit the model, or `options`, its device and dtype, do not exist."""
    checked_device(options.get("device", "auto"))
    checked_dtype(options.get("dtype", "auto"))
    configs = [saved_config(adapter) for adapter in adapters]
    there = structure(model)
    for adapter, config in zip(adapters, configs, strict=True):
        try:
            config.bind(there)
        except PlanError as error:
            raise PlanError(f"{adapter}: {error}") from error


def check_made_on(routing: RoutingProfile, model_fingerprint: str, file: str | Path | None, model: str) -> None:
    """PlanError: the profile is another model's."""
    made_on = routing.source.get("fingerprint")
    if made_on is not None and made_on != model_fingerprint:
        at = "it" if file is None else file_in(file, "profile.safetensors")
        raise PlanError(f"{at} is the profile of {made_on}, and {model} is {model_fingerprint}: profile this model.")


def select(routing: RoutingProfile, selection: Mapping[str, Any], seed: int) -> ExpertPlan:
    """`select_experts` with a run's options, where experts_per_layer may be "top_k": the router's K."""
    if selection["experts_per_layer"] == "top_k":
        selection = {**selection, "experts_per_layer": routing.num_experts_per_tok}
    return select_experts(routing, **selection, seed=seed)


def _alike(model: Any) -> RoutingProfile:
    """A profile of the model in which its router sends each expert as many tokens."""
    layers = moe_layers(model)
    counts = torch.ones(len(layers), layers[0].num_experts, dtype=torch.int64)
    return RoutingProfile(
        tuple(layer.layer for layer in layers), counts, counts.double(), counts.shape[1], num_experts_per_tok(model),
        {"fingerprint": fingerprint(model)},
    )  # fmt: skip
