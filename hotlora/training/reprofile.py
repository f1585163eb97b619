"""Hot experts drawn again while an adapter trains, for routers that move with it.

Every so many steps the adapted model is profiled and experts are selected anew. An expert that stays keeps its factors
and AdamW's state; one that comes starts at a zero update, and is stepped as by a fresh AdamW; what one that goes has
learned is dropped, or merged into its frozen weights and kept for the saved adapter.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from ..adapter.config import HotLoraConfig
from ..adapter.experts import HotLoraExperts
from ..adapter.factors import kaiming_uniform, low_rank_products
from ..base.errors import HotLoraError, PlanError
from ..base.files import atomic_path
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile, jaccard
from .event_log import EventLog
from .replanned import FACTORS, planned_experts, put_under_plan
from .row_steps import move_rows, step_rows, take_rows

LEFT = ("drop", "merge")
STATE_FILE = "reprofile.safetensors"


@dataclass
class _Left:
    """What one expert had learned when it left, and its frozen weights as they were before anything was merged."""

    layer: int
    expert: int
    factors: list[Tensor]
    """A and B of gate and up, and of down."""


@dataclass
class Reprofiling(TrainerCallback):
    """Replaces the planned experts of `model`'s adapter every `every` steps.

    Args:
        model: a `PeftModel` with a plain HotLoRA adapter: one rank, A trained, no DoRA.
        profile: profiles the model as it is.
        select: a profile -> a plan, with as many experts in each layer every time.
        log: gets a JSON line each time: step, Jaccard to the plan before and to the first, experts that came and went.
        left: what becomes of the experts that go: "drop" or "merge".
        seed: of the A of experts that come.
    """

    model: PeftModel
    profile: Callable[[], RoutingProfile]
    select: Callable[[RoutingProfile], ExpertPlan]
    every: int
    log: Path
    left: str = "drop"
    seed: int = 0
    gone: list[_Left] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise HotLoraError(f"reprofile_every is {self.every}: it must be 1 or more steps.")
        if self.left not in LEFT:
            raise HotLoraError(f"left is {self.left!r}: choose one of {', '.join(LEFT)}.")
        config = self._config()
        is_plain = config.train_a and not (
            config.share_a or config.use_dora or config.train_full_experts or config.perft
        )
        if not is_plain or self._plan().ranks:
            raise HotLoraError(
                "re-profiling moves plain LoRA factors only: leave out DoRA, a frozen or shared A, full experts and "
                "ranks."
            )
        self.first = self._plan()
        self._events = EventLog(self.log, "step", "jaccard", "jaccard_to_first")
        self._layers = planned_experts(self.model)
        self._frozen: dict[tuple[int, int], list[Tensor]] = {}
        """(layer, expert) -> its frozen weights, where something has been merged into them"""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume the factors are a checkpoint's: so must the plan be, and what was merged."""
        self._events.go_back_to(state.global_step)
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
        if state.global_step and file.is_file():
            with safe_open(file, "pt") as stored:
                meta = json.loads((stored.metadata() or {})["json"])
                gone = [
                    _Left(layer, expert, [stored.get_tensor(f"{i}.{name}") for name in FACTORS])
                    for i, (layer, expert) in enumerate(meta["gone"])
                ]
            for left in gone:
                self._merge(left)
            self._set_plan(ExpertPlan.from_dict(meta["plan"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        meta = {"plan": self._plan().to_dict(), "gone": [(left.layer, left.expert) for left in self.gone]}
        tensors = {
            f"{i}.{name}": factor.contiguous()
            for i, left in enumerate(self.gone)
            for name, factor in zip(FACTORS, left.factors, strict=True)
        }
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
        with atomic_path(file) as temporary:
            save_file(tensors or {"none": torch.zeros(1)}, temporary, {"json": json.dumps(meta)})

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.move(self.select(self.profile()), optimizer, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        step_rows(optimizer)

    @torch.no_grad()
    def move(self, plan: ExpertPlan, optimizer: Any, step: int) -> None:
        """Makes `plan` the adapter's. `optimizer`: the one whose state goes with the factors, or None."""
        before = self._plan()
        if {layer: len(ids) for layer, ids in plan.experts.items()} != {
            layer: len(ids) for layer, ids in before.experts.items()
        }:
            raise PlanError(
                f"re-profiling needs a rule that keeps the number of experts of each layer, and {plan.rule!r} has "
                "changed it: choose hot or cold."
            )
        came = went = 0
        for layer, module in self._layers.items():
            old, new = before.experts[layer], plan.experts[layer]
            slots = {expert: n for n, expert in enumerate(old)}
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + layer)
            for expert in (e for e in old if e not in new):
                went += 1
                if self.left == "merge":
                    factors = [p["default"][slots[expert]].clone() for p in self._held(module)]
                    self._merge(_Left(layer, expert, factors))
            came += sum(expert not in slots for expert in new)
            for name, held in zip(FACTORS, self._held(module), strict=True):
                parameter = held["default"]
                fresh = torch.zeros_like(parameter[0])
                if "_A_" in name:
                    fresh = kaiming_uniform(tuple(fresh.shape), generator).to(fresh)
                taken = [slots.get(expert) for expert in new]
                take_rows(parameter, taken, fresh)
                if optimizer is not None and taken != list(range(len(taken))):  # else all is as it was
                    move_rows(optimizer, parameter, taken)
        self._set_plan(plan)
        row = {"step": step, "jaccard": jaccard(before, plan), "jaccard_to_first": jaccard(self.first, plan)}
        self._events.add(row | {"came": came, "went": went, "plan_hash": plan.hash})

    def drift(self) -> list[dict[str, Any]]:
        """What `log` holds: how far the plan moved each time."""
        return self._events.rows()

    def finish(self) -> None:
        """After training: frozen weights as they were, and all that was merged into them in the adapter, whose plan
        then has every expert that was ever trained, at a multiple of r where one has come back."""
        if not self.gone:
            return
        config, plan = self._config(), self._plan()
        held: dict[tuple[int, int], list[list[Tensor]]] = {}
        for left in self.gone:
            held.setdefault((left.layer, left.expert), []).append(left.factors)
        for layer, module in self._layers.items():
            for n, expert in enumerate(plan.experts[layer]):
                factors = [p["default"][n].detach().clone() for p in self._held(module)]
                held.setdefault((layer, expert), []).append(factors)
        for (layer, expert), weights in self._frozen.items():
            for (weight, _), frozen in zip(self._layers[layer].merge_targets("default"), weights, strict=True):
                weight.data[expert] = frozen
        experts = {i: tuple(sorted(e for layer, e in held if layer == i)) for i in plan.experts}
        ranks = {i: tuple(config.r * len(held[i, e]) for e in ids) for i, ids in experts.items()}
        put_under_plan(self.model, dataclasses.replace(plan, experts=experts, ranks=ranks), held)

    def _merge(self, left: _Left) -> None:
        """Adds what the expert learned to its frozen weights, and remembers both."""
        module = self._layers[left.layer]
        key = (left.layer, left.expert)
        scaling = module.scaling["default"]
        up, down = (product.unsqueeze(0) * scaling for product in low_rank_products(*left.factors))
        deltas = module.view.own_layout(up, down)
        weights = [weight for weight, _ in module.merge_targets("default")]
        self._frozen.setdefault(key, [weight.data[left.expert].clone() for weight in weights])
        for weight, delta in zip(weights, deltas, strict=True):
            weight.data[left.expert] = (weight.data[left.expert].to(delta.dtype) + delta[0].to(weight.device)).to(
                weight.dtype
            )
        self.gone.append(left)

    def _set_plan(self, plan: ExpertPlan) -> None:
        for layer, module in self._layers.items():
            module.move("default", plan.experts[layer])
        self._config().plan = plan.to_dict()

    def _held(self, module: HotLoraExperts) -> list[Any]:
        return [getattr(module, name) for name in FACTORS]

    def _config(self) -> HotLoraConfig:
        config = self.model.peft_config["default"]
        assert isinstance(config, HotLoraConfig)
        return config

    def _plan(self) -> ExpertPlan:
        return ExpertPlan.from_dict(self._config().plan)
