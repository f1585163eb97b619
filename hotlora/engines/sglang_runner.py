"""SGLang: base and export in one engine. Checked with 0.5.23 on a CPU.

On a GPU everything is SGLang's own. On a CPU without AMX, where SGLang's package for CPUs does not run, this file stands
in for packages that are imported and not called there, and for the kernel of LoRA on experts: SGLang's own products of
experts in PyTorch run on its weights plus what its buffers for each adapter hold, and the answer says so. What reads the
adapter, stacks its factors and finds each token's adapter is SGLang's.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

from runner import Answer, LogProbs, Request, serve

ABSENT = ("torchvision", "sgl_kernel", "flashinfer")
STAND_IN = "products of experts' LoRA in PyTorch: SGLang has no kernel of a CPU for it"


def probe(request: Request) -> Answer:
    if request.device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # for this process, and for those that the engine starts
        stand_in()
    common: dict[str, Any] = {
        "dtype": request.dtype, "device": request.device, "skip_tokenizer_init": True, "disable_cuda_graph": True,
        "disable_radix_cache": True, "log_level": "error",
    }  # fmt: skip
    if request.device == "cpu":
        common |= {"attention_backend": "torch_native", "max_total_tokens": 4096, "mem_fraction_static": 0.5}
    import sglang

    if request.is_merged:
        found = []
        for folder in (request.base, request.export):
            engine = sglang.Engine(model_path=folder, **common)
            found.append(score(engine, request))
            engine.shutdown()
        return Answer(*found, dtype=request.dtype, device=request.device)
    if request.device == "cpu":
        common |= {"lora_backend": "torch_native"}
    engine = sglang.Engine(
        model_path=request.base,
        enable_lora=True,
        lora_paths={"export": request.export},
        max_loras_per_batch=2,
        **common,
    )
    base, adapted = score(engine, request), score(engine, request, "export")
    engine.shutdown()
    return Answer(base, adapted, dtype=request.dtype, device=request.device)


def score(engine: Any, request: Request, adapter: str | None = None) -> LogProbs:
    found = []
    for text, tokens in zip(request.texts, request.tokens, strict=True):
        asked = sorted({token for some in tokens for token in some})
        output = engine.generate(
            input_ids=[text], sampling_params={"max_new_tokens": 1, "temperature": 0}, return_logprob=[True],
            logprob_start_len=[0], token_ids_logprob=[asked], lora_path=[adapter],
        )[0]  # fmt: skip
        rows = output["meta_info"]["input_token_ids_logprobs"][1:]
        tables = [{token: value for value, token, *_ in row} for row in rows]
        found.append([[table[token] for token in some] for table, some in zip(tables, tokens, strict=True)])
    return found


# On a CPU.


class _Absent:
    """Finds the packages that are not here as SGLang's own stand-in for modules (its `_platform_stubs`)."""

    def __init__(self, module_class: type):
        self.module_class = module_class

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: Any) -> Any:
        return self.module_class(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def stand_in() -> None:
    import torch
    import transformers.image_utils
    from transformers.utils import is_torchvision_available  # noqa: F401

    folder = importlib.util.find_spec("sglang").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("sglang_stubs", os.path.join(folder, "_platform_stubs.py"))
    stubs = importlib.util.module_from_spec(spec)
    sys.modules["sglang_stubs"] = stubs
    spec.loader.exec_module(stubs)
    sys.meta_path.append(_Absent(stubs._MockModule))
    for name in ("tensor", "zeros", "empty"):  # there is no device to pin memory for
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self
    import sglang.srt.lora.layers as layers

    layers.FusedMoEWithLoRA._forward_with_lora = forward_with_lora


def _unpinned(make: Any) -> Any:
    return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)


def forward_with_lora(self: Any, hidden_states: Any, topk_output: Any, lora_info: Any, **_: Any) -> Any:
    """T tokens' outputs [T, D]: those of each adapter by SGLang's products, with its update added to the weights."""
    import torch
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

    layer, out = self.base_layer, torch.empty_like(hidden_states)
    for slot in lora_info.token_lora_mapping.unique().tolist():
        at = (lora_info.token_lora_mapping == slot).nonzero().flatten()
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        if slot >= 0 and lora_info.adapter_enabled[slot]:
            R = lora_info.max_lora_rank
            A, B = lora_info.gate_up_lora_a_weights[slot], lora_info.gate_up_lora_b_weights[slot]
            F = B.shape[1] // 2
            w13 = w13 + torch.cat([B[:, :F] @ A[:, :R], B[:, F:] @ A[:, R:]], 1)
            w2 = w2 + lora_info.down_lora_b_weights[slot] @ lora_info.down_lora_a_weights[slot]
        changed = SimpleNamespace(
            num_experts=layer.num_experts, w13_weight=w13, w2_weight=w2,
            w13_weight_bias=getattr(layer, "w13_weight_bias", None), w2_weight_bias=getattr(layer, "w2_weight_bias", None),
        )  # fmt: skip
        some = topk_output._replace(topk_weights=topk_output.topk_weights[at], topk_ids=topk_output.topk_ids[at])
        out[at] = moe_forward_native(changed, hidden_states[at], some, layer.moe_runner_config)
    return out


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" and __name__ == "__mp_main__":  # a process that the engine started
    stand_in()

if __name__ == "__main__":
    serve(("sglang", "torch", "transformers"), probe)
