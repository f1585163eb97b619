"""What is wrong with a run's options, told before a model is loaded, which may take long: by its config alone."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapter.config import HotLoraConfig
from ..adapter.load import saved_config
from ..adapter.packed import NAMES
from ..adapter.quantize import experts_in
from ..base.errors import HotLoraError, PlanError
from ..base.files import file_in
from ..base.precision import say_once
from ..base.processes import check_parallelism, sharding, uses_deepspeed
from ..hf.forward import check_aux_loss
from ..hf.hub import check_push
from ..hf.models import check_packed, checked_device, checked_dtype, packing, structure
from ..hf.moe_layers import fingerprint, moe_layers, num_experts_per_tok
from ..hf.routers import check_softmax_routers
from ..routing.plan import ExpertPlan, check_rule, selected
from ..routing.profile import RoutingProfile
from ..routing.rules import READS, RULES, SAME_NUMBER
from ..training.activation_offloading import check_activation_offloading
from ..training.named import check_optim, schedule_options
from ..training.rank_growth import Growth
from ..training.reprofile import LEFT
from ..training.trackers import check_report_to
from .options import BUDGETS, RunOptions


def check_run(options: RunOptions) -> None:
    """Raises what a run with these options would raise for them sooner or later; else does nothing.

    The rule is tried on the given profile, or on one in which all experts are used alike; the plan is held against
    the model's modules on the meta device.

    HotLoraError: an option out of range, or that does not go with another. ModelError: no such model, or without MoE
    layers. PlanError: a rule, budget, plan or profile that does not fit the model.
    """
    check_values(options)
    check_parallelism()
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    check_report_to(options.report_to)
    if re.fullmatch(r"cuda:[1-9]\d*", options.device):
        raise HotLoraError(
            f"device is {options.device}: a training runs on the first GPU that its process sees. Set "
            f"CUDA_VISIBLE_DEVICES={options.device[5:]} before it starts, and leave device out."
        )
    check_activation_offloading(options.activation_offloading, device := checked_device(options.device))
    if options.offload != "none" and device.type != "cpu" and (what := needs_experts_there(options)):
        raise HotLoraError(f"{what} needs the experts on the device: leave out --offload, or that.")
    if options.load_best and uses_deepspeed():
        raise HotLoraError("DeepSpeed may spread the weights that load_best would keep: leave load_best out.")
    _tell_unused(options)
    if options.full and options.dtype == "float16":
        raise HotLoraError(
            "full fine-tuning trains the weights themselves, and loss scaling has none in float16: leave dtype out, or "
            "give float32 or bfloat16."
        )
    stored = experts_in(
        options.quantize, linear=options.quantize_linear, offload=options.offload != "none",
        offload_folder=options.offload_folder,
    )  # fmt: skip
    needs_all = (
        options.full
        or options.reprofile_every
        or options.grow_every
        or options.use_dora
        or options.train_full_experts
        or options.perft
        or options.dense_mixer
    )
    if needs_all and (sharding(options.expert_parallel) or uses_deepspeed()):
        raise HotLoraError(
            "full fine-tuning, full experts, DoRA, PERFT, DenseMixer, re-profiling and growing ranks need all weights "
            "in each process: leave them out, or launch without FSDP, DeepSpeed and expert parallelism."
        )
    if options.grow_every is not None and options.max_steps is not None:  # else the data says how many
        length = options.warmup_length
        warmup = length if length >= 1 else math.ceil(length * options.max_steps)
        Growth(options.r, 1, int(warmup), options.max_steps, options.grow_every)
    there = structure(options.model, options.attn_implementation)
    is_dense = options.quantize == 0 or options.full or bool(options.on_top_of)
    check_packed(options.model, there.config, stored, is_dense)
    _check_dense(options, None if is_dense else packing(there.config))
    if options.quantize and options.dtype == "float64":
        raise HotLoraError("quantize goes with float32, bfloat16 or float16: leave out dtype float64, or quantize.")
    check_aux_loss(there.config, options.aux_loss_coef)
    if options.dense_mixer:
        check_softmax_routers(there, "dense_mixer")
    if options.full:
        return
    if options.plan is not None:
        chosen = ExpertPlan.load(options.plan)
    else:
        routing = _alike(there) if options.profile is None else RoutingProfile.load(options.profile)
        check_made_on(routing, fingerprint(there), options.profile, options.model)
        chosen = select(routing, options)
    names = (
        "r", "train_attention", "train_router", "train_shared", "use_dora", "train_a", "share_a", "train_full_experts",
        "perft", "perft_adapters", "perft_top_k",
        "normalize_moe_lora",
    )  # fmt: skip
    HotLoraConfig(plan=chosen, **{name: getattr(options, name) for name in names}).bind(there)


def needs_experts_there(options: RunOptions) -> str | None:
    """What of a run cannot be with experts in a GPU's host memory."""
    return _needs_weights(options) or ("merging earlier adapters (--on-top-of)" if options.on_top_of else None)


def _needs_weights(options: RunOptions) -> str | None:
    """What of a run needs the experts' own weights."""
    needs = {
        "DoRA (--dora)": options.use_dora, "full experts (--method esft)": options.train_full_experts,
        "merging into experts (--reprofile-left merge)": options.reprofile_left == "merge",
    }  # fmt: skip
    return next((words for words, is_on in needs.items() if is_on), None)


def check_values(options: RunOptions) -> None:
    """What of `check_run` needs neither model nor data nor GPU: what is wrong with values alone.

    HotLoraError: as `check_run`. PlanError: a rule or signal that does not exist, or a budget that the rule does not
    read.
    """
    check_sizes(
        limit=options.limit, test_limit=options.test_limit, eval_batch_size=options.eval_batch_size,
        reprofile_every=options.reprofile_every, grow_every=options.grow_every,
    )  # fmt: skip
    check_optim(options.optim)
    schedule_options(options)
    checked_dtype(options.dtype)
    for name in ("quantize", "quantize_linear"):
        if (bits := getattr(options, name)) not in (None, 0, 4, 8):
            raise HotLoraError(f"{name} = {bits} is out of range: it must be 8 or 4 bits, or 0.")
    if options.reprofile_left not in LEFT:
        raise HotLoraError(f"reprofile_left is {options.reprofile_left!r}: choose one of {', '.join(LEFT)}.")
    if not options.full:
        check_rule(options.rule, options.signal, {name: getattr(options, name) for name in BUDGETS})
    _check_reads(options)


def _check_reads(options: RunOptions) -> None:
    """PlanError: an option that this rule does not read."""
    reads = READS.get(options.rule, ("seed", "signal"))  # one that does not exist is told by its name
    if options.plan_seed is not None and options.plan is None and "seed" not in reads:
        drawing = ", ".join(rule for rule, reads in READS.items() if "seed" in reads)
        raise PlanError(f"plan_seed is of rules that draw ({drawing}), and rule is {options.rule!r}: leave it out.")
    if options.reprofile_every is not None and "signal" not in reads:
        raise PlanError(
            f"rule {options.rule!r} chooses the same experts whatever is profiled: leave out reprofile_every, or give "
            "a rule that reads the profile, such as hot."
        )
    if options.reprofile_every is not None and options.rule in RULES and options.rule not in SAME_NUMBER:
        rules = ", ".join(rule for rule in SAME_NUMBER if "signal" in READS[rule])
        raise PlanError(
            f"re-profiling keeps the number of experts of each layer, and rule {options.rule!r} may change it: choose "
            f"one of {rules}, or leave out reprofile_every."
        )


def _tell_unused(options: RunOptions) -> None:
    """Of options that say nothing where no low-rank adapter trains: a sweep has them for all of its methods."""
    beside = options.train_attention or options.train_router or options.train_shared
    unused: list[str] = []
    if options.full or (options.train_full_experts and not beside):
        unused += ["r", "lora_alpha", "lora_dropout", "use_rslora"]
    if options.full:
        unused += [*BUDGETS, "train_attention", "train_router", "train_shared", "train_a", "share_a", "profile"]
    if given := options.changed(unused):
        what = "full fine-tuning trains all weights" if options.full else "no low-rank adapter trains here"
        say_once(f"{what}: these options change nothing: {', '.join(given)}")


def _check_dense(options: RunOptions, packed: dict[str, Any] | None) -> None:
    """HotLoraError: something trains that needs the experts' own weights, and these are stored in few bits.

    packed: the checkpoint's format, where the experts stay in it."""
    what = _needs_weights(options)
    if what is None:
        return
    if options.quantize:
        raise HotLoraError(
            f"{what} needs weights that are not quantized, and quantize is {options.quantize}: leave out --quantize."
        )
    if packed is not None:
        name = NAMES[4 if packed["quant_method"] == "mxfp4" else 8]
        raise HotLoraError(
            f"{what} needs weights that are not quantized, and {options.model} has its experts in {name}: give "
            "--quantize 0, which makes them dense."
        )


def check_sizes(**sizes: int | None) -> None:
    """HotLoraError, naming the option, where a number is less than 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise HotLoraError(f"{name} = {size} is out of range: it must be 1 or more.")


def check_adapters(
    model: str, adapters: Sequence[str | Path], *, device: str = "auto", dtype: str = "auto",
    attn_implementation: str | None = None,
) -> None:  # fmt: skip
    """Raises where saved adapters do not fit the model, or its device, dtype or attention do not exist."""
    checked_device(device)
    checked_dtype(dtype)
    configs = [saved_config(adapter) for adapter in adapters]
    there = structure(model, attn_implementation)
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


def select(routing: RoutingProfile, options: RunOptions) -> ExpertPlan:
    """The experts that a run adapts; rules that draw do so by `plan_seed`, or by the training's seed."""
    return selected(routing, options, seed=options.seed if options.plan_seed is None else options.plan_seed)


def _alike(model: Any) -> RoutingProfile:
    """A profile of the model in which its router sends each expert as many tokens."""
    layers = moe_layers(model)
    counts = torch.ones(len(layers), layers[0].num_experts, dtype=torch.int64)
    return RoutingProfile(
        tuple(layer.layer for layer in layers), counts, counts.double(), counts.shape[1], num_experts_per_tok(model),
        {"fingerprint": fingerprint(model)}, counts.double(),
    )  # fmt: skip
