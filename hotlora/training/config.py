"""The options of one fine-tuning. Imports nothing heavy: the command line shows these defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import HotLoraError
from ..base.options import Options, option

SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
    "inverse_sqrt", "warmup_stable_decay",
)  # fmt: skip
_TRAINING, _ADAPTER = "Training", "Adapter"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Options of one fine-tuning, the adapter's among them.

    The defaults are HELLoRA's for mathematics (r 32, alpha 64, no dropout, 4e-4, 3 epochs, AdamW without
    weight decay, constant rate), but for its batch of 128, and with a short warm-up, of which neither paper
    speaks.
    """

    epochs: float = option("Passes over the training data, where --max-steps is not given.", 3, panel=_TRAINING)
    max_steps: int | None = option("Optimizer steps, in place of --epochs.", None, panel=_TRAINING)
    extend: bool = option(
        "Train the run in --output on, to the --epochs or --max-steps given now.", False, panel=_TRAINING, resume=None,
        flags=("--extend",),
    )  # fmt: skip
    batch_size: int = option("Sequences of a batch, on each device.", 16, panel=_TRAINING)
    gradient_accumulation_steps: int = option("Batches added up for one optimizer step.", 1, panel=_TRAINING)
    learning_rate: float = option("Peak rate of AdamW.", 4e-4, panel=_TRAINING)
    lr_scheduler: str = option(
        "constant, constant_with_warmup, linear or cosine (these two fall to 0), or another of transformers'.",
        "constant_with_warmup", panel=_TRAINING,
    )  # fmt: skip
    lr_scheduler_kwargs: str | Mapping[str, Any] | None = option(
        "More of the schedule, as JSON: '{\"min_lr_rate\": 0.1}' with cosine_with_min_lr.", None, panel=_TRAINING
    )
    warmup_ratio: float = option(
        "Share of the steps over which the rate rises from 0; not used by constant.", 0.03, panel=_TRAINING
    )
    warmup_steps: int | None = option("Steps of that rise, in place of --warmup-ratio.", None, panel=_TRAINING)
    weight_decay: float = option("AdamW's decoupled decay.", 0.0, panel=_TRAINING)
    adam_beta1: float = option("Decay of AdamW's first moment.", 0.9, panel=_TRAINING)
    adam_beta2: float = option("Decay of AdamW's second moment (ESFT: 0.95).", 0.999, panel=_TRAINING)
    adam_epsilon: float = option("What AdamW adds to the root of the second moment.", 1e-8, panel=_TRAINING)
    max_grad_norm: float = option("Gradients are scaled down to this norm; 0 leaves them.", 1.0, panel=_TRAINING)
    max_length: int = option("Tokens of an example; longer ones are cut from the right.", 512, panel=_TRAINING)
    packing: bool = option(
        "Several examples in one row of --max-length tokens, kept apart by their positions. A batch is then one row: "
        "it wants --attn-implementation flash_attention_2, as others make a mask over the whole of it.",
        False, panel=_TRAINING,
    )  # fmt: skip
    save_steps: int = option(
        "Optimizer steps between checkpoints; the last step always has one.", 100, panel=_TRAINING, resume="free"
    )
    save_total_limit: int = option("Checkpoints that stay, the newest.", 2, panel=_TRAINING, resume="free")
    eval_steps: int | None = option(
        "Optimizer steps between held-out losses (and a task's scores), of --test-data, --test-split or a task's own.",
        None, panel=_TRAINING,
    )  # fmt: skip
    load_best: bool = option(
        "End with the weights of the lowest held-out loss, in place of the last ones.", False, panel=_TRAINING
    )
    early_stopping_patience: int | None = option(
        "End after so many held-out losses in a row that are no lower than the best.", None, panel=_TRAINING
    )
    optim: str = option("An optimizer by transformers' name, as adamw_8bit.", "adamw_torch_fused", panel=_TRAINING)
    neftune_noise_alpha: float | None = option("Noise on the embeddings in training (NEFTune).", None, panel=_TRAINING)
    seed: int = option("Of everything random: the adapter's start, the order of the data, dropout.", 0)
    gradient_checkpointing: bool = option(
        "Recompute activations in the backward pass: less memory, slower.", False, panel=_TRAINING
    )
    activation_offloading: bool = option(
        "Keep activations of a GPU in RAM until the backward pass needs them: less memory, slower.",
        False,
        panel=_TRAINING,
    )
    aux_loss_coef: float = option(
        "Weight of the router's load-balancing loss; 0 is off, whatever the model's config says.", 0.0, panel=_TRAINING
    )
    dense_mixer: bool = option(
        "The router learns of all experts, not only of those that a token goes to (DenseMixer): the experts' forward "
        "once more for all others of each token, in the backward pass.", False, panel=_TRAINING,
    )  # fmt: skip
    r: int = option("Rank of every adapter.", 32, panel=_ADAPTER)
    lora_alpha: int = option("Scaling is lora_alpha / r.", 64, panel=_ADAPTER)
    lora_dropout: float = option("Dropout before A, in [0, 1) (MoE-Sieve: 0.05).", 0.0, panel=_ADAPTER)
    train_attention: bool = option(
        "Adapt q, k, v and o.", True, panel=_ADAPTER, flags=("--train-attention/--no-attention",)
    )
    train_router: bool = option("Adapt the router.", True, panel=_ADAPTER, flags=("--train-router/--no-router",))
    train_shared: bool = option(
        "Adapt shared experts, where there are any.", True, panel=_ADAPTER, flags=("--train-shared/--no-shared",)
    )
    use_rslora: bool = option(
        "Scale by lora_alpha over the root of r.", False, panel=_ADAPTER, flags=("--rslora/--no-rslora",)
    )
    use_dora: bool = option(
        "A magnitude for each output, too (DoRA).", False, panel=_ADAPTER, flags=("--dora/--no-dora",)
    )
    train_a: bool = option(
        "--lora-fa freezes A (LoRA-FA, LoRI); its seed is saved in its place.", True, panel=_ADAPTER,
        flags=("--train-a/--lora-fa",),
    )  # fmt: skip
    a_seed: int | None = option("Of a frozen A (default: the mask's, or 0).", None, panel=_ADAPTER)
    share_a: bool = option(
        "One A of gate and up, and one B of down, for all adapted experts of a layer (SGLang's shared-outer LoRA).",
        False, panel=_ADAPTER,
    )  # fmt: skip
    perft: str | None = option(
        "PERFT's adapters beside the experts: E (one for each), R (with a router of their own) or D (for every token).",
        None, panel=_ADAPTER,
    )  # fmt: skip
    perft_adapters: int = option("Of --perft R and D: how many a layer has.", 1, panel=_ADAPTER)
    perft_top_k: int = option("Of --perft R: how many of them a token gets.", 1, panel=_ADAPTER)
    normalize_moe_lora: bool = option(
        "Rank r / K for each adapted expert, K the router's experts of a token; lora_alpha stays.", False,
        panel=_ADAPTER,
    )  # fmt: skip
    train_full_experts: bool = option(
        "Train the planned experts' own weights in place of low-rank updates (--method esft).", False, cli=False
    )
    report_to: str = option(
        "Where the metrics also go: tensorboard (the run's logs/), wandb, trackio, … (by their own settings); several, "
        "with commas between; or all that are installed.", "none",
        panel=_TRAINING, resume="free",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (
            "epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "save_steps", "r", "lora_alpha",
        )  # fmt: skip
        if_given = ("max_steps", "eval_steps", "early_stopping_patience", "neftune_noise_alpha")
        for name in (*positive, *(name for name in if_given if getattr(self, name) is not None)):
            self._check(name, 0 < getattr(self, name) < math.inf, "more than 0")
        for name in ("weight_decay", "max_grad_norm", "aux_loss_coef", "adam_epsilon", "warmup_steps"):
            self._check(name, 0 <= (getattr(self, name) or 0) < math.inf, "0 or more")
        self._check("seed", 0 <= self.seed < 2**32, "0 or more and below 2^32")  # numpy's generator takes no other
        self._check("max_length", self.max_length >= 2, "2 or more")
        self._check("warmup_ratio", 0 <= self.warmup_ratio < 1, "a share in [0, 1)")
        for name in ("adam_beta1", "adam_beta2"):
            self._check(name, 0 < getattr(self, name) < 1, "in (0, 1)")
        # While one is being written, the one before must be whole.
        self._check("save_total_limit", self.save_total_limit >= 2, "2 or more")
        self._check("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        if self.eval_steps is None and (self.load_best or self.early_stopping_patience is not None):
            raise HotLoraError("load_best and early_stopping_patience go by held-out losses: give eval_steps, too.")
        # transformers would drop both without a word.
        if self.lr_scheduler.startswith("constant") and self.lr_scheduler_kwargs is not None:
            raise HotLoraError(f"the schedule {self.lr_scheduler} has no options: leave lr_scheduler_kwargs out.")
        if self.lr_scheduler == "constant" and self.warmup_steps is not None:
            raise HotLoraError("the schedule constant has no warm-up: leave warmup_steps out, or constant_with_warmup.")
        self._check("lr_scheduler", self.lr_scheduler in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}")

    @property
    def warmup_length(self) -> float:
        """As transformers' `warmup_steps` takes it: steps, or below 1 a share of them."""
        return self.warmup_ratio if self.warmup_steps is None else self.warmup_steps

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise HotLoraError(f"{name} = {getattr(self, name)!r} is out of range: it must be {allowed}.")
