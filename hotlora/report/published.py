"""What MoE-Sieve published: its PDF (arXiv 2603.24044, also in its repository), of whose text some copies lack numbers.

Shares are fractions of 1, scores of trainings points. Names of models and data sets are the paper's; the data sets are
spelled as our tasks.
"""

from typing import Any

DATASETS = (
    "spider", "gsm8k", "hellaswag", "arc_challenge", "boolq", "piqa", "mmlu", "codealpaca", "wikitext2", "mbpp",
)  # fmt: skip
"""the ten of section 3.1, in its order"""

_OF_MODELS: dict[str, tuple[float, float, float]] = {
    # Section 3.1, its first table. An expert's width over a dense feed-forward layer's.
    "layers": (16, 24, 27), "num_experts": (64, 60, 64), "shared": (0, 4, 2), "num_experts_per_tok": (8, 4, 6),
    "expert_to_ffn": (1.0, 0.25, 0.13),
    # Table 2: means over the ten data sets.
    "global_cv": (0.216, 0.077, 0.106), "layer_cv": (0.869, 0.374, 0.514), "ratio": (4.0, 4.9, 4.9),
    "cold_share": (0.285, 0.052, 0.110), "coverage": (0.530, 0.374, 0.426),
    # Section 3.2, coverage: with the shared experts, per token.
    "coverage_with_shared": (0.53, 0.69, 0.57),
    # Section 3.3: hot sets of 10% subsamples; hot sets by count and by mass.
    "stability": (0.979, 0.941, 0.962), "signals_jaccard": (0.981, 0.920, 0.646),
    # Section 3.2, depth, on Spider: by ddof 0, as all else here. It prints them by ddof 1 (DEPTH_CV). OLMoE's are in
    # appendix A.1, Qwen's by its released counts, DeepSeek's the printed ones times sqrt(63/64).
    "first_cv": (0.81, 0.425, 0.526), "peak_cv": (1.63, 0.926, 1.181), "first_layer": (0, 0, 1),
    "peak_layer": (11, 20, 20),
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    model: {key: values[place] for key, values in _OF_MODELS.items()}
    for place, model in enumerate(("OLMoE-1B-7B", "Qwen1.5-MoE-A2.7B", "DeepSeek-MoE-16B"))
}

RATIOS = (3.6, 5.7)
"""section 3.1: the lowest (OLMoE, Wikitext) and highest (Qwen, GSM8K) ratio of layer CV to global CV of all 30 pairs"""

SPIDER_EXPERTS_FOR_60 = {"mean": 12.8, "min": 9, "max": 21}
"""section 3.2: OLMoE on Spider, experts of a layer that take 60% of its assignments"""

MBPP_STABILITY = {"DeepSeek-MoE-16B": 0.86, "Qwen1.5-MoE-A2.7B": 0.81}
"""section 3.3: the only two of 30 pairs below 0.90"""

OLMOE_SPIDER: dict[str, list[float]] = {
    # Table 7 (appendix A.1): one number a layer, from layer 0 to 15.
    "cv": [0.81, 0.85, 1.08, 1.09, 1.38, 1.46, 1.42, 1.54, 1.50, 1.43, 1.30, 1.63, 1.41, 1.40, 1.37, 1.53],
    "cold_share": [0.25, 0.23, 0.41, 0.47, 0.55, 0.47, 0.50, 0.50, 0.58, 0.53, 0.50, 0.55, 0.58, 0.56, 0.55, 0.59],
    "coverage": [0.53, 0.52, 0.59, 0.64, 0.71, 0.70, 0.72, 0.73, 0.73, 0.71, 0.68, 0.75, 0.72, 0.73, 0.72, 0.74],
    "entropy": [0.935, 0.938, 0.902, 0.886, 0.845, 0.837, 0.828, 0.815, 0.819, 0.836, 0.857, 0.809, 0.838, 0.835, 0.841,
                0.818],
}  # fmt: skip

HELLORA_OVERLAP = {"same": 11, "layers": 16, "experts_per_layer": 8}
"""HELLoRA section 4.1, figure 3: on OLMoE a 10% warm-up finds the real eight hot experts in 11 of 16 layers, and all
but one of them in the other five"""

DEPTH_CV = {"OLMoE-1B-7B": (0.82, 1.64), "Qwen1.5-MoE-A2.7B": (0.43, 0.93), "DeepSeek-MoE-16B": (0.53, 1.19)}
"""section 3.2, on Spider: CV of the first MoE layer and of the peak, as printed"""

CODE_ENTROPY, BROAD_ENTROPY = (0.83, 0.86), 0.97
"""section 3.2, OLMoE: from the lowest to the highest of its three code data sets; HellaSwag and Wikitext"""

ENTROPY = {
    "gsm8k": 0.9115, "codealpaca": 0.8592, "spider": 0.8524, "arc_challenge": 0.9377, "boolq": 0.9742, "piqa": 0.9310,
    "hellaswag": 0.9662, "mbpp": 0.8299, "mmlu": 0.9740, "wikitext2": 0.9706,
}  # fmt: skip
"""figure 5's titles: OLMoE's entropy, mean over layers"""

# Figure 3: OLMoE, Jaccard of the 16 hot experts of two data sets, in the figure's order.
JACCARD_ORDER = (
    "mbpp", "spider", "codealpaca", "gsm8k", "piqa", "arc_challenge", "hellaswag", "wikitext2", "mmlu", "boolq",
)  # fmt: skip
_JACCARD = (
    (0.48, 0.83, 0.42, 0.20, 0.36, 0.19, 0.13, 0.32, 0.11), (0.52, 0.38, 0.23, 0.29, 0.19, 0.16, 0.28, 0.20),
    (0.41, 0.22, 0.38, 0.22, 0.14, 0.33, 0.14), (0.32, 0.37, 0.26, 0.24, 0.35, 0.20), (0.36, 0.61, 0.25, 0.27, 0.26),
    (0.37, 0.20, 0.60, 0.22), (0.23, 0.28, 0.22), (0.25, 0.61), (0.27,),
)  # fmt: skip
JACCARD: dict[tuple[str, str], float] = {
    (one, other): value
    for i, (one, row) in enumerate(zip(JACCARD_ORDER, _JACCARD, strict=False))
    for other, value in zip(JACCARD_ORDER[i + 1 :], row, strict=True)
}

# Tables 3 and 5, section 6.1 (mean and standard deviation in points).
_OLMOE, _QWEN = "OLMoE-1B-7B", "Qwen1.5-MoE-A2.7B"
PAIRS: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    (_OLMOE, "spider"): {"all": (39.6, 2.6), "hot": (39.9, 1.5), "greedy": (40.5, 1.9)},
    (_OLMOE, "gsm8k"): {"all": (30.4, 1.1), "hot": (30.4, 0.6), "greedy": (30.4, 0.8)},
    (_OLMOE, "hellaswag"): {"all": (80.5, 0.5), "hot": (80.7, 0.8), "greedy": (80.6, 0.8)},
    (_QWEN, "spider"): {"all": (52.0, 1.4), "hot": (51.1, 0.5), "greedy": (50.9, 1.2)},
    (_QWEN, "gsm8k"): {"all": (59.0, 1.1), "hot": (59.2, 0.7), "greedy": (59.1, 1.0)},
    (_QWEN, "hellaswag"): {"all": (88.5, 0.2), "hot": (89.3, 0.1), "greedy": (89.5, 0.1)},
}
GREEDY: dict[tuple[str, str], tuple[int, int, float]] = {
    (_OLMOE, "gsm8k"): (12, 22, 56.8), (_OLMOE, "spider"): (12, 20, 68.4), (_OLMOE, "hellaswag"): (9, 21, 43.0),
    (_QWEN, "gsm8k"): (12, 19, 34.2), (_QWEN, "spider"): (12, 19, 48.2), (_QWEN, "hellaswag"): (11, 20, 36.4),
}  # fmt: skip
"""table 5: the fewest and the most experts of a layer, and what they cover, in percent"""
RANDOM: dict[int, dict[str, tuple[float, float]]] = {
    16: {"hot": (30.4, 0.6), "random": (27.9, 0.8)}, 8: {"hot": (29.1, 0.7), "random": (27.0, 1.1)},
}  # fmt: skip
"""section 6.1, OLMoE on GSM8K: experts of a layer -> hot and random, mean and sd"""
RANDOM_DIFFERENCE = {16: 2.5, 8: 2.1}
"""section 6.1: hot - random, in points"""
COV60 = {"gsm8k": (30.0, 30.4), "hellaswag": (81.1, 80.7)}
"""section 6.2, OLMoE: a coverage of 60%, and the hot 25%"""
SWEEP: dict[str, dict[str, tuple[float, float]]] = {
    "hellaswag": {"8": (79.0, 1.1), "16": (80.7, 0.8), "24": (80.6, 1.0), "32": (81.2, 0.7), "greedy": (80.6, 0.8),
                  "all": (80.5, 0.5)},
    "spider": {"8": (36.5, 1.2), "16": (39.9, 1.6), "greedy": (40.5, 1.9), "all": (39.6, 2.8)},
}  # fmt: skip
"""table 10 (appendix D), OLMoE: experts of a layer -> mean and sd"""

# Table 8 (appendix B) and the intervals of table 3: paired mean difference hot - all in points, TOST p by bound in
# points and p of the paired t test (.001 is printed as "<.001"), 95% interval.
_TABLE_8: dict[tuple[str, str], tuple[float, tuple[float, float, float], float, tuple[float, float]]] = {
    (_OLMOE, "gsm8k"): (-0.08, (0.003, 0.001, 0.001), 0.753, (-1.45, 1.30)),
    (_OLMOE, "hellaswag"): (0.17, (0.001, 0.001, 0.001), 0.243, (-0.71, 1.05)),
    (_OLMOE, "spider"): (0.30, (0.251, 0.065, 0.015), 0.771, (-2.04, 2.64)),
    (_QWEN, "gsm8k"): (0.20, (0.006, 0.001, 0.001), 0.425, (-0.77, 1.17)),
    (_QWEN, "hellaswag"): (0.73, (0.001, 0.001, 0.001), 0.001, (0.53, 0.93)),
    (_QWEN, "spider"): (-0.93, (0.429, 0.016, 0.001), 0.055, (-1.88, 0.03)),
}
EQUIVALENCE: dict[tuple[str, str], dict[str, Any]] = {
    key: {"difference": difference, "tost": dict(zip((1, 2, 3), tost, strict=True)), "t_test": t_test, "interval": ends}
    for key, (difference, tost, t_test, ends) in _TABLE_8.items()
}

# Table 6 (section 7.1): standard deviation over seeds of all experts and of 25%, as shares, and the ratio as printed.
SEED_SD: dict[tuple[str, str], tuple[float, float, float]] = {
    ("OLMoE-1B-7B", "spider"): (0.026, 0.015, 0.57),
    ("OLMoE-1B-7B", "gsm8k"): (0.011, 0.006, 0.58),
    ("OLMoE-1B-7B", "hellaswag"): (0.005, 0.008, 1.68),
    ("Qwen1.5-MoE-A2.7B", "spider"): (0.014, 0.005, 0.36),
    ("Qwen1.5-MoE-A2.7B", "gsm8k"): (0.011, 0.007, 0.59),
    ("Qwen1.5-MoE-A2.7B", "hellaswag"): (0.002, 0.001, 0.67),
}

# Table 9 (appendix C), OLMoE on GSM8K, from layer 0 to 15: coverage of 16 experts in percent; the greedy budget's
# number of experts, and their coverage.
UNIFORM_COVERAGE = [48.5, 48.0, 52.8, 52.4, 57.5, 58.7, 66.6, 58.2, 60.5, 58.8, 55.4, 62.5, 60.3, 59.5, 51.0, 56.1]
GREEDY_EXPERTS = [15, 14, 16, 19, 16, 15, 17, 17, 15, 12, 15, 12, 15, 16, 20, 22]
GREEDY_COVERAGE = [46.8, 44.5, 52.8, 57.8, 57.5, 56.9, 68.4, 60.0, 58.8, 51.9, 53.6, 55.7, 58.6, 59.5, 58.3, 67.7]

# Table 4 (section 5.2): all experts and the hot 25%.
COST: dict[str, dict[str, tuple[float, float]]] = {
    "OLMoE-1B-7B": {"parameters": (311.5e6, 85.0e6), "bytes": (1.25e9, 340e6), "seconds": (6480, 3240)},
    "Qwen1.5-MoE-A2.7B": {"parameters": (509.7e6, 151.3e6), "bytes": (2.04e9, 606e6), "seconds": (12180, 6240)},
}

# Table 4 as printed: shares saved. Of the checkpoints it took a GB for 1,024 MB; their sizes give 0.728 and 0.703.
SAVED: dict[str, dict[str, float]] = {
    "OLMoE-1B-7B": {"parameters": 0.727, "bytes": 0.734, "seconds": 0.50},
    "Qwen1.5-MoE-A2.7B": {"parameters": 0.703, "bytes": 0.710, "seconds": 0.49},
}

# HELLoRA, table 6: samples a second of _pure, _gate and all, OLMoE on GSM8K, two A100.
THROUGHPUT = {
    "lora": (10.01, 11.97, 10.44), "lori-d": (10.95, 10.98, 10.65), "lori-s": (10.77, 10.91, 10.00),
    "hellora": (19.60, 19.20, 19.08), "hellori-d": (18.41, 19.03, 19.11), "hellori-s": (19.45, 19.02, 19.07),
}  # fmt: skip
HELLORA_SPEEDUP = {"lora": 1.62, "fft": 3.5}
"""HELLoRA, section 4.4: its throughput over LoRA's, the warm-up counted, and over full fine-tuning's"""
