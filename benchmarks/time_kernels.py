"""Times grouped products by torch and by our Triton kernels, and the whole layer on either, at OLMoE-1B-7B's sizes.

    python benchmarks/time_kernels.py --output benchmarks/kernels/h200.json

Rows are divided among experts as a router with CV 1 does it. Each time is the median of Triton's `do_bench`, which
empties the cache before each run. The two results of each pair are compared too (`difference`: relative, in norm). On a
CPU, with TRITON_INTERPRET=1 and tiny sizes, it only shows that everything runs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hotlora.base.files import write_json
from hotlora.base.records import environment
from hotlora.hf.experts_view import ExpertsView, FrozenWeight
from hotlora.layer import gpu
from hotlora.layer.function import Layer as RoutedLayer
from hotlora.layer.function import RoutedExperts
from hotlora.layer.kernels import gemm
from hotlora.layer.updates import LowRank


@dataclass(frozen=True)
class Sizes:
    tokens: int = 8192
    hidden: int = 2048
    expert_width: int = 1024
    experts: int = 64
    top_k: int = 8
    hot: int = 16
    r: int = 32
    dtype: str = "bfloat16"
    cv: float = 1.0
    seed: int = 0


class Layer:
    """One layer's experts, factors, routing and inputs of random values."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, dtype = sizes, getattr(torch, sizes.dtype)
        torch.manual_seed(sizes.seed)
        config = AutoConfig.for_model(
            "olmoe", vocab_size=64, hidden_size=sizes.hidden, intermediate_size=sizes.expert_width, num_hidden_layers=1,
            num_attention_heads=8, num_experts=sizes.experts, num_experts_per_tok=sizes.top_k, pad_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.experts = model.model.layers[0].mlp.experts.to(device).requires_grad_(False)
        # Lognormal popularities; the logarithm's deviation gives about the CV asked for.
        popularity = torch.randn(sizes.experts) * torch.tensor(1 + sizes.cv**2).log().sqrt()
        scores = popularity + torch.distributions.Gumbel(0, 1).sample((sizes.tokens, sizes.experts))
        self.index_TK = scores.topk(sizes.top_k).indices.to(device)
        self.weights_TK = torch.rand(sizes.tokens, sizes.top_k).to(device, dtype).requires_grad_()
        self.hidden_TD = torch.randn(sizes.tokens, sizes.hidden).to(device, dtype).requires_grad_()
        counts = self.index_TK.flatten().bincount(minlength=sizes.experts)
        self.cv = float(counts.double().std(correction=0) / counts.double().mean())
        ids_N = counts.topk(sizes.hot).indices.sort().values
        self.coverage = float(counts[ids_N].sum() / counts.sum())
        n, r, width, inner = sizes.hot, sizes.r, sizes.hidden, sizes.expert_width
        shapes = [(n, 2 * r, width), (n, 2 * inner, r), (n, r, inner), (n, width, r)]
        self.tensors = [(torch.randn(s) * 0.02).to(device, dtype).requires_grad_() for s in shapes]
        self.factors = LowRank(ids_N, *self.tensors, scaling=2.0)
        self.rows = gpu.Rows(sizes.experts, self.index_TK, is_partial=False)

    def step(self) -> list[Tensor]:
        """Output and all gradients of the adapted layer."""
        inputs = (self.hidden_TD, self.index_TK, self.weights_TK)
        view = ExpertsView(self.experts)
        layer = RoutedLayer(view, [self.factors], gpu)
        output = RoutedExperts.apply(layer, *inputs, *view.tensors(), *self.tensors)
        return [output, *torch.autograd.grad(output, [self.hidden_TD, self.weights_TK, *self.tensors], output.detach())]


def pairs(layer: Layer) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], float]]:
    """Name -> torch's, ours, and the multiply-adds of the rows that take part, twice."""
    experts, rows, dtype = layer.experts, layer.rows, layer.hidden_TD.dtype
    num_rows, width, inner = len(rows.expert_S), layer.sizes.hidden, layer.sizes.expert_width
    x_SD = layer.hidden_TD.detach().index_select(0, rows.token_S)
    os.environ["HOTLORA_KERNELS"] = "torch"
    up_SPF = gpu.grouped_linear(x_SD, experts.gate_up_proj, rows.ends_E)
    act_SF = up_SPF[:, :inner].contiguous()
    ends = rows.ends_E

    def by(way: str, function: Callable[[], Any]) -> Callable[[], Any]:
        def chosen() -> Any:
            os.environ["HOTLORA_KERNELS"] = way
            return function()

        return chosen

    def product(x: Tensor, weight: Tensor) -> tuple[Callable[[], Any], Callable[[], Any], float]:
        flops = 2.0 * num_rows * weight.shape[1] * weight.shape[2]
        torchs = by("torch", lambda: gpu.grouped_linear(x, weight, ends))
        return torchs, lambda: gemm.grouped_gemm(x, weight, ends), flops

    factors = layer.factors.in_pass(layer.tensors, dtype, (None, None, None))
    hot = gpu.Hot(rows, factors)
    z_SR = gemm.grouped_gemm(x_SD, factors.A_up, ends, hot.slot_E)
    low_rank = gemm.LowRank(factors.A_up, factors.B_up, hot.slot_E, 2.0)
    hot_rows = num_rows * layer.coverage
    r = layer.sizes.r

    def up_and_update() -> Tensor:
        y_SPF = rows.product(x_SD, FrozenWeight(experts.gate_up_proj, is_transposed=False))
        factors.up(hot, y_SPF.chunk(2, dim=1), x_SD)
        return y_SPF

    def outer() -> Tensor:
        return gpu.hot_outer(z_SR, x_SD, ends, layer.factors.expert_ids_N)

    up_flops = 4.0 * num_rows * width * inner + hot_rows * 2 * (2 * r * width + 2 * r * inner)
    return {
        "up": product(x_SD, experts.gate_up_proj),
        "up, gradient of x": product(up_SPF, experts.gate_up_proj.transpose(1, 2)),
        "down": product(act_SF, experts.down_proj),
        "down, gradient of x": product(x_SD, experts.down_proj.transpose(1, 2)),
        "gradient of A": (
            by("torch", outer),
            by("triton", outer),
            hot_rows * 2 * 2 * r * width,
        ),
        "up and its update": (
            by("torch", up_and_update),
            by("triton", up_and_update),
            up_flops,
        ),
        "up and its update in one kernel": (
            by("torch", up_and_update),
            lambda: gemm.grouped_gemm_low_rank(x_SD, experts.gate_up_proj, ends, low_rank)[0],
            up_flops,
        ),
        "layer, forward and backward": (
            by("torch", layer.step),
            by("triton", layer.step),
            3 * (up_flops + 2.0 * num_rows * width * inner + hot_rows * 2 * (r * inner + r * width)),
        ),
    }


def milliseconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(function, warmup=200, rep=1000, return_mode="median"))
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


def difference(ours: Any, reference: Any) -> float:
    both = zip(*(x if isinstance(x, list) else [x] for x in (ours, reference)), strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the result as JSON; without it, printed only")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    output, sizes = given.pop("output"), Sizes(**given)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    layer = Layer(sizes, "cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, dict[str, float]] = {}
    for name, (by_torch, by_us, flops) in pairs(layer).items():
        apart = difference(by_us(), by_torch())
        times = {"torch_ms": milliseconds(by_torch), "ours_ms": milliseconds(by_us)}
        rates = {name.replace("ms", "tflops"): flops / ms / 1e9 for name, ms in times.items()}
        results[name] = {**times, **rates, "difference": apart}
        print(f"{name:32}" + "  ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
    if output:
        command = " ".join(["python", *sys.argv])
        record = {
            "started": started, "command": command, "environment": environment() | {"triton": gemm.triton.__version__},
            "sizes": asdict(sizes), "cv": layer.cv, "coverage": layer.coverage, "results": results,
        }  # fmt: skip
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, record)
        print(json.dumps({"written": str(output)}))


if __name__ == "__main__":
    main()
