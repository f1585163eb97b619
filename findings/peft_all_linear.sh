#!/bin/sh
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0)
#
# Behaviour: LoraConfig(target_modules="all-linear") reaches different parts of mixtures of experts that are built
# alike in transformers, with routed experts that are 3-D parameters and a router that is a 2-D parameter, none of
# them a Linear. On olmoe, mixtral and qwen3_moe it adapts the routed experts and the router too; on qwen2_moe and
# gpt_oss neither. No message says which.
#
# A good engineer would guess: it takes the modules that are Linears, so no routed expert and no router in any of
# them; or, with the conversion for old layouts in mind, in all of them.
#
# Output seen:
#   olmoe     routed experts: True  router: True
#             adapted: mlp.experts mlp.gate self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj
#   mixtral   routed experts: True  router: True
#             adapted: mlp.experts mlp.gate self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj
#   qwen3_moe routed experts: True  router: True
#             adapted: mlp.experts mlp.gate self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj
#   qwen2_moe routed experts: False router: False
#             adapted: mlp.shared_expert.down_proj mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert_gate self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj
#   gpt_oss   routed experts: False router: False
#             adapted: self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import re

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(
    vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_local_experts=4,
    num_experts_per_tok=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
)  # fmt: skip
found = {}
for kind in ("olmoe", "mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"):
    fields = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{name: value for name, value in sizes.items() if name in fields})
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules="all-linear"))
    names = [name.split("layers.0.")[1] for name, _ in model.named_parameters() if "lora_A" in name]
    names = {re.sub(r"(\.base_layer)*\.lora_A.*", "", name) for name in names}
    found[kind] = "mlp.experts" in names, bool(names & {"mlp.gate", "mlp.router"})
    print(f"{kind:9} routed experts: {found[kind][0]!s:5} router: {found[kind][1]!s:5}")
    print("          adapted:", *sorted(names))
assert found["olmoe"] == found["mixtral"] == found["qwen3_moe"] == (True, True)
assert found["qwen2_moe"] == found["gpt_oss"] == (False, False)
PY
"$dir/venv/bin/python" observe.py
