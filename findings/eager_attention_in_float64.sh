#!/bin/sh
# transformers 5.23.0 (torch 2.13.0, CPU)
#
# Behaviour: with eager attention a Llama in float64 gives NaN for every token of a row that is padded on the left. In float32
# it does not, and in float64 `sdpa` does not. The mask holds float64's least number, and the softmax is taken in float32,
# where that is minus infinity: a padded query sees nothing else, and its NaN reaches the others as a value with weight 0.
#
# A good engineer would guess: float64 is float32 with more digits, so that a reference for tests can be computed in it.
#
# Output seen:
#   float32 eager: 0 of 10 tokens are NaN
#   float32 sdpa: 0 of 10 tokens are NaN
#   float64 eager: 5 of 10 tokens are NaN
#   float64 sdpa: 0 of 10 tokens are NaN
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache"
cat > observe.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()
batch = {
    "input_ids": torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
seen = {}
for dtype in ("float32", "float64"):
    for attention in ("eager", "sdpa"):
        model.to(getattr(torch, dtype)).set_attn_implementation(attention)
        with torch.no_grad():
            seen[dtype, attention] = int(model(**batch).logits.isnan().any(-1).sum())
        print(f"{dtype} {attention}: {seen[dtype, attention]} of 10 tokens are NaN")
raise SystemExit(0 if list(seen.values()) == [0, 0, 5, 0] else 1)
PY
"$dir/venv/bin/python" observe.py
