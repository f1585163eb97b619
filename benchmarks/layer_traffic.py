"""Counts what one routed layer does on a GPU, forward and backward: kernels launched, and bytes read and written.

    python benchmarks/layer_traffic.py --json > benchmarks/traffic/layer.json

Nothing is timed and no GPU is needed. The code that a GPU runs is run on tensors without values, at the sizes given
(OLMoE-1B-7B's): every operation that torch dispatches is seen, and every launch of a kernel of ours, with its tensors.
`floor` is transformers' own experts (`grouped_mm`) with frozen weights, `hot` this library's layer with LoRA on the
hot experts, `all` the same with LoRA on all experts; forward, and the gradients of hidden states, routing weights and
factors. The router and all that is outside of the experts is not in it.
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

COUNTED = (
    "A kernel is a launch of ours in Triton, or an operation of torch's that makes or changes values (several kernels "
    "of torch's where it sorts). Of a kernel each array that it takes counts once as read and each that it makes once "
    "as written, whatever a cache saves or a kernel reads twice; a gather reads as many rows as it makes, a scatter "
    "writes as many as it takes or has room for, and a kernel for hot experts reads and writes their rows, "
    "whose share is that of a routing drawn with the CV given. Weights are in it. bytes: of a token."
)


@dataclass(frozen=True)
class Sizes:
    tokens: int = 16384
    hidden: int = 2048
    expert_width: int = 1024
    experts: int = 64
    top_k: int = 8
    hot: int = 16
    r: int = 32
    cv: float = 1.0
    capability: int = 90
    """of the GPU, times ten"""

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


@dataclass
class Kernel:
    """What was launched."""

    name: str
    read: int
    written: int
    is_torch_on_rows: bool = False
    """an operation of torch's, and one of its arrays has a row for each of a token's experts"""


@dataclass
class Count:
    kernels: list[Kernel] = field(default_factory=list)

    def as_dict(self, sizes: Sizes) -> dict[str, Any]:
        read, written = (sum(getattr(kernel, name) for kernel in self.kernels) for name in ("read", "written"))
        names: dict[str, int] = {}
        for kernel in self.kernels:
            names[kernel.name] = names.get(kernel.name, 0) + 1
        return {
            "launches": len(self.kernels),
            "bytes": round((read + written) / sizes.tokens),
            "read": round(read / sizes.tokens),
            "written": round(written / sizes.tokens),
            "torch_on_rows": sum(kernel.is_torch_on_rows for kernel in self.kernels),
            "kernels": names,
        }


def nbytes(tensor: Tensor) -> int:
    """Of what it has in memory: a dimension that is expanded counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(sizes) * tensor.element_size()


# Operations that launch nothing, besides views.
_NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")
# Their input gives a shape alone.
_MADE_LIKE = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like")
# What they write is not read before.
_ONLY_WRITTEN = ("copy_", "fill_", "zero_", "index_copy_", "bernoulli_", "random_")
_GATHERS = ("index_select", "index", "embedding", "gather")
_SCATTERS = ("index_copy_", "index_add_", "index_put_", "_index_put_impl_", "index_add", "index_put", "scatter_")


class TorchOperations(TorchDispatchMode):
    """Counts each operation that makes or changes values."""

    def __init__(self, sizes: Sizes, count: Count) -> None:
        super().__init__()
        self.sizes, self.count = sizes, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in _NO_KERNEL or func._schema.name.startswith("prim"):
            return out
        inputs, changed = self._arguments(func, args, kwargs)
        made = [] if changed else _tensors(out)
        if name == "_to_copy" or made or changed:
            self._add(name, inputs, changed, made)
        return out

    @staticmethod
    def _arguments(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """What is read only, and what is changed."""
        inputs: list[Tensor] = []
        changed: list[Tensor] = []
        for place, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name) if place >= len(args) else args[place]
            is_changed = argument.alias_info is not None and argument.alias_info.is_write
            (changed if is_changed else inputs).extend(_tensors(value))
        return inputs, changed

    def _add(self, name: str, inputs: list[Tensor], changed: list[Tensor], made: list[Tensor]) -> None:
        written, read = sum(map(nbytes, made + changed)), sum(map(nbytes, inputs))
        if name in _MADE_LIKE:
            read = 0
        elif name in _GATHERS:
            read += written - nbytes(inputs[0])
        elif name in _SCATTERS:  # in place where there are values; out of place only where there are none
            destination, source = (changed or inputs)[0], inputs[-1]
            written = min(nbytes(source), nbytes(destination))
            read = sum(map(nbytes, [t for t in inputs if t is not destination]))
            read += 0 if name in _ONLY_WRITTEN else written
        elif name not in _ONLY_WRITTEN:
            read += sum(map(nbytes, changed))
        shapes = [tuple(t.shape) for t in inputs + changed + made]
        rows = self.sizes.rows
        on_rows = any(s[:1] == (rows,) or s[:2] == (self.sizes.tokens, self.sizes.top_k) for s in shapes)
        self.count.kernels.append(Kernel(name, read, written, on_rows))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


class Launches:
    """Stands in for the launch of a Triton kernel, and counts it instead. `ROLES` says what kernels do with arrays."""

    def __init__(self, sizes: Sizes, count: Count, coverage: float) -> None:
        self.sizes, self.count, self.coverage = sizes, count, coverage

    def fused(self, kernel: Any, grid: Any, device: Tensor, blocks: Any, /, **given: Any) -> None:
        self._add(_function(kernel), given)

    def unfused(self, kernel: Any, grid: Any, device: Tensor, /, *args: Any, **constants: Any) -> None:
        function = _function(kernel)
        self._add(function, dict(zip(inspect.signature(function).parameters, args, strict=False)) | constants)

    def _add(self, function: Any, given: dict[str, Any]) -> None:
        roles = ROLES[function.__name__]
        read = written = 0.0
        for name, value in given.items():
            if not isinstance(value, Tensor):
                continue
            for what, share in roles(name, given):
                size = self._nbytes(value, name, given) * (self.coverage if share == "hot" else 1.0)
                read += size if what == "r" else 0
                written += size if what == "w" else 0
        self.count.kernels.append(Kernel(function.__name__, round(read), round(written)))

    def _nbytes(self, tensor: Tensor, name: str, given: dict[str, Any]) -> int:
        """Of what is gathered by an index: a row for each that the index names."""
        flags = {"x": "GATHER", "left": "GATHER_LEFT", "right": "GATHER_RIGHT"}
        if (name == "x" and given.get("rows") is not None) or given.get(flags.get(name, "")):
            return int(nbytes(tensor[:1]) * self.sizes.rows)
        return nbytes(tensor)


def _function(kernel: Any) -> Any:
    """The Python function of a kernel that is autotuned, compiled or interpreted."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def _linear(name: str, given: dict[str, Any]) -> list[tuple[str, str]]:
    share = "hot" if given["HAS_SLOTS"] else "all"
    if name == "y":
        return [("r", share), ("w", share)] if given["ADD"] else [("w", "all")]
    return [("r", share if name == "x" else "all")]


def _outer(name: str, given: dict[str, Any]) -> list[tuple[str, str]]:
    share = "hot" if given["HAS_IDS"] else "all"
    return [("w", "all")] if name == "y" else [("r", share if name in ("left", "x") else "all")]


# Of the fused layer: what is written; and what is read or written of hot experts' rows alone. All else is read.
_WRITTEN = {
    "_sort_kernel": ("order", "place", "ends"),
    "_combine_kernel": ("out",),
    "_product_kernel": ("y", "thin", "dots"),
    "_activation_kernel": ("act", "z_down"),
    "_activation_backward_kernel": ("dup", "dweight", "act", "g_up"),
    "_gram_kernel": ("out",),
}
_HOT = {
    "_product_kernel": ("thin", "z"),
    "_activation_kernel": ("z_up", "z_down"),
    "_activation_backward_kernel": ("z_up", "g_down", "act", "g_up"),
    "_gram_kernel": ("left", "right", "order", "row_weights"),
}


def _fused(kernel: str) -> Any:
    def role(name: str, given: dict[str, Any]) -> list[tuple[str, str]]:
        return [("w" if name in _WRITTEN[kernel] else "r", "hot" if name in _HOT.get(kernel, ()) else "all")]

    return role


ROLES: dict[str, Any] = {"_linear_kernel": _linear, "_outer_kernel": _outer} | {name: _fused(name) for name in _WRITTEN}
"""Kernel -> of an argument's name and all arguments: ("r" read or "w" written, of "all" rows or of "hot" experts')."""


@contextmanager
def as_on_a_gpu(sizes: Sizes, count: Count, coverage: float) -> Iterator[None]:
    """The decisions that are made for a GPU, and launches counted instead of made."""
    from hotlora.layer import gpu
    from hotlora.layer.kernels import gemm
    from hotlora.layer.kernels import launch as launching

    capability, launches = divmod(sizes.capability, 10), Launches(sizes, count, coverage)
    with (
        mock.patch.object(gpu, "capability", lambda device: capability),
        mock.patch.object(gemm, "_launch", launches.unfused),
        mock.patch.object(launching, "launch", launches.fused),
        TorchOperations(sizes, count),
    ):
        yield


def coverage_of(sizes: Sizes, seed: int = 0) -> float:
    """The share of rows that the `hot` most popular experts get, of a routing drawn with about the CV asked for."""
    generator = torch.Generator().manual_seed(seed)
    deviation = torch.tensor(1 + sizes.cv**2).log().sqrt()
    popularity = torch.randn(sizes.experts, generator=generator) * deviation
    uniform = torch.rand(sizes.tokens, sizes.experts, generator=generator)
    chosen = (popularity - (-uniform.log()).log()).topk(sizes.top_k).indices
    counts = chosen.flatten().bincount(minlength=sizes.experts)
    return float(counts.topk(sizes.hot).values.sum() / counts.sum())


def experts_of(sizes: Sizes) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmoe", vocab_size=64, hidden_size=sizes.hidden, intermediate_size=sizes.expert_width, num_hidden_layers=1,
        num_attention_heads=8, num_experts=sizes.experts, num_experts_per_tok=sizes.top_k, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    experts._is_expert_parallel = False
    return experts


def measure(sizes: Sizes, contender: str) -> Count:
    """One layer, forward and backward, under bf16 autocast with float32 factors."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    from hotlora.hf.experts_view import ExpertsView
    from hotlora.layer import gpu
    from hotlora.layer.function import routed_experts_by
    from hotlora.layer.kernels import fused

    count, experts = Count(), experts_of(sizes)
    fused.gate_of(ExpertsView(experts))  # which is found by values, and kept
    coverage = 1.0 if contender == "all" else coverage_of(sizes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in ("gate_up_proj", "down_proj"):
            weight = torch.empty(getattr(experts, name).shape, dtype=torch.bfloat16)
            setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))
        bf16 = {"dtype": torch.bfloat16, "requires_grad": True}
        hidden_TD = torch.empty(sizes.tokens, sizes.hidden, **bf16)
        weights_TK = torch.empty(sizes.tokens, sizes.top_k, **bf16)
        index_TK = torch.empty(sizes.tokens, sizes.top_k, dtype=torch.int64)
        leaves, updates = [hidden_TD, weights_TK], []
        if contender != "floor":
            update = factors(sizes, sizes.experts if contender == "all" else sizes.hot)
            updates, leaves = [update], [*leaves, *update.tensors]
        grad_TD = torch.empty(sizes.tokens, sizes.hidden, dtype=torch.bfloat16)
        with as_on_a_gpu(sizes, count, coverage):
            with torch.autocast("cpu", torch.bfloat16):
                if contender == "floor":
                    output = grouped_mm_experts_forward(experts, hidden_TD, index_TK, weights_TK)
                else:
                    view = ExpertsView(experts)
                    output = routed_experts_by(gpu, view, hidden_TD, index_TK, weights_TK, updates)
            torch.autograd.grad(output, leaves, grad_TD)
    return count


def factors(sizes: Sizes, many: int) -> Any:
    from hotlora.layer.updates import LowRank

    r, width, inner = sizes.r, sizes.hidden, sizes.expert_width
    shapes = [(many, 2 * r, width), (many, 2 * inner, r), (many, r, inner), (many, width, r)]
    tensors = [torch.empty(shape, requires_grad=True) for shape in shapes]
    return LowRank(torch.empty(many, dtype=torch.int64), *tensors, scaling=2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the counts as JSON, with how they were made")
    parser.add_argument("--kernels", action="store_true", help="each kernel in order, with its bytes a token")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    as_json, each, sizes = given.pop("json"), given.pop("kernels"), Sizes(**given)
    os.environ.setdefault("HOTLORA_KERNELS", "fused")
    counts = {contender: measure(sizes, contender) for contender in ("floor", "hot", "all")}
    results = {contender: count.as_dict(sizes) for contender, count in counts.items()}
    if as_json:
        from hotlora.base.records import environment

        command = " ".join(["python", *sys.argv])
        products = os.environ["HOTLORA_KERNELS"]
        more = {"counted": COUNTED, "sizes": asdict(sizes) | {"coverage": coverage_of(sizes)}, "products": products}
        print(json.dumps(results | more | {"command": command, "environment": environment()}, indent=1))
        return
    for contender, count in counts.items():
        result = results[contender]
        times = result["bytes"] / results["floor"]["bytes"]
        print(
            f"{contender:6} {result['launches']:3} launches, {result['torch_on_rows']:3} of torch's on rows, "
            f"{result['bytes']:9,} bytes a token, {times:.3f} of the floor's"
        )
        if each:
            for kernel in count.kernels:
                read, written = kernel.read / sizes.tokens, kernel.written / sizes.tokens
                print(f"    {kernel.name:32} read {read:9,.0f} written {written:9,.0f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
