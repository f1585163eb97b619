"""The papers' methods and hyperparameters by name, as options of a run. Imports nothing heavy.

HELLoRA's table 1 and section 4, MoE-Sieve's sections 4 and 5.1 and its released code, LoRI (arXiv 2504.07448, its
appendix), ESFT (arXiv 2407.01906), DR-LoRA (arXiv 2601.04823, version 3, its table 6), PERFT
(arXiv 2411.08212, 2508.02587; of its scripts' grids one of each kind).
Any option given beside a name comes before what the name stands for.
"""

from dataclasses import fields
from typing import Any

from ..base.errors import HotLoraError
from ..base.options import did_you_mean, suggest
from .options import PROFILE_FRACTION, RunOptions, variants

_FROZEN_A = {"train_a": False}
_SPARSE = {**_FROZEN_A, "keep": 0.1}
# HELLoRA's k is the model's own K: 8 of OLMoE's 64, 2 of Mixtral's 8.
_HELLORA = {"rule": "hot", "experts_per_layer": "top_k"}
_EXPERTS_ONLY = {"train_attention": False, "train_router": False, "train_shared": False}

METHODS: dict[str, dict[str, Any]] = {
    "fft": {"full": True},
    "lora": {"rule": "all"},
    "dora": {"rule": "all", "use_dora": True},
    "lori-d": {"rule": "all", **_FROZEN_A},
    "lori-s": {"rule": "all", **_SPARSE},
    "hellora": _HELLORA,
    "hellori-d": {**_HELLORA, **_FROZEN_A},
    "hellori-s": {**_HELLORA, **_SPARSE},
    "sieve": {"rule": "hot", "fraction": 0.25, "lora_dropout": 0.05},
    "dr-lora": {"rule": "all", "grow_every": 200, "train_attention": False, "train_shared": False},
    "perft-e": {"rule": "all", "perft": "E", **_EXPERTS_ONLY},
    "perft-r": {"rule": "all", "perft": "R", "perft_adapters": 4, **_EXPERTS_ONLY},
    "perft-d": {"rule": "all", "perft": "D", "perft_adapters": 2, **_EXPERTS_ONLY},
    "perft-s": {"rule": "all", "perft": "D", **_EXPERTS_ONLY},
    "esft": {"rule": "cumulative", "train_full_experts": True, **_EXPERTS_ONLY},
}
"""method -> options of `stages.run_method`"""

PLACEMENTS: dict[str, dict[str, Any]] = {
    "full": {},
    "gate": {"train_attention": False, "train_router": True, "train_shared": False},
    "pure": _EXPERTS_ONLY,
}
"""What is adapted beside the planned experts: what the method has; the router alone; nothing (HELLoRA s4.5.2)."""

_AS_HELLORA: dict[str, Any] = {"lr_scheduler": "constant", "batch_size": 128, "profile_fraction": PROFILE_FRACTION}
_AS_LORI: dict[str, Any] = {"lr_scheduler": "constant", "batch_size": 32}
MOE_SIEVE: dict[str, Any] = {
    "epochs": 3, "learning_rate": 4e-4, "lr_scheduler": "linear", "warmup_ratio": 0.0, "batch_size": 8,
    "gradient_accumulation_steps": 8, "max_length": 2048, "train_on": "all", "profile_fraction": 1.0,
}  # fmt: skip
"""MoE-Sieve's protocol: the batches, the schedule, the length and the loss on prompts too are its code's."""
_DOMAINS = {"math": (3, 4e-4, 4e-5), "code": (2, 2e-3, 2e-4), "safety": (1, 4e-4, 2e-5)}
"""domain -> epochs, learning rate, and that of full fine-tuning"""


def _presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for domain, (epochs, rate, full_rate) in _DOMAINS.items():
        for method in ("lora", "dora", "hellora", "hellori-d", "hellori-s"):
            presets[f"{method}-{domain}"] = {"method": method, "epochs": epochs, "learning_rate": rate, **_AS_HELLORA}
        presets[f"fft-{domain}"] = {
            "method": "fft", "epochs": epochs, "learning_rate": full_rate, **_AS_HELLORA, "batch_size": 256,
        }  # fmt: skip
        presets[f"lori-d-{domain}"] = {"method": "lori-d", "epochs": epochs, "learning_rate": 5e-5, **_AS_LORI}
        presets[f"lori-s-{domain}"] = {
            "method": "lori-s", "epochs": epochs, "learning_rate": 5e-4, "dense_learning_rate": 5e-5, **_AS_LORI,
        }  # fmt: skip
    presets["dr-lora"] = {
        "method": "dr-lora", "r": 64, "lora_alpha": 128, "epochs": 1, "learning_rate": 2e-5, "lr_scheduler": "linear",
        "batch_size": 16, "max_length": 4096,
    }  # fmt: skip
    presets["sieve"] = {"method": "sieve", **MOE_SIEVE}
    for name, signal in (("token", "count"), ("gate", "mass")):
        presets[f"esft-{name}"] = {
            "method": "esft", "signal": signal, "learning_rate": 1e-5, "lr_scheduler": "constant",
            "adam_beta2": 0.95, "weight_decay": 0.1,
        }  # fmt: skip
    return presets


PRESETS = _presets()
"""preset -> its method, and the hyperparameters as published"""


def resolve(
    method: str | None = None, *, preset: str | None = None, placement: str | None = None, **given: Any
) -> RunOptions:
    """The options of a run that a method, a preset and a placement stand for.

    Args:
        method, preset, placement: names from METHODS, PRESETS and PLACEMENTS. A preset has its own method.
        given: fields of `RunOptions`; they come before the names'.

    Raises:
        HotLoraError: a name that does not exist, or two methods; an option as `RunOptions` refuses it.
    """
    options: dict[str, Any] = {}
    if preset is not None:
        options |= _named("preset", PRESETS, preset)
        own = options.pop("method")
        if method not in (None, own):
            raise HotLoraError(
                f"preset {preset!r} is for method {own!r}, and method is {method!r}: leave one of them out."
            )
        method = own
    if method is not None:
        options = _named("method", METHODS, method) | options
    if placement is not None:
        options |= _named("placement", PLACEMENTS, placement)
    # None is what is not given, where an option has no other default.
    given = {n: v for n, v in given.items() if v is not None or getattr(RunOptions, n, ...) is not None}
    if {"fraction", "experts_per_layer", "budget", "plan"} & given.keys():  # the budget is the user's
        options = {name: value for name, value in options.items() if name not in ("fraction", "experts_per_layer")}
    if "rule" in given and given["rule"] != options.get("rule"):
        options = {name: value for name, value in options.items() if name not in ("fraction", "experts_per_layer")}
    if method is not None:
        suffix = "" if placement in (None, "full") else f"-{placement}"
        more = variants({name: value for name, value in given.items() if name not in METHODS[method]})
        options["condition"] = "-".join([f"{method}{suffix}", *more])
    options |= given
    known = [field.name for field in fields(RunOptions)]
    if unknown := sorted(set(options) - set(known)):
        raise HotLoraError(f"{suggest(unknown, known)}: no such option (docs/options.md has all).")
    return RunOptions(**options)


def counted_options(method: str | None, placement: str | None) -> dict[str, Any]:
    """What a method's and a placement's names mean to `count.parameters_from_config`."""
    options = _named("method", METHODS, method) if method else {}
    options |= _named("placement", PLACEMENTS, placement) if placement else {}
    rule = options.pop("rule", None)
    options.pop("lora_dropout", None)
    if "grow_every" in options:
        raise HotLoraError(
            f"method {method!r} trains two of an expert's three projections, at ranks that training decides: count "
            "lora with --placement gate; it trains two thirds of those of the experts."
        )
    if rule == "cumulative":
        raise HotLoraError(
            f"method {method!r} trains as many experts as the data's routing says: count another method."
        )
    return options


def _named(kind: str, known: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if not isinstance(name, str) or name not in known:
        near = did_you_mean(name, known)
        raise HotLoraError(f"{kind} {name!r} does not exist{near}: choose one of {', '.join(known)}.")
    return dict(known[name])
