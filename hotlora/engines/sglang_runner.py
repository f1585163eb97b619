"""SGLang: base and export in one engine. Run with 0.5.23.

On a GPU everything is SGLang's own. On a CPU it runs by PyTorch where its package of kernels for CPUs is not (it needs
AMX), but for LoRA on experts: their updates, as SGLang's buffers hold them, are added to its weights, its own products
run on these, and the answer's note says so. What reads the adapter, stacks its factors and finds each token's adapter
is SGLang's.

Shapes: T tokens, E experts, N adapters, R rank, D model width, F expert width.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

from runner import Answer, LogProbs, Request, serve

NOTE = "experts' updates added to the weights by PyTorch: SGLang has no kernels of a CPU for them"
ABSENT = ("torchvision", "sgl_kernel", "flashinfer")
"""Packages that SGLang imports on a CPU and does not need there."""


def probe(request: Request) -> Answer:
    options: dict[str, Any] = {
        "dtype": request.dtype, "device": request.device, "skip_tokenizer_init": True, "disable_cuda_graph": True,
        "disable_radix_cache": True, "log_level": "error",
    }  # fmt: skip
    if request.device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # for this process, and for those that the engine starts
        use_pytorch()
        options |= {"attention_backend": "torch_native", "max_total_tokens": 4096, "mem_fraction_static": 0.5}
    import sglang

    if request.is_merged:
        scores = []
        for folder in (request.base, request.export):
            engine = sglang.Engine(model_path=folder, **options)
            scores.append(score(engine, request))
            engine.shutdown()
        return Answer(*scores, dtype=request.dtype, device=request.device)
    if request.device == "cpu":
        options |= {"lora_backend": "torch_native"}
    adapters = {"export": request.export}
    engine = sglang.Engine(
        model_path=request.base, enable_lora=True, lora_paths=adapters, max_loras_per_batch=2, **options
    )
    base, adapted = score(engine, request), score(engine, request, "export")
    engine.shutdown()
    return Answer(base, adapted, request.dtype, request.device, note=NOTE if request.device == "cpu" else "")


def score(engine: Any, request: Request, adapter: str | None = None) -> LogProbs:
    found = []
    for text, tokens in zip(request.texts, request.tokens, strict=True):
        (output,) = engine.generate(
            input_ids=[text], sampling_params={"max_new_tokens": 1, "temperature": 0}, return_logprob=[True],
            logprob_start_len=[0], token_ids_logprob=[sorted({token for some in tokens for token in some})],
            lora_path=[adapter] if adapter else None,
        )  # fmt: skip
        rows = output["meta_info"]["input_token_ids_logprobs"][1:]  # the first has nothing before it
        tables = [{token: value for value, token, *_ in row} for row in rows]
        found.append([[table[token] for token in some] for table, some in zip(tables, tokens, strict=True)])
    return found


# On a CPU.


class _Absent:
    """Finds packages that are not here, as SGLang's own stand-in for modules (its `_platform_stubs`)."""

    def __init__(self, stand_in: Any):
        self.stand_in = stand_in

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        loader: Any = self
        return ModuleSpec(name, loader, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.stand_in(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def use_pytorch() -> None:
    import torch
    import transformers.image_utils  # noqa: F401  (it asks whether torchvision is there)

    torch_: Any = torch
    for name in ("tensor", "zeros", "empty"):
        setattr(torch_, name, _unpinned(getattr(torch_, name)))
    torch_.Tensor.pin_memory = lambda self, *_: self
    found: Any = importlib.util.find_spec("sglang")
    spec: Any = importlib.util.spec_from_file_location(
        "sglang_stubs", os.path.join(found.submodule_search_locations[0], "_platform_stubs.py")
    )
    sys.modules[spec.name] = stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    finder: Any = _Absent(stubs._MockModule)
    sys.meta_path.append(finder)  # last, for packages that are there go first
    from sglang.srt.lora import layers

    layers.FusedMoEWithLoRA._forward_with_lora = forward_with_lora


def _unpinned(make: Any) -> Any:
    """As `make`; there is no device that memory could be pinned for."""
    return lambda *args, pin_memory=False, **options: make(*args, **options)


def forward_with_lora(self: Any, rows_TD: Any, topk_output: Any, lora_info: Any, **_: Any) -> Any:
    """`[T, D]`: each adapter's tokens by SGLang's products for a CPU, with its update added to the weights."""
    import torch
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

    layer, output = self.base_layer, torch.empty_like(rows_TD)
    biases = {name: getattr(layer, name, None) for name in ("w13_weight_bias", "w2_weight_bias")}
    for slot in lora_info.token_lora_mapping.unique().tolist():
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        if slot >= 0 and lora_info.adapter_enabled[slot]:
            w13 = w13 + _gate_up(lora_info, slot)
            w2 = w2 + lora_info.down_lora_b_weights[slot] @ lora_info.down_lora_a_weights[slot]
        changed = SimpleNamespace(num_experts=layer.num_experts, w13_weight=w13, w2_weight=w2, **biases)
        at = lora_info.token_lora_mapping == slot
        some = topk_output._replace(topk_weights=topk_output.topk_weights[at], topk_ids=topk_output.topk_ids[at])
        output[at] = moe_forward_native(changed, rows_TD[at], some, layer.moe_runner_config)
    return output


def _gate_up(lora_info: Any, slot: int) -> Any:
    """`[E, 2F, D]`. A has gate's R rows, then up's; B gate's F rows, then up's, as SGLang's kernel takes them."""
    import torch

    A, B = lora_info.gate_up_lora_a_weights[slot], lora_info.gate_up_lora_b_weights[slot]
    R, F = B.shape[2], B.shape[1] // 2
    return torch.cat([B[:, :F] @ A[:, :R], B[:, F:] @ A[:, R:]], 1)


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" and __name__ == "__mp_main__":  # a process that the engine started
    use_pytorch()

if __name__ == "__main__":
    serve(("sglang", "torch", "transformers"), probe)
