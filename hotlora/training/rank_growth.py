"""DR-LoRA: ranks of experts' adapters that grow while they train (arXiv 2601.04823, version 3, section 3 and appendix).

All factors are allocated at the largest rank, and a mask keeps the ranks that are not active yet at zero. Every so many
steps the projections with the highest saliency of each layer get more ranks, until a layer has as many as a uniform
rank would give it. Adapted are the projections into and out of each expert, not the gate; the router from the
warm-up's end on.

Readings where the text is open:
- A unit is one projection of one expert. Only so do the numbers of its table 10 come out.
- The quota of a layer's events is rounded up, and so growth ends early, at the budget. Table 10 does so.
- Scaling is lora_alpha / r, of the r that is aimed at, whatever ranks are active: what was learned stays as it is.
- A token's weight is the routing weight as applied, 0 where an expert is not chosen; its mean over the step's tokens.
- Gradients are those that the optimizer gets: of all of a step's batches, and clipped.
- The importance of those that grow starts again at 0 (section 3.3; algorithm 1 has all of the layer).
- Growth ends one interval before the training does. The paper has 200 steps for both.
- The router has an adapter, as everywhere in hotlora.
- AdamW's bias correction counts from the training's start also for ranks that come later, whose gradients were masked:
  their first steps are larger, three times the learning rate after 2,000 steps. A mask gives just that.

Shape suffixes: N experts, U = 2N units of a layer (the experts' up, then their down), R the largest rank.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..adapter.config import HotLoraConfig
from ..adapter.count import count_parameters
from ..adapter.experts import HotLoraExperts
from ..adapter.raw_weights import HotLoraRouter
from ..base.errors import HotLoraError
from ..base.files import atomic_path
from ..base.precision import say_once
from ..base.processes import num_processes, summed
from ..routing.plan import ExpertPlan
from .event_log import EventLog
from .replanned import FACTORS, planned_experts, put_under_plan

STATE_FILE = "rank_growth.safetensors"
BETA = 0.9
"""of both moving averages"""
GAMMA = 1.2
"""how much a rank that is large already counts against more"""
SHARE = 0.1
"""of the ranks that a unit starts without: what it may get at once"""


@dataclass(frozen=True)
class Growth:
    """When ranks grow, and by how many in a layer.

    Attributes:
        r: the mean rank at the end; half of it is there from the start, twice as much is the most.
        units: of a layer.
        warmup, steps: the training's; every: steps between two events.
    """

    r: int
    units: int
    warmup: int
    steps: int
    every: int

    def __post_init__(self) -> None:
        if self.r < 2 or self.r % 2:
            raise HotLoraError(f"r = {self.r}: with grow_every it must be even, since ranks start at r / 2.")
        if self.warmup < 1:
            raise HotLoraError(
                "ranks grow by what the warm-up has shown, and there is none: with grow_every give warmup_ratio or "
                "warmup_steps (the paper has 3% of the steps)."
            )
        if self.num_events < 1:
            raise HotLoraError(
                f"grow_every = {self.every} leaves no event in {self.steps} steps: ranks grow from the warm-up's end "
                f"(step {self.warmup}) until {self.every} steps before the last. Give at most "
                f"{max(1, (self.steps - self.warmup) // 2)}, or more steps."
            )

    @property
    def start(self) -> int:
        return self.r // 2

    @property
    def most(self) -> int:
        return 2 * self.r

    @property
    def num_events(self) -> int:
        """As the paper counts them, which leaves out the first."""
        return (self.steps - self.every - self.warmup) // self.every

    @property
    def quota(self) -> int:
        """Ranks that a layer gets at one event."""
        return math.ceil(self.units * (self.r - self.start) / self.num_events)

    @property
    def step_of_one(self) -> int:
        """Ranks that one unit may get at one event; 1 at least, or small ranks would never grow."""
        return max(1, int((self.most - self.start) * SHARE))

    @property
    def reach(self) -> int:
        """The mean rank that a layer comes to; less than r where events are few."""
        return min(self.r, self.start + (self.num_events + 1) * self.step_of_one)

    def said(self) -> str:
        """What to know of a training in which ranks do not come to r, and what would help; else nothing."""
        if self.reach == self.r:
            return ""
        events = -(-(self.r - self.start) // self.step_of_one)
        every = (self.steps - self.warmup) // events
        more = f"give grow_every {every} (--grow-every)" if every else "train longer"
        return (
            f"ranks grow {self.num_events + 1} times, a projection's by {self.step_of_one} at most: to {self.reach} on "
            f"average and not to r = {self.r}. For that {more}."
        )

    def is_event(self, step: int) -> bool:
        """step: from 1."""
        return self.warmup <= step <= self.steps - self.every and (step - self.warmup) % self.every == 0

    def grown(self, ranks: Sequence[int], saliency: Sequence[float]) -> list[int]:
        """A layer's ranks after an event, by the saliency of its units; of equal ones the first comes first."""
        after = list(ranks)
        left = min(self.quota, self.units * self.r - sum(ranks))
        for unit in sorted(range(len(after)), key=lambda u: -saliency[u]):
            more = min(self.step_of_one, self.most - after[unit], left)
            after[unit] += more
            left -= more
        return after


def allocated(r: int, lora_alpha: int) -> dict[str, int]:
    """`r` and `lora_alpha` of the adapter that is trained: the largest rank, at the scaling of `r`."""
    return {"r": 2 * r, "lora_alpha": 2 * lora_alpha}


@dataclass
class _Layer:
    """One layer's experts, and what is known of its units."""

    experts: HotLoraExperts
    growth: Growth | None
    """known when training begins"""
    ranks: list[int]
    frequency_N: Tensor
    """moving average of the routing weight a token"""
    importance_UR: Tensor
    """moving average of each rank's importance"""
    weight_N: Tensor
    """of this step's tokens so far: sums of routing weights, and their number"""
    tokens: Tensor


@dataclass
class RankGrowth(TrainerCallback):
    """Grows the ranks of `model`'s adapter, which has all experts at the largest rank (`allocated`).

    Args:
        r: the mean rank of a projection at the end.
        every: steps between two events.
        log: gets a JSON line each time: step, ranks in all, and the smallest and the largest one.
    """

    model: PeftModel
    r: int
    every: int
    log: Path
    layers: dict[int, _Layer] = field(default_factory=dict)
    warmup: int = 0
    """steps, known when training begins"""
    _hooks: list[Any] = field(default_factory=list)
    _mask: Tensor | None = None
    """the current batch's tokens, `[T]`, where some are padding"""

    def __post_init__(self) -> None:
        self._events = EventLog(self.log, "step", "ranks", "smallest", "largest", "grown")
        for index, experts in planned_experts(self.model).items():
            number, device = len(experts.expert_ids["default"]), _factors(experts)[0].device
            layer = _Layer(
                experts, None, [self.r // 2] * (2 * number), torch.zeros(number, device=device),
                torch.zeros(2 * number, 2 * self.r, device=device), torch.zeros(number, device=device),
                torch.zeros((), device=device),
            )  # fmt: skip
            self.layers[index] = layer
            self._hooks.append(experts.register_forward_pre_hook(self._counting(layer), with_kwargs=True))
            self._set_mask(layer)
        self._hooks.append(self.model.register_forward_pre_hook(self._see_padding, with_kwargs=True))
        self._router = [
            parameter
            for module in self.model.modules()
            if isinstance(module, HotLoraRouter)
            for name, parameter in module.named_parameters()
            if "lora_" in name
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume all is as the checkpoint has it."""
        self.warmup = args.get_warmup_steps(state.max_steps)
        for layer in self.layers.values():
            layer.growth = Growth(self.r, len(layer.ranks), self.warmup, state.max_steps, self.every)
            say_once(layer.growth.said())
        self._events.go_back_to(state.global_step)
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
        if state.global_step and file.is_file():
            with safe_open(file, "pt") as stored:
                for i, layer in self.layers.items():
                    layer.ranks = stored.get_tensor(f"{i}.ranks").tolist()
                    layer.frequency_N.copy_(stored.get_tensor(f"{i}.frequency"))
                    layer.importance_UR.copy_(stored.get_tensor(f"{i}.importance"))
                    self._set_mask(layer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in self.layers.values():  # from here on all go on from the mean, as after a resume
            layer.frequency_N.copy_(self._mean_frequency(layer))
        if not state.is_world_process_zero:
            return
        tensors = {}
        for i, layer in self.layers.items():
            tensors[f"{i}.ranks"] = torch.tensor(layer.ranks)
            tensors[f"{i}.frequency"] = layer.frequency_N
            tensors[f"{i}.importance"] = layer.importance_UR
        with atomic_path(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE) as temporary:
            save_file(tensors, temporary)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        for layer in self.layers.values():
            share_N = layer.weight_N / layer.tokens.clamp(min=1)
            layer.frequency_N.lerp_(share_N, 1 - BETA)
            layer.weight_N.zero_()
            layer.tokens.zero_()
            layer.importance_UR.lerp_(importance(layer.experts), 1 - BETA)
        if step < self.warmup:
            for parameter in self._router:
                parameter.grad = None
        if any(layer.growth is not None and layer.growth.is_event(step) for layer in self.layers.values()):
            self._grow(step)

    def _grow(self, step: int) -> None:
        grown = 0
        for layer in self.layers.values():
            before, growth = layer.ranks, layer.growth
            assert growth is not None
            layer.ranks = growth.grown(before, self._saliency(layer))
            changed = [u for u, (old, new) in enumerate(zip(before, layer.ranks, strict=True)) if old != new]
            layer.importance_UR[changed] = 0
            grown += len(changed)
            self._set_mask(layer)
        ranks = [rank for layer in self.layers.values() for rank in layer.ranks]
        row = {"step": step, "ranks": sum(ranks), "smallest": min(ranks), "largest": max(ranks), "grown": grown}
        if grown:
            self._events.add(row)

    def _saliency(self, layer: _Layer) -> list[float]:
        """Frequency x importance / (rank + 1) ** gamma of each unit. Gradients are of all processes already."""
        frequency_N = self._mean_frequency(layer)
        ranks_U = torch.tensor(layer.ranks, dtype=torch.float32)
        mean_U = layer.importance_UR.cpu().sum(1) / ranks_U  # those of inactive ranks are 0
        saliency: list[float] = (frequency_N.repeat(2) * mean_U / (ranks_U + 1) ** GAMMA).tolist()
        return saliency

    def _mean_frequency(self, layer: _Layer) -> Tensor:
        """Over the processes, each of which has seen tokens of its own; on the CPU."""
        return summed(layer.frequency_N) / num_processes()

    def _set_mask(self, layer: _Layer) -> None:
        number, most = len(layer.ranks) // 2, 2 * self.r
        active_UR = (torch.arange(most) < torch.tensor(layer.ranks)[:, None]).to(layer.importance_UR.device)
        layer.experts.keep_ranks("default", active_UR[:number], active_UR[number:])

    def _see_padding(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask.bool().flatten() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _counting(self, layer: _Layer) -> Any:
        ids = torch.tensor(layer.experts.expert_ids["default"], device=layer.weight_N.device)
        width = layer.experts.view.num_experts

        @torch.no_grad()
        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not module.training:
                return
            _, index_TK, weight_TK = (*args, *kwargs.values())[:3]
            weight_TK = weight_TK.reshape(index_TK.shape).float()
            tokens = torch.ones(len(index_TK), device=weight_TK.device)
            if self._mask is not None:
                tokens = self._mask.to(weight_TK.device).float()
            sums = torch.zeros(width + 1, device=weight_TK.device)
            sums.index_add_(0, index_TK.clamp(0, width).flatten(), (weight_TK * tokens[:, None]).flatten())
            layer.weight_N += sums[ids]
            layer.tokens += tokens.sum()

        return count

    def events(self) -> list[dict[str, Any]]:
        """What `log` holds: each event."""
        return self._events.rows()

    def finish(self) -> dict[str, int | float]:
        """After training: the adapter at its active ranks. An expert has the larger of its two; what the other
        projection and the gate have of it is zero. Gives what has been trained, in the words of `count_parameters`."""
        config = self.model.peft_config["default"]
        assert isinstance(config, HotLoraConfig)
        plan = ExpertPlan.from_dict(config.plan)
        held: dict[tuple[int, int], list[list[Tensor]]] = {}
        ranks: dict[int, tuple[int, ...]] = {}
        trained = 0
        for i, layer in self.layers.items():
            view, number = layer.experts.view, len(layer.ranks) // 2
            trained += sum(layer.ranks) * sum(view.widths)
            ranks[i] = tuple(max(pair) for pair in zip(layer.ranks[:number], layer.ranks[number:], strict=True))
            for n, (expert, rank) in enumerate(zip(plan.experts[i], ranks[i], strict=True)):
                A_up, B_up, A_down, B_down = (factor[n].detach() for factor in _factors(layer.experts))
                A_up = A_up.unflatten(0, (view.num_parts, -1))[:, :rank].flatten(0, 1)
                held[i, expert] = [[A_up, B_up[:, :rank], A_down[:rank], B_down[:, :rank]]]
        for hook in self._hooks:
            hook.remove()
        put_under_plan(self.model, dataclasses.replace(plan, ranks=ranks), held)
        counts = count_parameters(self.model)
        trainable = counts["trainable"] - counts["experts"] + trained
        return counts | {
            "trainable": trainable, "experts": trained, "percent": 100 * trainable / counts["total"],
        }  # fmt: skip


def _factors(experts: HotLoraExperts) -> list[nn.Parameter]:
    """A and B of gate and up, and of down."""
    return [cast(Any, getattr(experts, name))["default"] for name in FACTORS]


def importance(experts: HotLoraExperts) -> Tensor:
    """`[U, R]`: of each rank of each unit the sum of |gradient x value| over its row of A, times that over its column
    of B (equation 6)."""
    A_up, B_up, A_down, B_down = _factors(experts)
    number, most = len(A_down), A_down.shape[1]
    if any(factor.grad is None for factor in (A_up, B_up, A_down, B_down)):  # no token came this way
        return A_down.new_zeros(2 * number, most, dtype=torch.float32)
    parts = A_up.shape[1] // most
    up_A = _sensitivity(A_up)[:, -most:].sum(2)
    up_B = _sensitivity(B_up).unflatten(1, (parts, -1))[:, -1].sum(1)
    down_A, down_B = _sensitivity(A_down).sum(2), _sensitivity(B_down).sum(1)
    return torch.cat([up_A * up_B, down_A * down_B])


def _sensitivity(factor: nn.Parameter) -> Tensor:
    assert factor.grad is not None
    return (factor.grad.float() * factor.float()).abs()
