"""The options of whole runs: trainings, evaluations, profiles. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..base.errors import DataError, HotLoraError, PlanError
from ..base.options import Options, option
from ..base.sizes import parse_size
from ..routing.selection import UNTIL, Selection
from ..training.config import TrainConfig

PROFILE_FRACTION = 0.1
"""Share of the training examples in HELLoRA's warm-up set; MoE-Sieve finds that as many are enough to profile on (its
section 3.3)."""
WARMUPS = ("none", "lora")
BUDGETS = tuple(field.name for field in fields(Selection) if field.name not in ("rule", "signal"))
TRAIN_ON = ("assistant", "last", "all")
WARM_UP: Mapping[str, Any] = {
    "train_a": True, "use_dora": False, "train_full_experts": False, "grow_every": None, "perft": None,
    "perft_adapters": 1, "perft_top_k": 1, "dense_mixer": False, "keep": None, "granularity": "model",
    "dense_learning_rate": None, "fresh_a": False, "a_seed": None, "reprofile_every": None, "reprofile_left": "drop",
}  # fmt: skip
"""What a warm-up trains, whatever comes after it: plain LoRA."""
OFFLOADS = ("none", "cold", "all")
MOVED = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose state re-profiling moves with an expert's rows."""
VARIANTS = {
    "use_dora": "dora",
    "share_a": "share-a",
    "use_rslora": "rslora",
    "normalize_moe_lora": "by-k",
    "perft": "perft",
    "reprofile_every": "reprofile",
    "grow_every": "growing",
    "dense_mixer": "dense-mixer",
}
"""Options that make another method of one: what a condition's name gets from them."""
_NO_SALIENCY = "saliency is not gathered under expert parallelism: leave out one of the two."
_ATTENTION = (
    "eager, sdpa, flash_attention_2, … (default: transformers' choice; with sinks, as in gpt-oss, hotlora_sinks)."
)
_METHOD, _EXPERTS, _LORI, _DATA = "Method", "Which experts", "LoRI", "Data"


def variants(options: Mapping[str, Any]) -> list[str]:
    """The words for those of some options that are on."""
    return [word for name, word in VARIANTS.items() if options.get(name)]


def _check_split(share: float | None) -> None:
    if share is not None and not 0 < share < 1:
        raise DataError(f"test_split = {share} is out of range: it must be a share between 0 and 1.")


def check_offload(offload: str, folder: str | Path | None) -> None:
    """HotLoraError: there is no such way, or a folder for nothing."""
    if offload not in OFFLOADS:
        raise HotLoraError(f"offload = {offload!r} does not exist: choose one of {', '.join(OFFLOADS)}.")
    if folder is not None and offload == "none":
        raise HotLoraError("offload_folder goes with offloading: give offload cold or all, too.")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Options):
    """The base model, and how it is loaded."""

    model: str = option("A folder, a name on the Hub, or nano.", flags=("--model", "-m"))
    on_top_of: Sequence[str | Path] = option(
        "An adapter of an earlier task (its folder, or its run's), merged into the model first; may be given several "
        "times.", (), resume=None,
    )  # fmt: skip
    dtype: str = option(
        "float32, bfloat16 or float16; auto: the checkpoint's own on a GPU, float32 on the CPU.", "auto"
    )
    device: str = option(
        "cpu, cuda, cuda:1 (not to train: CUDA_VISIBLE_DEVICES=1), …; auto: cuda if there is one, else the CPU; to "
        "export, merge or combine the CPU.", "auto", resume=None,
    )  # fmt: skip
    attn_implementation: str | None = option(_ATTENTION, None)
    quantize: int | None = option(
        "Store the routed experts in 8 or 4 bits (pip install hotlora[quantize]); 0: make those of a checkpoint in "
        "MXFP4 or FP8 dense.", None,
    )  # fmt: skip
    quantize_linear: int | None = option(
        "Store attention, shared experts and dense MLPs in 8 or 4 bits, in bitsandbytes' own layers.", None
    )
    keep_hot: bool = option(
        "With --quantize: store the cold experts so, and leave the adapted ones.", False, resume=None
    )
    offload: str = option(
        "Keep experts out of the device's memory: cold (those that are not adapted), all, or none. For a GPU they wait "
        "in RAM; a CPU reads them from a file.", "none", resume="free",
    )  # fmt: skip
    offload_folder: str | Path | None = option(
        "Keep them in a file there, as large as they are, and gone at the end (default: RAM for a GPU, the working "
        "folder for a CPU).", None, resume=None,
    )  # fmt: skip
    expert_parallel: int = option(
        "Processes that share out each layer's experts (torchrun, accelerate launch).", 1, resume="free"
    )

    def loading(self) -> dict[str, Any]:
        """What `folder.load_base` takes beside the model."""
        names = (
            "on_top_of", "dtype", "device", "attn_implementation", "quantize", "quantize_linear", "offload",
            "offload_folder", "expert_parallel",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_offload(self.offload, self.offload_folder)


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """How the rows of people's own data are read, and what of them carries loss."""

    train_on: str = option(
        "What carries loss: assistant (every assistant turn; of prompt and completion the completion), last (the last "
        "answer alone) or all (prompts and answers).", "assistant", panel=_DATA, resume=None,
    )  # fmt: skip
    columns: str | Mapping[str, str] | None = option(
        "The data's own names of fields: prompt=question,completion=answer.", None, panel=_DATA, resume=None
    )
    apply_chat_template: bool | None = option(
        "Whether the model's chat template writes the rows (default: conversations and Alpaca's rows, where there is a "
        "template; not texts of prompt and completion).", None, panel=_DATA, resume=None,
        flags=("--apply-chat-template/--no-chat-template",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_on not in TRAIN_ON:
            raise DataError(f"train_on = {self.train_on!r} does not exist: choose one of {', '.join(TRAIN_ON)}.")

    def reading(self) -> dict[str, Any]:
        """What `load_examples` takes beside the source."""
        return {field.name: getattr(self, field.name) for field in fields(DataOptions)}


@dataclass(frozen=True, kw_only=True)
class RunOptions(LoadOptions, DataOptions, Selection, TrainConfig):
    """All options of `run_method`: what to train on what, which experts, and how.

    HotLoraError: an option of another type, out of range, or that does not go with another.
    """

    data: str = option(
        "A task (nano-math, gsm8k, …), a task and its files (spider:DIR); a file or a folder of rows (JSONL, JSON, "
        "CSV, Parquet); or a Hub id (owner/name:split).", flags=("--data", "-d"),
    )  # fmt: skip
    test_data: str | None = option("Held-out data, for its response loss; a task has its own.", None)
    test_split: float | None = option(
        "Hold out this share of the training data; a hash of each prompt says which rows.", None
    )
    limit: int | None = option("Use at most so many examples, the same ones for every seed.", None, resume=None)
    test_limit: int | None = option("The same for the held-out data.", None, resume=None)
    evaluate: bool = option("Score a task after training.", True)
    eval_batch_size: int = option(
        "Examples that are scored at a time; a held-out loss takes no more tokens than a step has.", 64, resume=None
    )
    condition: str | None = option(
        "The record's name for it (default: the rule, or the method).", None, cli=False, resume=None
    )
    fit: str | None = option(
        "Choose --quantize, --offload, --batch-size and --gradient-checkpointing so that a step fits into so much of "
        "the device's memory: 24GB, 22GiB, or auto (what is free). What is given beside it stays.", None, resume="free",
    )  # fmt: skip
    full: bool = option("Train all of the model's weights, in float32 unless dtype says otherwise.", False, cli=False)

    push_to_hub: str | None = option(
        "Push the trained adapter to the Hub when the run has ended, as NAME or OWNER/NAME.", None, resume=None
    )
    hub_private_repo: bool = option("Whether a repository that is made for it is private.", True, resume=None)

    profile: str | Path | None = option("Use this profile; none is made.", None, panel=_EXPERTS, resume=None)
    profile_until: float | None = option(
        "Profile on examples drawn at random until the chosen experts agree to this share (Jaccard, by a bootstrap "
        f"over examples) with those that any more such data would choose; 1: on all (default {UNTIL}; with "
        "--profile-fraction 1).",
        None, panel=_EXPERTS,
    )  # fmt: skip
    profile_fraction: float | None = option(
        "Share of the training data to profile the router on; with --profile-until at most (default: all).", None,
        panel=_EXPERTS,
    )  # fmt: skip
    plan: str | Path | None = option("Use this plan; no profile is made.", None, panel=_EXPERTS, resume=None)
    plan_seed: int | None = option("Of rules that draw (default: --seed, a new draw each).", None, panel=_EXPERTS)
    reprofile_every: int | None = option(
        "Profile the adapted model and choose again after every so many steps.", None, panel=_EXPERTS
    )
    reprofile_left: str = option(
        "What becomes of what experts that are not chosen again had learned: drop or merge.", "drop", panel=_EXPERTS
    )

    grow_every: int | None = option(
        "dr-lora: ranks of experts' projections grow every so many steps, from r/2, to r on average and 2r at most.",
        None, panel=_METHOD,
    )  # fmt: skip

    warmup: str = option(
        "lora: profile after a short LoRA on all experts (HELLoRA s4.1); or none.", "none", panel=_METHOD, resume=None
    )
    mask: str | Path | None = option(
        "lori-s: train the entries of this mask; no dense run comes first.", None, panel=_LORI, resume=None
    )
    keep: float | None = option("Share of B that trains (lori-s: 0.1).", None, panel=_LORI, resume=None)
    granularity: str = option(
        "The largest of what are kept: model, module, projection, layer or matrix.", "model", panel=_LORI, resume=None
    )
    dense_learning_rate: float | None = option("Of the dense run (default: the same).", None, panel=_LORI, resume=None)
    fresh_a: bool = option(
        "Another A for the sparse run than for the dense one, as in LoRI's own code.", False, panel=_LORI, resume=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("profile_fraction", "profile_until"):
            if (share := getattr(self, name)) is not None and not 0 < share <= 1:
                raise DataError(f"{name} = {share} is out of range: it must be in (0, 1].")
        _check_split(self.test_split)
        if self.fit not in (None, "auto"):
            parse_size("fit", str(self.fit))
        if self.test_split is not None and self.test_data is not None:
            raise DataError("test_data is held out already: leave test_split out.")
        if self.load_best and self.reprofile_every is not None:
            raise HotLoraError("with re-profiling the best weights may be other experts': leave load_best out.")
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if self.plan is not None and (budgets or self.profile is not None):
            raise PlanError("A plan names its experts already: leave out profile, fraction and every other budget.")
        if self.full and (
            self.quantize or self.quantize_linear or self.mask or self.reprofile_every or self.plan is not None
        ):
            raise HotLoraError(
                "full fine-tuning has no plan, mask or re-profiling, and no quantized weights: leave them out."
            )
        kinds = {
            "normalize_moe_lora": self.normalize_moe_lora, "use_dora (--dora)": self.use_dora,
            "perft": self.perft is not None, "train_full_experts": self.train_full_experts,
        }  # fmt: skip
        if self.full and (what := next((name for name, is_on in kinds.items() if is_on), None)):
            raise HotLoraError(f"full fine-tuning has no adapter: leave {what} out.")
        if self.dense_mixer and not (self.train_router or self.full):
            raise HotLoraError("dense_mixer is a gradient for routers: leave it out, or train the router.")
        if self.dense_mixer and self.perft is not None:
            raise HotLoraError(
                "dense_mixer mixes what experts give, and perft's adapters stand beside them: leave one out."
            )
        if self.perft in ("R", "D") and self.rule != "all" and self.plan is None:
            raise PlanError(
                f"perft {self.perft} has its adapters beside all experts of a layer, and rule {self.rule!r} chooses "
                "some: give rule all (methods perft-r and perft-d have it), or perft E, with an adapter for each."
            )
        if self.on_top_of and (self.quantize or self.quantize_linear):
            raise HotLoraError(
                "an earlier adapter cannot be merged into quantized weights: merge it first (hotlora merge), and give "
                "the merged model as model (--model); or leave out one of on_top_of and quantize."
            )
        if self.full and self.offload != "none":
            raise HotLoraError("full fine-tuning trains all weights: leave offload out.")
        if self.keep_hot and (not self.quantize or self.reprofile_every):
            raise HotLoraError(
                "keep_hot is for quantized experts that stay chosen: give quantize, and no reprofile_every."
            )
        if self.keep_hot and self.rule == "all" and self.plan is None:
            raise HotLoraError(
                "keep_hot leaves all experts as they are with rule all (methods lora, dora, lori): nothing would be "
                "quantized. Leave it out, or choose fewer experts (--rule hot, --method hellora)."
            )
        if self.reprofile_every is not None:
            self._check_reprofiling()
        if self.grow_every is not None:
            self._check_growth()
        if self.reprofile_left != "drop" and self.reprofile_every is None:
            raise HotLoraError("reprofile_left goes with re-profiling: give reprofile_every, too.")
        if self.keep is None and (self.dense_learning_rate is not None or self.fresh_a or self.granularity != "model"):
            raise HotLoraError(
                "dense_learning_rate, granularity and fresh_a are of LoRI's sparse run: give keep, or method lori-s."
            )
        if self.keep is not None and self.train_a:
            raise HotLoraError("keep is of LoRI's sparse run, whose A is frozen: give train_a false, or method lori-s.")
        if self.keep is not None and (self.use_dora or self.train_full_experts):
            what = "use_dora (--dora)" if self.use_dora else "train_full_experts (--method esft)"
            raise HotLoraError(f"LoRI's sparse run trains entries of B alone: leave out {what}, or keep (lori-s).")
        if self.a_seed is not None and self.train_a:
            raise HotLoraError("a_seed is of a frozen A: leave it out, or give train_a false (--lora-fa).")
        if self.warmup not in WARMUPS:
            raise HotLoraError(f"warmup {self.warmup!r} does not exist: choose one of {', '.join(WARMUPS)}.")
        if self.warmup != "none" and (self.profile is not None or self.plan is not None or self.full):
            raise HotLoraError("a warm-up is there to make a profile: leave out profile, plan and full fine-tuning.")
        if self.warmup != "none" and self.profile_until not in (None, 1):
            raise HotLoraError("a warm-up profiles the examples that it trained on: leave out profile_until.")
        if self.expert_parallel > 1 and self.signal == "saliency" and self.profiles:
            raise HotLoraError(_NO_SALIENCY)

    def _check_reprofiling(self) -> None:
        if self.plan is not None:
            raise PlanError("a given plan has no rule to select by again: leave out reprofile_every, or the plan.")
        wrong = {
            "a frozen A": not self.train_a, "a shared A": self.share_a, "DoRA": self.use_dora,
            "full experts": self.train_full_experts, "PERFT": self.perft is not None,
            "normalize_moe_lora": self.normalize_moe_lora,
        }  # fmt: skip
        if found := [name for name, is_on in wrong.items() if is_on]:
            raise HotLoraError(f"re-profiling moves plain LoRA factors only: leave out reprofile_every, or {found[0]}.")
        if self.optim not in MOVED:
            raise HotLoraError(
                f"re-profiling moves an expert's rows of AdamW's state, and optim is {self.optim!r}: leave out "
                f"reprofile_every, or give one of {', '.join(MOVED)}."
            )
        if self.reprofile_left == "merge" and self.quantize:
            raise HotLoraError(
                "what is learned cannot be merged into quantized experts: leave out quantize, or give reprofile_left "
                "drop."
            )

    def _check_growth(self) -> None:
        wrong = {
            "a frozen or shared A": not self.train_a or self.share_a, "DoRA": self.use_dora,
            "full experts": self.train_full_experts, "PERFT": self.perft is not None, "full fine-tuning": self.full,
            "re-profiling": self.reprofile_every is not None, "load_best": self.load_best, "extend": self.extend,
            "rsLoRA": self.use_rslora, "normalize_moe_lora": self.normalize_moe_lora,
        }  # fmt: skip
        if found := [name for name, is_on in wrong.items() if is_on]:
            raise HotLoraError(
                f"grow_every grows the ranks of plain LoRA over a training whose length is known: leave out {found[0]}."
            )
        if self.lr_scheduler == "constant":
            raise HotLoraError(
                "ranks grow by what a warm-up has shown, and the schedule constant has none: with grow_every give "
                "constant_with_warmup, or another."
            )

    @property
    def profiles(self) -> bool:
        """Whether a profile is made."""
        return self.plan is None and not self.full and (self.profile is None or self.reprofile_every is not None)

    @property
    def until(self) -> float:
        """`profile_until`, by default on where it is not said on how much to profile; 1 where no profile is made."""
        if not self.profiles:
            return 1.0
        if self.profile_until is not None:
            return self.profile_until
        return UNTIL if self.profile_fraction is None else 1.0

    @property
    def share_profiled(self) -> float:
        """`profile_fraction`, at most; where no profile is made, what records of such runs have always held."""
        if self.profile_fraction is not None:
            return self.profile_fraction
        return 1.0 if self.profiles else PROFILE_FRACTION

    def condition_by(self, rule: str) -> str:
        """What a run of these options is called that chooses by `rule`, with what makes another method of it."""
        more = variants(vars(self))
        frozen = [] if self.train_a else ["lora-fa"]
        return "-".join(["fft" if self.full else rule, *frozen, *more])

    def selection(self) -> Selection:
        """The rule and its budget alone."""
        return Selection(**{field.name: getattr(self, field.name) for field in fields(Selection)})

    def recorded(self) -> dict[str, Any]:
        return super().recorded() | {"profile_until": self.until, "profile_fraction": self.share_profiled}


@dataclass(frozen=True, kw_only=True)
class EvalOptions(LoadOptions, DataOptions):
    """What is scored: a model, or a model with a saved adapter."""

    adapter: str | Path | None = option("A run's folder, or a saved adapter; none: the model as it is.", None)
    merge: bool = option("Fold the adapter into the weights first, in memory: faster.", False)
    test_split: float | None = option("Of your own rows, those that a training with this test_split held out.", None)
    limit: int | None = option("Use at most so many examples, the same ones every time.", None)
    batch_size: int = option("Prompts that are answered at a time.", 64)
    max_new_tokens: int | None = option(
        "Tokens of an answer at most (default: the task's; of your own rows 16 more than their longest answer has).",
        None,
    )
    attn_implementation: str | None = option(_ATTENTION, None)
    quantize: int | None = option(
        "Store the routed experts in 8 or 4 bits; 0: do not (default: as in the adapter's training).", None
    )
    quantize_linear: int | None = option(
        "Store attention, shared experts and dense MLPs so; 0: do not (default: as in the adapter's training).", None
    )
    keep_hot: bool = option("With --quantize: not those of the adapter.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_split(self.test_split)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(LoadOptions, DataOptions):
    """What a routing profile is made with, beside its data."""

    profile_until: float = option(
        "Read examples, drawn at random, until the hot 25% agree to this share (Jaccard, by a bootstrap over examples) "
        "with those that any more such data would choose; 1: read all.", UNTIL,
    )  # fmt: skip
    saliency: bool = option(
        "Also gather saliency (gate weight x output norm: REAP's), for plans by --signal saliency; takes longer.", False
    )
    limit: int | None = option("Use at most so many examples, drawn by the seed.", None)
    batch_size: int = option("Sequences of a batch.", 16)
    max_length: int = option("Tokens of an example; longer ones are cut from the right.", 512)
    seed: int = option("Of which examples --limit draws, and of their order.", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.profile_until <= 1:
            raise DataError(f"profile_until = {self.profile_until} is out of range: it must be in (0, 1].")
        if self.expert_parallel > 1 and self.saliency:
            raise HotLoraError(_NO_SALIENCY)


PROFILE_LEAVES = ("on_top_of", "keep_hot")
"""What of `LoadOptions` says nothing of a profile."""
EVALUATE_LEAVES = ("adapter", "expert_parallel")
"""What of `EvalOptions` `hotlora.evaluate` has in its first argument, or not at all."""
