"""The options of `hotlora.train`, `profile` and `evaluate` as keywords, which type checkers read.

Made by scripts/docs.py from `options.RunOptions` and `options.ProfileOptions`, which have the defaults.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


class TrainKeywords(TypedDict, total=False):
    """Of `hotlora.train`."""

    epochs: float
    max_steps: int | None
    extend: bool
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str
    lr_scheduler_kwargs: str | Mapping[str, Any] | None
    warmup_ratio: float
    warmup_steps: int | None
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    max_length: int
    packing: bool
    save_steps: int
    save_total_limit: int
    eval_steps: int | None
    load_best: bool
    early_stopping_patience: int | None
    optim: str
    neftune_noise_alpha: float | None
    seed: int
    gradient_checkpointing: bool
    activation_offloading: bool
    aux_loss_coef: float
    dense_mixer: bool
    r: int
    lora_alpha: int
    lora_dropout: float
    train_attention: bool
    train_router: bool
    train_shared: bool
    use_rslora: bool
    use_dora: bool
    train_a: bool
    a_seed: int | None
    share_a: bool
    perft: str | None
    perft_adapters: int
    perft_top_k: int
    normalize_moe_lora: bool
    report_to: str
    rule: str
    fraction: float | None
    experts_per_layer: int | str | None
    p: float | None
    budget: int | None
    fillers: int | None
    scores: str | Path | None
    signal: str
    train_on: str
    columns: str | Mapping[str, str] | None
    apply_chat_template: bool | None
    on_top_of: Sequence[str | Path]
    dtype: str
    device: str
    attn_implementation: str | None
    quantize: int | None
    quantize_linear: int | None
    keep_hot: bool
    offload: str
    offload_folder: str | Path | None
    expert_parallel: int
    test_split: float | None
    limit: int | None
    test_limit: int | None
    evaluate: bool
    eval_batch_size: int
    fit: str | None
    push_to_hub: str | None
    hub_private_repo: bool
    profile: str | Path | None
    profile_until: float | None
    profile_fraction: float | None
    plan: str | Path | None
    plan_seed: int | None
    reprofile_every: int | None
    reprofile_left: str
    grow_every: int | None
    warmup: str
    mask: str | Path | None
    keep: float | None
    granularity: str
    dense_learning_rate: float | None
    fresh_a: bool

    # transformers' names of these
    num_train_epochs: float
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    lr_scheduler_type: str
    load_best_model_at_end: bool
    activation_checkpointing: bool
    max_seq_length: int
    output_dir: str | os.PathLike[str] | None


class ProfileKeywords(TypedDict, total=False):
    """Of `hotlora.profile`."""

    train_on: str
    columns: str | Mapping[str, str] | None
    apply_chat_template: bool | None
    dtype: str
    device: str
    attn_implementation: str | None
    quantize: int | None
    quantize_linear: int | None
    offload: str
    offload_folder: str | Path | None
    expert_parallel: int
    profile_until: float
    saliency: bool
    limit: int | None
    batch_size: int
    max_length: int
    seed: int


class EvaluateKeywords(TypedDict, total=False):
    """Of `hotlora.evaluate`."""

    train_on: str
    columns: str | Mapping[str, str] | None
    apply_chat_template: bool | None
    on_top_of: Sequence[str | Path]
    dtype: str
    device: str
    attn_implementation: str | None
    quantize: int | None
    quantize_linear: int | None
    keep_hot: bool
    offload: str
    offload_folder: str | Path | None
    merge: bool
    test_split: float | None
    limit: int | None
    batch_size: int
    max_new_tokens: int | None
