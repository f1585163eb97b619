"""The options of one fine-tuning. Imports nothing heavy: the command line shows these defaults."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import HotLoraError

PROFILE_FRACTION = 0.1
"""Share of the training examples to profile on: HELLoRA's warm-up set, and MoE-Sieve's subsample (its section 3.3)."""
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
# Changing these changes nothing of what is learned, so a run may go on under others.
FREE_OPTIONS = ("save_steps", "report_to", "expert_parallel")
# Options that the command line calls otherwise than by their own names, and hashes of what options name.
_FLAGS = {
    "use_dora": "--dora", "use_rslora": "--rslora", "train_a": "--lora-fa", "full": "--method fft",
    "train_full_experts": "--method esft", "max_grad_norm": "max_grad_norm", "processes": "processes",
    "eval_batch_size": "the batch size of the evaluation (--batch-size)", "examples": "training examples",
    "examples_per_step": "examples a step (--batch-size x --gradient-accumulation-steps x processes)",
    "train_attention": "--train-attention", "train_router": "--train-router", "train_shared": "--train-shared",
}  # fmt: skip
_HASHES = {
    "chat_template": ("the model's chat template", "model"),
    "data_hash": ("the training data (--data)", "data"), "test_hash": ("the test data", "test_data"),
    "profile_hash": ("--profile", None), "plan_hash": ("the plan (--plan, or the rule's)", "rule"),
    "scores_hash": ("--scores", "scores"), "mask_hash": ("--mask", None), "adapter_hash": ("--adapter", "adapter"),
    "generations_hash": ("--generations", "generations"), "on_top_of": ("--on-top-of", None),
}  # fmt: skip
"""hash -> (what it is of, the option that changes it wherever it differs itself)"""
_BATCH = ("batch_size", "gradient_accumulation_steps", "processes")


@dataclass(frozen=True)
class TrainConfig:
    """Options of one fine-tuning, the adapter's among them.

    The defaults are HELLoRA's for mathematics (r 32, alpha 64, no dropout, 4e-4, 3 epochs, AdamW without
    weight decay, constant rate), but for its batch of 128, and with a short warm-up, of which neither paper
    speaks.
    """

    epochs: float = 3
    """Passes over the training data; unused where max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps; None: by epochs."""
    batch_size: int = 16
    """Examples a device and step, before accumulation."""
    gradient_accumulation_steps: int = 1
    """Batches added up for one optimizer step."""
    learning_rate: float = 4e-4
    """Peak rate of AdamW."""
    lr_scheduler: str = "constant_with_warmup"
    """constant, constant_with_warmup, linear or cosine (the last two fall to 0)."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the rate rises from 0; not used by "constant"."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decays by it; ESFT has 0.95."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    max_length: int = 512
    """Tokens of an example; longer ones are cut from the right."""
    packing: bool = False
    """Several examples in one row of max_length tokens, kept apart by their positions."""
    save_steps: int = 100
    """Optimizer steps between two checkpoints; the last step always has one."""
    seed: int = 0
    """Of the adapter's start, the order of the data and dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    aux_loss_coef: float = 0.0
    """Weight of the router's load-balancing loss; 0 turns it off, whatever the model's own config says."""
    r: int = 32
    """Rank of every LoRA matrix pair."""
    lora_alpha: int = 64
    """LoRA's scaling is lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout before A, in [0, 1); MoE-Sieve has 0.05."""
    train_attention: bool = True
    """Adapt q, k, v and o."""
    train_router: bool = True
    """Adapt the router."""
    train_shared: bool = True
    """Adapt shared experts."""
    use_rslora: bool = False
    """Scale by lora_alpha over the root of r."""
    use_dora: bool = False
    """A magnitude for each output, too (DoRA)."""
    train_a: bool = True
    """False freezes A (LoRA-FA, LoRI); it is drawn from a_seed and not saved."""
    a_seed: int | None = None
    """Of a frozen A; None: the mask's, or 0."""
    train_full_experts: bool = False
    """Train the planned experts' own weights in place of low-rank updates (ESFT)."""
    report_to: str = "none"
    """Where transformers also sends the metrics: none, wandb, trackio, tensorboard, …"""

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "save_steps",
            "r",
            "lora_alpha",
        )
        for name in (*positive, *(("max_steps",) if self.max_steps is not None else ())):
            self._check(name, 0 < getattr(self, name) < math.inf, "more than 0")
        for name in ("weight_decay", "max_grad_norm", "aux_loss_coef"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._check("seed", 0 <= self.seed < 2**32, "0 or more and below 2^32")  # numpy's generator takes no other
        self._check("max_length", self.max_length >= 2, "2 or more")
        self._check("warmup_ratio", 0 <= self.warmup_ratio < 1, "a share in [0, 1)")
        self._check("adam_beta2", 0 < self.adam_beta2 < 1, "in (0, 1)")
        self._check("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        self._check("lr_scheduler", self.lr_scheduler in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise HotLoraError(f"{name} = {getattr(self, name)!r} is out of range: it must be {allowed}.")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between a run's options and those given now, in the command line's words: `--r 8 against 4`."""
    old, new = _flat(old), _flat(new)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    said = []
    for name in changed:
        was, now = old.get(name), new.get(name)
        if name == "train_a":  # --lora-fa is its opposite
            was, now = was is False, now is False
        if name not in _HASHES:
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            said.append(f"{flag} {_shown(now)} against {_shown(was)}")
            continue
        what, option = _HASHES[name]
        if option not in changed and not (name == "test_hash" and "data" in changed):
            here = "is not what it was" if was and now else "was not given before" if now else "was given before"
            said.append(f"{what} {here}")
    return said


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of options (how answers are drawn) among the others."""
    inner = [(key, item) for value in options.values() if isinstance(value, Mapping) for key, item in value.items()]
    return {name: value for name, value in options.items() if not isinstance(value, Mapping)} | dict(inner)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def same_run(options: Mapping[str, Any], free: tuple[str, ...] = FREE_OPTIONS) -> dict[str, Any]:
    """The options that must be equal for a run to go on: without `free` ones; and of the batches only how many examples
    a step has, however many processes have them, at once or one after another."""
    kept = {name: value for name, value in options.items() if name not in free}
    if all(isinstance(kept.get(name), int) for name in _BATCH[:2]):
        kept["examples_per_step"] = math.prod(kept.pop(name, 1) for name in _BATCH)
    return kept
