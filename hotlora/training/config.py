"""The options of one fine-tuning. Imports nothing heavy: the command line shows these defaults."""

import math
from dataclasses import dataclass

from ..base.errors import HotLoraError
from ..base.options import Options, option

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
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
    batch_size: int = option("Sequences of a batch, on each device.", 16, panel=_TRAINING)
    gradient_accumulation_steps: int = option("Batches added up for one optimizer step.", 1, panel=_TRAINING)
    learning_rate: float = option("Peak rate of AdamW.", 4e-4, panel=_TRAINING)
    lr_scheduler: str = option(
        "constant, constant_with_warmup, linear or cosine (the last two fall to 0).",
        "constant_with_warmup", panel=_TRAINING, flags=("--lr-scheduler", "--lr-scheduler-type"),
    )  # fmt: skip
    warmup_ratio: float = option(
        "Share of the steps over which the rate rises from 0; not used by constant.", 0.03, panel=_TRAINING
    )
    weight_decay: float = option("AdamW's decoupled decay.", 0.0, panel=_TRAINING)
    adam_beta2: float = option("Decay of AdamW's second moment (ESFT: 0.95).", 0.999, panel=_TRAINING)
    max_grad_norm: float = option("Gradients are scaled down to this norm; 0 leaves them.", 1.0, panel=_TRAINING)
    max_length: int = option("Tokens of an example; longer ones are cut from the right.", 512, panel=_TRAINING)
    packing: bool = option(
        "Several examples in one row of --max-length tokens, kept apart by their positions.", False, panel=_TRAINING
    )
    save_steps: int = option(
        "Optimizer steps between checkpoints; the last step always has one.", 100, panel=_TRAINING, resume="free"
    )
    eval_steps: int | None = option(
        "Optimizer steps between held-out losses, which need --test-data, --test-split or a task's own.", None,
        panel=_TRAINING,
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
    aux_loss_coef: float = option(
        "Weight of the router's load-balancing loss; 0 is off, whatever the model's config says.", 0.0, panel=_TRAINING
    )
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
    train_full_experts: bool = option(
        "Train the planned experts' own weights in place of low-rank updates (--method esft).", False, cli=False
    )
    report_to: str = option(
        "Where the metrics also go: wandb, trackio, tensorboard, …", "none", panel=_TRAINING, resume="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (
            "epochs", "batch_size", "gradient_accumulation_steps", "learning_rate", "save_steps", "r", "lora_alpha",
        )  # fmt: skip
        if_given = ("max_steps", "eval_steps", "early_stopping_patience", "neftune_noise_alpha")
        for name in (*positive, *(name for name in if_given if getattr(self, name) is not None)):
            self._check(name, 0 < getattr(self, name) < math.inf, "more than 0")
        for name in ("weight_decay", "max_grad_norm", "aux_loss_coef"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._check("seed", 0 <= self.seed < 2**32, "0 or more and below 2^32")  # numpy's generator takes no other
        self._check("max_length", self.max_length >= 2, "2 or more")
        self._check("warmup_ratio", 0 <= self.warmup_ratio < 1, "a share in [0, 1)")
        self._check("adam_beta2", 0 < self.adam_beta2 < 1, "in (0, 1)")
        self._check("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        if self.eval_steps is None and (self.load_best or self.early_stopping_patience is not None):
            raise HotLoraError("load_best and early_stopping_patience go by held-out losses: give eval_steps, too.")
        self._check("lr_scheduler", self.lr_scheduler in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise HotLoraError(f"{name} = {getattr(self, name)!r} is out of range: it must be {allowed}.")
