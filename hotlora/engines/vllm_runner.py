"""vLLM: base and export in one engine. Checked with 0.32 (its build for CPUs).

On a GPU everything is vLLM's own. On a CPU vLLM has no kernels for MoE layers of a LoRA model: three functions do their
products in PyTorch there, and the answer says so. What reads the adapter, stacks its factors, finds each token's
adapter and calls these functions is vLLM's.
"""

import json
import os
from types import SimpleNamespace
from typing import Any

from runner import Answer, LogProbs, Request, serve

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of those that vLLM can make room for
STAND_IN = "products of experts in PyTorch: vLLM has no kernel of a CPU for experts with LoRA"


def probe(request: Request) -> Answer:
    # vLLM reads these when it is imported.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if request.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    length = max(map(len, request.texts)) + 1
    common: dict[str, Any] = {
        "dtype": request.dtype, "max_model_len": length, "skip_tokenizer_init": True, "enforce_eager": True,
    }  # fmt: skip
    if request.is_merged:
        found = []
        for folder in (request.base, request.export):
            engine = LLM(model=folder, **common)
            found.append(score(engine, request))
            del engine
        return Answer(*found, dtype=request.dtype, device=request.device)
    with open(os.path.join(request.export, "adapter_config.json"), encoding="utf-8") as file:
        rank = json.load(file)["r"]
    if request.device == "cpu":
        stand_in()
    engine = LLM(
        model=request.base, enable_lora=True, max_loras=1, max_lora_rank=next(size for size in RANKS if size >= rank),
        enable_mixed_moe_lora_format=True, **common,
    )  # fmt: skip
    adapter = LoRARequest("export", 1, request.export)
    base, adapted = score(engine, request), score(engine, request, adapter)
    return Answer(base, adapted, dtype=request.dtype, device=request.device)


def score(engine: Any, request: Request, adapter: Any = None) -> LogProbs:
    """Of one generated token after each beginning of a text: vLLM's log-probabilities of prompts are of the likeliest
    tokens only, and cannot be had with an adapter on some families (Mixtral, 0.32)."""
    from vllm import SamplingParams

    places = [
        (text[: i + 1], some)
        for text, tokens in zip(request.texts, request.tokens, strict=True)
        for i, some in enumerate(tokens)
    ]
    prompts = [{"prompt_token_ids": beginning} for beginning, _ in places]
    asked = [
        SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=some, detokenize=False) for _, some in places
    ]
    outputs = engine.generate(prompts, asked, lora_request=adapter, use_tqdm=False)
    found = iter(output.outputs[0].logprobs[0] for output in outputs)
    return [[[at[token].logprob for token in some] for some, at in zip(tokens, found)] for tokens in request.tokens]


# What vLLM's kernels compute, in PyTorch. T tokens, K experts of each, E experts, S slices (gate and up, or one).


def stand_in() -> None:
    """Puts the functions below where vLLM would launch kernels that a CPU lacks."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    from vllm.model_executor.layers.activation import SwigluOAIAndMul

    activation = triton_moe.TritonExperts.activation

    def activated(self: Any, kind: Any, output: Any, rows: Any, **more: Any) -> None:
        if kind.name == "SWIGLUOAI":  # gpt_oss's, of which only kernels of a GPU are there
            output.copy_(SwigluOAIAndMul.forward_native(SimpleNamespace(alpha=1.702, limit=7.0), rows))
        else:
            activation(self, kind, output, rows, **more)

    triton_moe.TritonExperts.activation = activated
    triton_moe.tl = SimpleNamespace(float32=None, bfloat16=None, float16=None)  # the names of Triton's dtypes
    triton_moe._prepare_expert_assignment = lambda topk_ids, *_, **__: (topk_ids, topk_ids, topk_ids)
    triton_moe.invoke_fused_moe_triton_kernel = experts_product
    triton_moe.try_get_optimal_moe_config = lambda *_, **__: {}
    triton_moe.TritonExperts.moe_sum = lambda self, rows, output, *_: output.copy_(rows.sum(1))
    PunicaWrapperCPU.add_lora_w13 = add_lora_w13
    PunicaWrapperCPU.add_lora_w2 = add_lora_w2


def experts_product(A, B, C, _a, _b, weights, topk_ids, _c, _d, mul_routed_weight, *_, B_bias=None, **__) -> None:
    """C [T, K, out] = the rows of A [T or T * K, in] times their experts' B [E, out, in]."""
    rows = _rows(A, topk_ids)
    flat = C.view(-1, C.shape[-1])
    for expert in topk_ids.unique().tolist():
        at = (topk_ids == expert).flatten()
        flat[at] = rows[at] @ B[expert].T + (0 if B_bias is None else B_bias[expert])
    if mul_routed_weight:
        flat *= weights.reshape(-1, 1).to(flat.dtype)


def add_lora_w13(self, y, x, a, b, topk_ids, *_, add_inputs=True, **__) -> tuple[Any, None, None, None]:
    """Adds to y [T, K, S * F]. a: S times [loras, E, R, D]; b: S times [loras, E, F, R]."""
    _add(self, y, _rows(x, topk_ids), a, b, topk_ids, add_inputs)
    return topk_ids, None, None, None


def add_lora_w2(self, y, x, a, b, topk_weights, topk_ids, *_, add_inputs=True, **__) -> None:
    """Adds to y [T, K, D], times the router's weights. x: [T * K, F]."""
    _add(self, y, x, a, b, topk_ids, add_inputs, topk_weights.reshape(-1, 1))


def _rows(x, topk_ids):
    return x.repeat_interleave(topk_ids.numel() // len(x), 0)


def _add(self, y, rows, a, b, topk_ids, add_inputs, weights=None) -> None:
    flat = y.view(-1, y.shape[-1])
    if not add_inputs:
        flat.zero_()
    loras = self.token_lora_indices.repeat_interleave(topk_ids.shape[1])
    for lora in loras.unique().tolist():
        for expert in topk_ids.unique().tolist():
            at = ((topk_ids.flatten() == expert) & (loras == lora)).nonzero().flatten()
            if lora < 0 or not len(at):
                continue
            width = 0
            for A, B in zip(a, b):
                update = rows[at] @ A[lora, expert].T @ B[lora, expert].T
                update = update if weights is None else update * weights[at]
                flat[at, width : width + update.shape[1]] += update.to(y.dtype)
                width += update.shape[1]


if __name__ == "__main__":
    serve(("vllm", "torch", "transformers"), probe)
