#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: one pad token on the left, masked by attention_mask, changes deepseek_v4's logits for the tokens after
# it: the layers that compress windows of tokens count the windows from the row's first column, pads among them. So in
# a batch what a prompt yields depends on how long its neighbours are. deepseek_v3 is not affected. There is no
# warning.
#
# A good engineer would guess: with the right attention_mask and position ids a left pad changes nothing but rounding.
#
# Output seen:
#   deepseek_v3: largest difference of the logits with one left pad: 0.00000
#   deepseek_v4: largest difference of the logits with one left pad: 0.87710
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM

both = dict(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, q_lora_rank=16, qk_rope_head_dim=8,
    max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
)  # fmt: skip
v3 = DeepseekV3Config(
    **both, intermediate_size=32, num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8, n_group=2,
    topk_group=2, first_k_dense_replace=1,
)  # fmt: skip
v4 = DeepseekV4Config(
    **both, num_key_value_heads=1, head_dim=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=8,
    index_topk=4, layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
)  # fmt: skip
torch.manual_seed(0)
ids = torch.randint(1, 64, (1, 24))
padded = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids], dim=1)
mask = (padded > 0).long()
positions = (mask.cumsum(-1) - 1).clamp(min=0)
found = {}
for model in (DeepseekV3ForCausalLM(v3), DeepseekV4ForCausalLM(v4)):
    model = model.eval()
    with torch.no_grad():
        alone = model(ids, attention_mask=torch.ones_like(ids)).logits
        after = model(padded, attention_mask=mask, position_ids=positions).logits[:, 1:]
    kind = model.config.model_type
    found[kind] = (after - alone).abs().max().item()
    print(f"{kind}: largest difference of the logits with one left pad: {found[kind]:.5f}")
assert found["deepseek_v3"] < 1e-3
assert found["deepseek_v4"] > 0.1
PY
"$dir/venv/bin/python" observe.py
