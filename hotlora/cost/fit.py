"""`--fit`: the options with which a training step fits into a given memory, at the least cost in time."""

import importlib.util
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..base.errors import HotLoraError
from ..base.processes import num_processes
from ..base.sizes import parse_size, size_words
from ..hf.models import config_file, is_stored_quantized
from ..runs.options import RunOptions
from .cards import PCIE_5, host_link
from .estimate import device_of
from .memory import memory, transfer_bytes
from .preflight import (
    ROOM,
    card_for,
    device_and_free,
    experts_of,
    free_host_memory,
    known_card,
    layout,
    step_by,
    unknown_to_estimate,
    warm_up_by,
)
from .setups import LEVERS, Setup, Setups, first_of_each_kind, flag

AUTO = "auto"
_HOST_LEFT = 4e9
"""Bytes of RAM that are left to the process itself and the system."""
_ADVISED = 4


@dataclass(frozen=True)
class Fitted:
    """What was chosen, and why."""

    options: RunOptions
    """The run's, with what was chosen."""
    chosen: Mapping[str, Any]
    """Options that were changed."""
    memory: Mapping[str, float]
    """Of a step then, as `cluster.memory` has it."""
    lines: tuple[str, ...]
    """What there is to say, a line each."""


def fit(
    options: RunOptions, given: Collection[str], *, held: Collection[str] | None = None, host: int | None = None,
    device: str | None = None, by_params: bool = False,
) -> Fitted:  # fmt: skip
    """The cheapest way in which a step of the run fits into `options.fit`.

    Among ways that do, the one with the least foreseen time is taken, and one that rounds the frozen experts only where
    it saves a third of the time (8 bits) or half of it (4 bits). The examples of an optimizer step stay as many.

    Args:
        options: with `fit`: a size, or "auto" for what is free on the device.
        given: names of options that the user has set; they are left alone.
        held: of a run that goes on: others that may not change; nothing is advised that it could not go on with.
        host: bytes of RAM; None: what is free here.
        device: cuda or cpu, where it need not be here; None: the run's own.
        by_params: advice is for `hotlora params`, which has --host and no --rule.

    Raises:
        HotLoraError: nothing fits (what the least is, and what else there is to change); a run that the estimate does
            not know; a size that is none.
    """
    assert options.fit is not None
    if reason := unknown_to_estimate(options):
        raise HotLoraError(f"fit goes by the estimate, which does not know {reason}: leave fit out.")
    if options.fit == AUTO or device is None:
        where, free = device_and_free(options.device if device is None else device)
    if options.fit != AUTO:
        free = parse_size("fit", options.fit)
    if device is not None:
        where = device_of(device)
    path, way = config_file(options.model), layout(options.expert_parallel)
    by = step_by(options, path, where, experts_of(options))
    setups = Setups(
        options, by, num_processes(), way, _fixed({*given, *(held or ())}), card_for(where, free),
        warm_up_by(options, path, where), is_stored_quantized(path),
    )  # fmt: skip
    room = ROOM * free
    ram = max(0.0, (free_host_memory() if host is None else host) - _HOST_LEFT)
    found = choose(setups, room, ram)
    counted = f"{size_words(free)} on {where}, of which {ROOM:.0%} are counted on"
    if found is None:
        told = _nothing_fits(setups, room, ram, counted, given, goes_on=held is not None, by_params=by_params)
        raise HotLoraError(told)
    first = f"fit: {counted}: {size_words(room)}{_counted_as(setups, where)}"
    if found.host:
        other = "; --host: another machine's" if by_params else ""
        first += f"; and {size_words(ram)} of RAM ({f'free here{other}' if host is None else '--host'})"
    lines = (first, *_told(setups, found))
    return Fitted(replace(options, **found.changes), found.changes, found.memory, lines)


def choose(setups: Setups, room: float, ram: float) -> Setup | None:
    """The cheapest way that takes at most so many bytes of the device and of RAM; None: there is none."""
    return next((way for way in setups.chosen_from if way.total <= room and way.host <= ram), None)


def _counted_as(setups: Setups, where: torch.device) -> str:
    """Which card times are foreseen for, where it is not the run's own."""
    return (
        ""
        if setups.own.step.on_cpu or known_card(where)
        else f"; counted as an {setups.card.name}, whose memory is nearest"
    )


def _fixed(given: Collection[str]) -> set[str]:
    """What is not changed. Without bitsandbytes nothing can be quantized."""
    missing = set() if importlib.util.find_spec("bitsandbytes") else {"quantize"}
    return {*given, *missing}


def _told(setups: Setups, found: Setup) -> list[str]:
    own, options = setups.own, setups.options
    batch = f"{options.batch_size} × {options.max_length:,} tokens"
    speed = found.step.tokens * found.storage.gradient_accumulation_steps / found.seconds
    each = " a GPU" if setups.processes > 1 else ""
    foreseen = "" if own.step.on_cpu else f": {speed:,.0f} tokens/s{each}, by the cost model ({setups.card.name})"
    if not found.changes:
        return [f"fit: nothing to change: a step of {batch} needs about {size_words(own.total)}{foreseen}"]
    lines = [
        f"fit: {found.flags}: a step needs about {size_words(found.total)} in place of {size_words(own.total)}",
        *(f"  {line}" for line in _reasons(setups, found)),
    ]
    if own.step.on_cpu:
        foreseen = f", by the cost model ({setups.card.name}, whose rates are assumed)"
    times = f"{found.seconds / own.seconds:.2f} times"
    lines.append(f"  in all an optimizer step takes {times} as long as with room for all{foreseen}")
    return lines


def _reasons(setups: Setups, found: Setup) -> list[str]:
    """Each option's gain and cost."""
    said, own, card = [], setups.own, setups.card
    changes, step, storage = found.changes, found.step, found.storage
    if "batch_size" in changes:
        said.append(
            f"{_flags(found, 'batch_size', 'gradient_accumulation_steps')}: {step.tokens:,} tokens at a time in place "
            f"of {own.step.tokens:,}; as many examples an optimizer step"
        )
    if "gradient_checkpointing" in changes:
        kept = _with(found, gradient_checkpointing=False)
        said.append(
            f"--gradient-checkpointing: activations take {size_words(found.memory['activations'])} in place of "
            f"{size_words(kept['activations'])}; each layer is computed again, {step.recomputed / step.flops:.0%} more "
            "FLOPs a step"
        )
    if "quantize" in changes:
        dense = _with(found, quantize=None)
        there, here = (m["weights"] + m["host"] + m["disk"] for m in (dense, found.memory))
        said.append(
            f"{_flags(found, 'quantize')}: the weights take {size_words(here)} in place of {size_words(there)}; frozen "
            "experts are rounded, and made dense again for each product"
        )
    if "offload" in changes:
        moved = transfer_bytes(step, storage) * storage.gradient_accumulation_steps
        away = found.memory["host"] or found.memory["disk"]
        speed = host_link(card) * card.link_share
        pcie = "PCIe 5.0" if host_link(card) == PCIE_5 else "PCIe 4.0"
        where = "in RAM" if found.memory["host"] else "in a file that is mapped"
        line = f"{_flags(found, 'offload')}: {size_words(away)} of experts wait {where}"
        if not step.on_cpu:
            line += (
                f"; {size_words(moved)} come to the card an optimizer step, {moved / speed:.2g} s at {speed / 1e9:.0f} "
                f"GB/s ({pcie} x16, assumed), while it computes"
            )
        said.append(line)
    return said


def _with(found: Setup, **changes: Any) -> Mapping[str, float]:
    return memory(found.step, replace(found.storage, **changes))


def _flags(found: Setup, *names: str) -> str:
    return " ".join(flag(name, found.changes[name]) for name in names)


def _nothing_fits(
    setups: Setups, room: float, ram: float, counted: str, given: Collection[str], *, goes_on: bool,
    by_params: bool,
) -> str:  # fmt: skip
    """One sentence for the least that it takes, one for what there is to change."""
    ways = setups.chosen_from
    within = [way for way in ways if way.host <= ram]
    least = min(within, key=lambda way: way.total) if within else min(ways, key=lambda way: way.host)
    how = f", with {least.flags}" if least.changes else ""
    smallest = min(ways, key=lambda way: way.total)
    beside = ", without more RAM" if smallest.total < least.total else ""
    told = f"{setups.options.model} does not fit into {counted}: the least is {size_words(least.total)}{how}{beside}."
    advice = []
    with_ram = [way for way in ways if way.total <= room]  # there is too little RAM for these
    if not with_ram and beside and not goes_on:  # or that is not enough alone
        with_ram = [way for way in setups.beyond(smallest) if way.total <= room]
    if with_ram:
        one = min(with_ram, key=lambda way: way.host)
        flags = " ".join(_flags_of(one, by_params))
        advice.append(f"{_ram(one.host, by_params)} with {flags} ({size_words(one.total)})")
    others = iter(()) if goes_on else setups.beyond(least)
    fits = first_of_each_kind(others, lambda way: way.total <= room and way.host <= ram, _ADVISED)
    advice += [f"{' '.join(_flags_of(way, by_params, least))} ({size_words(way.total)})" for way in fits]
    fixed = ", ".join(f"--{name.replace('_', '-')}" for name in LEVERS if name in given)
    freed = f" Or leave {fixed} to --fit." if fixed else ""
    if advice:
        left = f" Of RAM {size_words(_HOST_LEFT)} are left to the process and the system." if with_ram else ""
        return f"{told} Each of these besides would do: {'; '.join(advice)}.{left}{freed}"
    if beside:
        told = f"{told} With {_ram(smallest.host, by_params)} it is {size_words(smallest.total)}."
    larger = size_words(smallest.total / ROOM)
    if goes_on:
        return f"{told} Take a device with {larger}: the run goes on with the same options alone.{freed}"
    return f"{told} Take a device with {larger}, a smaller --max-length or --r, or a smaller model.{freed}"


def _ram(num_bytes: float, by_params: bool) -> str:
    """So much that offloading finds these bytes: never rounded down."""
    size = f"{math.ceil((num_bytes + _HOST_LEFT) / 1e8) / 10:.1f}"
    return f"{size} GB of RAM (--host {size}GB)" if by_params else f"{size} GB of RAM"


def _flags_of(way: Setup, by_params: bool, base: Setup | None = None) -> list[str]:
    """Its flags; beyond those of `base`. A budget is all that `params` is told of a rule."""
    there = {} if base is None else base.changes
    known = {name: value for name, value in way.changes.items() if not (by_params and name == "rule")}
    return [flag(name, value) for name, value in known.items() if there.get(name) != value]
