"""vLLM: base and export in one engine. Run with 0.32 (its build for CPUs).

On a GPU everything is vLLM's own. For a CPU vLLM has no kernels for the experts of a LoRA model: what they compute is
PyTorch's there, and the answer's note says so. What reads the adapter, stacks its factors, finds each token's adapter
and calls the kernels is vLLM's.

Shapes: T tokens, K experts of each, E experts, N adapters, R rank, D model width, F expert width, S slices (gate and
up; one where there is no gate, or where they are one).
"""

import json
import os
from types import SimpleNamespace
from typing import Any

from runner import Answer, LogProbs, Request, serve

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of those that vLLM can make room for."""
NOTE = "experts' products by PyTorch: vLLM has no kernels of a CPU for them in a LoRA model"


def probe(request: Request) -> Answer:
    # vLLM reads these when it is imported.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if request.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {
        "dtype": request.dtype, "max_model_len": max(map(len, request.texts)) + 1, "skip_tokenizer_init": True,
        "enforce_eager": True,
    }  # fmt: skip
    if request.is_merged:
        scores = []
        for folder in (request.base, request.export):
            engine = LLM(model=folder, **options)
            scores.append(score(engine, request))
            del engine
        return Answer(*scores, dtype=request.dtype, device=request.device)
    if request.device == "cpu":
        use_pytorch()
    with open(os.path.join(request.export, "adapter_config.json"), encoding="utf-8") as file:
        rank = json.load(file)["r"]
    room = next(size for size in RANKS if size >= rank)
    # The last option: where vLLM holds a family's experts fused, it still reads a pair of matrices for each expert.
    engine = LLM(
        model=request.base, enable_lora=True, max_loras=1, max_lora_rank=room, enable_mixed_moe_lora_format=True,
        **options,
    )  # fmt: skip
    base, adapted = score(engine, request), score(engine, request, LoRARequest("export", 1, request.export))
    return Answer(base, adapted, request.dtype, request.device, note=NOTE if request.device == "cpu" else "")


def score(engine: Any, request: Request, adapter: Any = None) -> LogProbs:
    """Of the token after each beginning of a text. vLLM's log-probabilities of a prompt are of the likeliest tokens
    alone, and fail on a CPU where the adapter's model has an lm_head that could be adapted (Mixtral, 0.32)."""
    from vllm import SamplingParams

    prompts, asked = [], []
    for text, tokens in zip(request.texts, request.tokens, strict=True):
        for end, some in enumerate(tokens, start=1):
            prompts.append({"prompt_token_ids": text[:end]})
            asked.append(SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=some, detokenize=False))
    outputs = engine.generate(prompts, asked, lora_request=adapter, use_tqdm=False)
    given = iter([output.outputs[0].logprobs[0] for output in outputs])
    return [
        [[at[token].logprob for token in some] for some, at in zip(tokens, given, strict=False)]
        for tokens in request.tokens
    ]


# On a CPU.


def use_pytorch() -> None:
    """Puts the functions below where vLLM would launch kernels that a CPU lacks."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.layers.activation import SwigluOAIAndMul
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    experts = triton_moe.TritonExperts
    kernel = experts.activation

    def activation(self: Any, kind: Any, output: Any, rows: Any, **more: Any) -> None:
        if kind.name == "SWIGLUOAI":  # gpt_oss's; its numbers are vLLM's defaults
            output.copy_(SwigluOAIAndMul.forward_native(SimpleNamespace(alpha=1.702, limit=7.0), rows))
        else:
            kernel(self, kind, output, rows, **more)

    experts.activation = activation
    experts.moe_sum = lambda self, rows_TKD, output_TD, *_: output_TD.copy_(rows_TKD.sum(1))
    triton_moe.tl = SimpleNamespace(float32=None, bfloat16=None, float16=None)  # Triton's dtypes, named and not used
    triton_moe.try_get_optimal_moe_config = lambda *_, **__: {}
    # Kernels get tokens sorted by expert, in blocks; these functions get each token's experts.
    triton_moe._prepare_expert_assignment = lambda ids_TK, *_, **__: (ids_TK, ids_TK, ids_TK)
    triton_moe.invoke_fused_moe_triton_kernel = experts_product
    PunicaWrapperCPU.add_lora_w13 = add_lora_w13
    PunicaWrapperCPU.add_lora_w2 = add_lora_w2


def experts_product(
    rows: Any, weights: Any, output: Any, _scale: Any, _weight_scale: Any, router_weights: Any, ids_TK: Any, _ids: Any,
    _tokens: Any, is_weighted: bool, *_: Any, B_bias: Any = None, **__: Any,
) -> None:  # fmt: skip
    """output `[T, K, out]` = the tokens' rows, `[T, in]` or `[T * K, in]`, by their experts' weights `[E, out, in]`."""
    rows, flat = _each(rows, ids_TK), output.view(-1, output.shape[-1])
    for expert in ids_TK.unique().tolist():
        at = (ids_TK == expert).flatten()
        flat[at] = rows[at] @ weights[expert].T + (0 if B_bias is None else B_bias[expert])
    if is_weighted:
        flat *= router_weights.reshape(-1, 1).to(flat.dtype)


def add_lora_w13(
    self: Any, output: Any, rows_TD: Any, A: Any, B: Any, ids_TK: Any, *_: Any, add_inputs: bool = True, **__: Any
) -> tuple[Any, None, None, None]:
    """Adds to output `[T, K, S * F]`. A: S times `[N, E, R, D]`; B: S times `[N, E, F, R]`."""
    _add_lora(self, output, _each(rows_TD, ids_TK), A, B, ids_TK, add_inputs)
    return ids_TK, None, None, None  # what vLLM hands on to `add_lora_w2`


def add_lora_w2(
    self: Any, output: Any, rows: Any, A: Any, B: Any, router_weights: Any, ids_TK: Any, *_: Any,
    add_inputs: bool = True, **__: Any,
) -> None:  # fmt: skip
    """Adds to output `[T, K, D]`, by the router's weights. rows: `[T * K, F]`."""
    _add_lora(self, output, rows, A, B, ids_TK, add_inputs, router_weights.reshape(-1, 1))


def _each(rows: Any, ids_TK: Any) -> Any:
    """A row for each token's each expert."""
    return rows.repeat_interleave(ids_TK.numel() // len(rows), 0)


def _add_lora(
    self: Any, output: Any, rows: Any, A: Any, B: Any, ids_TK: Any, add_inputs: bool, router_weights: Any = None
) -> None:
    import torch

    flat = output.view(-1, output.shape[-1])
    if not add_inputs:
        flat.zero_()
    adapters = self.token_lora_indices.repeat_interleave(ids_TK.shape[1])  # -1: none
    for adapter in set(adapters.tolist()) - {-1}:
        for expert in ids_TK.unique().tolist():
            at = (ids_TK.flatten() == expert) & (adapters == adapter)
            slices = [
                rows[at] @ one[adapter, expert].T @ other[adapter, expert].T for one, other in zip(A, B, strict=True)
            ]
            update = torch.cat(slices, 1) * (1 if router_weights is None else router_weights[at])
            flat[at] += update.to(flat.dtype)


if __name__ == "__main__":
    serve(("vllm", "torch", "transformers"), probe)
