"""What DenseMixer costs: a training step of nano with and without it, in one thread of the CPU, as a ratio.

    python scripts/dense_mixer.py

CPU time, the least of nine steps each, in turn. Beside it what a step takes more, counted in forwards of the routed
experts, which is (E - K) / K by definition.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import get_peft_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.hf.models import load_model
from hotlora.hf.moe_layers import moe_layers, num_experts_per_tok
from hotlora.routing.plan import ExpertPlan
from hotlora.training.dense_mixer import dense_mixer

ROWS, LENGTH, TIMES = 16, 64, 9


def main() -> None:
    torch.set_num_threads(1)
    for fraction in (0.25, 1.0):
        base: Any = load_model("nano", device="cpu")
        layers, top_k = moe_layers(base), num_experts_per_tok(base)
        num_experts = layers[0].num_experts
        kept = tuple(range(round(fraction * num_experts)))
        plan = ExpertPlan({layer.layer: kept for layer in layers}, num_experts, "first", {})
        model: Any = get_peft_model(base, HotLoraConfig(plan=plan, r=32)).train()
        plain, mixed = _steps(model)
        forward = len(layers) * _forward(model, num_experts, top_k)
        print(
            f"{fraction:.0%} of the experts adapted: {plain * 1e3:.0f} ms a step, {mixed * 1e3:.0f} with dense_mixer: "
            f"{mixed / plain:.2f} times; {(mixed - plain) / forward:.1f} forwards of the experts more, by definition "
            f"{(num_experts - top_k) / top_k:.1f}"
        )


def _steps(model: Any) -> tuple[float, float]:
    """Seconds of a step without and with it."""
    ids = torch.randint(3, 500, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    found: dict[bool, list[float]] = {False: [], True: []}

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    for _ in range(TIMES):
        for is_mixed, times in found.items():
            with dense_mixer(model) if is_mixed else nullcontext():
                times.append(_seconds(step))
    return min(found[False]), min(found[True])


@torch.no_grad()
def _forward(model: Any, num_experts: int, top_k: int) -> float:
    """Seconds of one layer's experts, forward."""
    base = model.get_base_model()
    experts = base.get_submodule(moe_layers(base)[0].experts)
    draw, tokens = torch.Generator().manual_seed(0), ROWS * LENGTH
    hidden = torch.randn(tokens, base.config.hidden_size, generator=draw)
    index = torch.rand(tokens, num_experts, generator=draw).topk(top_k).indices
    weights = torch.full((tokens, top_k), 1 / top_k)
    return min(_seconds(lambda: experts(hidden, index, weights)) for _ in range(TIMES))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
