#!/bin/sh
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0)
#
# Behaviour: LoraConfig(target_modules=["shared_experts.gate_proj", "shared_experts.up_proj"]) on deepseek_v3 puts no
# adapter on the shared expert, whose modules have these names. It puts one on every routed expert, at twice the rank
# asked for: the names are taken for those of an older layout of the routed experts. Another part of the model is
# trained. The only warnings say that keys of rank_pattern and alpha_pattern, which nobody gave, were ignored, and
# these were not: they are what doubles the rank. (The first of the two names alone is refused, with an error that
# asks for the second.)
#
# A good engineer would guess: a suffix picks the modules whose name ends so, here the shared expert's two Linears.
#
# Output seen:
#   modules of these names: model.layers.1.mlp.shared_experts.gate_proj model.layers.1.mlp.shared_experts.up_proj
#   adapted: base_model.model.model.layers.1.mlp.experts.lora_A.default.weight (64, 32)
#   adapted: base_model.model.model.layers.1.mlp.experts.lora_B.default.weight (32, 64)
#   warning: The following rank_pattern keys did not match any targeted module and were ignored: ['.*\\.gate_up_proj'].
#   warning: The following alpha_pattern keys did not match any targeted module and were ignored: ['.*\\.gate_up_proj'].
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import warnings

from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

config = DeepseekV3Config(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, q_lora_rank=16,
    qk_rope_head_dim=8, intermediate_size=32, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, n_group=2,
    topk_group=2, first_k_dense_replace=1,
)  # fmt: skip
model = DeepseekV3ForCausalLM(config)
targets = ["shared_experts.gate_proj", "shared_experts.up_proj"]
matching = [name for name, _ in model.named_modules() if name.endswith(tuple(targets))]
print("modules of these names:", *matching)
with warnings.catch_warnings(record=True) as messages:
    warnings.simplefilter("always")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
adapted = {name: tuple(value.shape) for name, value in model.named_parameters() if "lora_" in name}
for name, shape in adapted.items():
    print("adapted:", name, shape)
for found in messages:
    if found.category is RuntimeWarning:
        print("warning:", found.message)
assert len(matching) == 2
assert not any("shared_experts" in str(found.message) for found in messages)
assert not any("shared_experts" in name for name in adapted)
assert [shape[0] for name, shape in adapted.items() if "lora_A" in name] == [8 * 8]  # 8 experts at rank 8, not 4
PY
"$dir/venv/bin/python" observe.py
