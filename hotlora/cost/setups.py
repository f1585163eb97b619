"""Ways to make a training step fit into a device's memory: one list, for what is advised and for what --fit chooses.

A way is a few options of the run, with other values. What can be tried is arithmetic on one `Step`, so all are.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any

from ..base.errors import HotLoraError
from ..routing.plan import DEFAULT_FRACTION
from ..runs.checks import needs_experts_there
from ..runs.options import RunOptions
from .cards import CPU, TYPICAL, step_time
from .cluster import Machine, memory, work_of
from .memory import Step, Storage

_BATCH = ("batch_size", "gradient_accumulation_steps")
LEVERS = (*_BATCH, "gradient_checkpointing", "offload", "quantize")
"""Options that --fit may choose."""
_WORTH = {None: 1.0, 0: 1.0, 8: 1.5, 4: 2.0}
"""Bits of the experts -> how much longer a way may take that leaves them as they are, and is chosen all the same."""
_SHAPE = ("rule", "fraction", "r", "max_length", "attn_implementation")
"""Options that make another step of it."""
_FLASH = "flash_attention_2"
_SHORTEST = 64  # tokens that an example is not to be cut to less than


@dataclass(frozen=True)
class Setup:
    """Other values for some of a run's options. Sizes in bytes, on the fullest process's device."""

    changes: Mapping[str, Any]
    step: Step
    storage: Storage
    memory: Mapping[str, float]
    seconds: float
    """Of an optimizer step, foreseen."""

    @property
    def total(self) -> int:
        return round(self.memory["total"])

    @property
    def host(self) -> int:
        return round(self.memory["host"])

    @property
    def flags(self) -> str:
        return " ".join(flag(name, value) for name, value in self.changes.items())

    @cached_property
    def cost(self) -> tuple[float, int, int]:
        """By which ways are put in order: foreseen seconds of an optimizer step, more where experts are rounded; then
        how many options change, and the batches."""
        worth = float(f"{self.seconds * _WORTH[self.storage.quantize]:.3g}")  # more digits would tell equal ones apart
        return worth, len(self.changes), self.storage.gradient_accumulation_steps


@dataclass(frozen=True)
class Setups:
    """What one run may be changed to."""

    options: RunOptions
    step_of: Callable[[Mapping[str, Any]], Step]
    """Of the run with other values for some options."""
    processes: int = 1
    layout: str = "ddp"
    given: Collection[str] = ()
    """Options that are not to be changed."""
    card: Machine = TYPICAL
    """What seconds are foreseen for."""
    warm_up_of: Callable[[Mapping[str, Any]], Step] | None = None
    """Of a warm-up before the run, likewise."""
    is_quantized: bool = False
    """Whether the checkpoint is, by whomever: it cannot be quantized as it is loaded."""

    @cached_property
    def _made(self) -> dict[tuple[Any, ...], Step]:
        return {}

    @cached_property
    def own(self) -> Setup:
        """The run as it is."""
        return self._setup({}, self._own_step)

    @cached_property
    def _own_step(self) -> Step:
        return self._step_by(self.step_of, {})

    @cached_property
    def chosen_from(self) -> list[Setup]:
        """All that changes nothing of what is learned but how frozen experts are rounded, the cheapest first."""
        values = {lever: self._values(lever) for lever in LEVERS if lever not in _BATCH}
        found = []
        for batch, *others in product(self._batches(), *values.values()):
            changes = batch | dict(zip(values, others, strict=True))
            changes = {name: value for name, value in changes.items() if value != getattr(self.options, name)}
            if self._is_allowed(changes):
                found.append(self._setup(changes, self._step(changes)))
        return sorted(found, key=lambda setup: setup.cost)

    def beyond(self, base: Setup) -> Iterator[Setup]:
        """`base` with one thing more, or a smaller optimizer's state and linear layers in 4 bits, which changes what is
        learned and is only advised."""
        others: list[dict[str, Any]] = []
        if self.options.optim.startswith("adamw_torch"):
            # A CPU pages nothing: bitsandbytes takes the plain one there, and warns.
            others.append({"optim": "adamw_8bit" if self.own.step.on_cpu else "paged_adamw_8bit"})
        if self.options.quantize_linear is None and not self._is_spread:
            others.append({"quantize_linear": 4})
        if len(others) == 2:
            others.append(others[0] | others[1])
        if self.options.max_length >= 2 * _SHORTEST:
            others.append({"max_length": self.options.max_length // 2})
        if self.options.r > 8 and not self.options.normalize_moe_lora:  # which takes no rank that K does not divide
            others.append({"r": 8})
        if self.own.step.flattened and not self.own.step.on_cpu:
            others.insert(0, {"attn_implementation": _FLASH})
        if self.options.plan is None and (self.options.rule == "all" or self.options.budget is not None):
            others.insert(0, {"rule": "hot", "fraction": DEFAULT_FRACTION})
        for changes in others:
            if changes.keys() & set(self.given) or not self._is_allowed(changes):
                continue
            both = {**base.changes, **changes}
            yield self._setup(both, self._step(both))

    def _step(self, changes: Mapping[str, Any]) -> Step:
        return self._of_batch(self._step_by(self.step_of, self._shape(changes)), changes)

    def _step_by(self, step_of: Callable[[Mapping[str, Any]], Step], shape: dict[str, Any]) -> Step:
        """Made once for each shape."""
        key = (step_of, *sorted(shape.items()))
        if key not in self._made:
            self._made[key] = step_of(shape)
        return self._made[key]

    def _shape(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What makes another step. Of another batch it is arithmetic, but where all examples are one row."""
        names = (*_SHAPE, "batch_size") if self._own_step.flattened else _SHAPE
        return {name: changes[name] for name in names if name in changes}

    def _of_batch(self, step: Step, changes: Mapping[str, Any]) -> Step:
        size, length = (changes.get(name, getattr(self.options, name)) for name in ("batch_size", "max_length"))
        return step if step.flattened else step.of_tokens(size * length)

    @property
    def _is_spread(self) -> bool:
        """Whether the weights are in parts: these can be neither quantized nor offloaded."""
        return self.layout != "ddp"

    @property
    def _makes_dense(self) -> bool:
        """Whether packed experts of a checkpoint are made dense when it is loaded."""
        return self.options.quantize == 0 or self._is_spread or bool(self.options.on_top_of)

    def _values(self, lever: str) -> Sequence[Any]:
        now = getattr(self.options, lever)
        is_fixed = lever in self.given or (self._is_spread and lever in ("quantize", "offload"))
        if lever == "gradient_checkpointing" and not is_fixed:
            return (now,) if now else (False, True)
        is_stored = self.is_quantized or self.own.step.packed is not None
        if lever == "quantize" and now is None and not is_fixed and not is_stored:
            return None, 8, 4
        if lever == "offload" and self.own.step.packed is not None and self._makes_dense:
            return (now,)
        if lever == "offload" and not self.own.step.on_cpu and needs_experts_there(self.options):
            return (now,)
        if lever == "offload" and now == "none" and not is_fixed:
            return ("none", "all") if self.own.step.on_cpu else ("none", "cold", "all")
        return (now,)

    def _batches(self) -> Iterator[dict[str, int]]:
        """With as many examples an optimizer step."""
        size, steps = self.options.batch_size, self.options.gradient_accumulation_steps
        sizes = (size,) if set(_BATCH) & set(self.given) else range(size, 0, -1)
        for smaller in sizes:
            if size * steps % smaller == 0:
                yield dict(zip(_BATCH, (smaller, size * steps // smaller), strict=True))

    def _is_allowed(self, changes: Mapping[str, Any]) -> bool:
        """Whether the run's options go with these."""
        try:
            replace(self.options, **changes)
        except HotLoraError:
            return False
        return True

    def _setup(self, changes: Mapping[str, Any], step: Step) -> Setup:
        named = [field.name for field in fields(Storage)]
        storage = Storage(**{name: changes.get(name, getattr(self.options, name)) for name in named})
        if self._makes_dense:
            storage = replace(storage, quantize=storage.quantize or 0)
        seconds = step_time(step, storage, CPU if step.on_cpu else self.card).step
        found = self._memory(step, storage)
        if self.warm_up_of is not None:
            warm_up = self._of_batch(self._warm_up(self._shape(changes)), changes)
            before = self._memory(warm_up, replace(storage, keep_hot=False))
            found = max(found, before, key=lambda memory: memory["total"])
        return Setup(changes, step, storage, found, seconds)

    def _memory(self, step: Step, storage: Storage) -> dict[str, float]:
        return memory(work_of(step, storage), self.processes, self.layout)

    def _warm_up(self, shape: dict[str, Any]) -> Step:
        """It has all experts, whatever the run has."""
        assert self.warm_up_of is not None
        asked = {name: value for name, value in shape.items() if name not in ("rule", "fraction")}
        return self._step_by(self.warm_up_of, asked)


def first_of_each_kind(setups: Iterator[Setup], fits: Callable[[Setup], bool], most: int) -> list[Setup]:
    """The first few that fit, without those that change what another one changes, and more."""
    found: list[Setup] = []
    for setup in setups:
        if fits(setup) and not any(known.changes.keys() <= setup.changes.keys() for known in found):
            found.append(setup)
        if len(found) == most:
            break
    return found


def flag(name: str, value: Any) -> str:
    """As the command line has it."""
    words = f"--{name.replace('_', '-')}"
    return words if value is True else f"{words} {value}"
