"""Times the challengers' training steps beside what each computes by its own definition, on nano.

    python benchmarks/methods.py --output benchmarks/methods/cpu.json

A step is forward with loss, backward, what the method does between (DR-LoRA's growing), and AdamW. Pairs are in one
process and take turns; a ratio is of two steps of one round. Both of a pair multiply as much: DR-LoRA holds all experts
at twice its rank; rank divided by K is that rank; a shared A is one A expanded; PERFT's E at r 9 takes 2 x 9 x 128
multiplications a row, as LoRA at r 4 on three projections does, 3 x 4 x (128 + 64).
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from peft import get_peft_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.base.files import write_json
from hotlora.base.records import environment
from hotlora.hf.models import load_model
from hotlora.hf.moe_layers import moe_layers
from hotlora.routing.plan import ExpertPlan
from hotlora.training.rank_growth import Growth, RankGrowth, allocated

ALONE = {"train_attention": False, "train_router": False}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dr-lora, r 6": ({"growing": 6, "train_attention": False}, {"r": 12, "lora_alpha": 24, "train_attention": False}),
    "normalize-moe-lora, r 16": ({"r": 16, "normalize_moe_lora": True, **ALONE}, {"r": 4, **ALONE}),
    "share-a, r 4": ({"r": 4, "share_a": True, **ALONE}, {"r": 4, **ALONE}),
    "perft-e, r 9": ({"r": 9, "perft": "E", **ALONE}, {"r": 4, **ALONE}),
}
WORDS = {
    "dr-lora, r 6": "LoRA on all experts, r 12", "normalize-moe-lora, r 16": "LoRA on all experts, r 4",
    "share-a, r 4": "LoRA on all experts, r 4", "perft-e, r 9": "LoRA on all experts, r 4",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    found = {name: compare(pair, options) for name, pair in PAIRS.items()}
    for name, its in found.items():
        print(f"{name}: {its['ratio']:.2f} of {WORDS[name]}")
    if options.output:
        settings = {name: getattr(options, name) for name in ("rows", "length", "rounds")}
        record = {"started": started, **settings, "threads": torch.get_num_threads(), "environment": environment()}
        write_json(options.output, {**record, "pairs": found})


def compare(pair: tuple[dict[str, Any], dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both steps, round by round, and the median of their ratios."""
    steps = [stepper(way, options) for way in pair]
    for step in steps * 2:
        step()
    rounds: list[list[float]] = []
    for number in range(options.rounds):
        order = (0, 1) if number % 2 else (1, 0)
        times = [0.0, 0.0]
        for place in order:
            start = time.perf_counter()
            steps[place]()
            times[place] = time.perf_counter() - start
        rounds.append(times)
    return {
        "method": median(a for a, _ in rounds), "definition": median(b for _, b in rounds),
        "ratio": median(a / b for a, b in rounds), "rounds": rounds,
    }  # fmt: skip


def stepper(way: dict[str, Any], options: argparse.Namespace) -> Callable[[], None]:
    """A training step of nano with all experts adapted."""
    given = dict(way)
    r = given.pop("growing", None)
    base = load_model("nano", device="cpu")
    layers = moe_layers(base)
    plan = ExpertPlan({at.layer: tuple(range(at.num_experts)) for at in layers}, layers[0].num_experts, "all", {})
    model: Any = get_peft_model(base, HotLoraConfig(plan=plan, **given, **(allocated(r, 2 * r) if r else {}))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    growing = None
    if r:
        growing = RankGrowth(model, r, 1, Path(tempfile.mkdtemp()) / "ranks.jsonl")
        for layer in growing.layers.values():
            layer.growth = Growth(r, len(layer.ranks), 1, 1000, 1)
    ids = torch.randint(3, 500, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    state = SimpleNamespace(global_step=0)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if growing is not None:
            growing.on_pre_optimizer_step(None, state, None)
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1

    return step


if __name__ == "__main__":
    main()
