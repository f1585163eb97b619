#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: examples packed into one row and told apart by position_ids that start again at 0 do not see each other,
# but only where attention_mask is left out and use_cache=False. With an attention_mask of ones, which masks nothing,
# or with the default use_cache, which makes an empty cache first, the second example attends to the first. There is
# no warning.
#
# A good engineer would guess: a mask of ones is the same as no mask, and a cache that is empty at the start changes
# no logits; so either all of these keep the examples apart or none does.
#
# Output seen:
#   How far the second example's logits are from those it has alone (largest difference):
#   no mask, use_cache=False:      0.00000
#   mask of ones, use_cache=False: 6.21730
#   no mask, use_cache by default: 6.21730
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.3,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
first, second = torch.randint(64, (2, 1, 6))
row = torch.cat([first, second], dim=1)
positions = torch.arange(6).repeat(2)[None]
ones = torch.ones_like(row)


@torch.no_grad()
def logits(ids, **options):
    return model(ids, **options).logits[:, -6:]


def leak(**options):
    return (logits(row, position_ids=positions, **options) - logits(second)).abs().max().item()


apart, masked, cached = leak(use_cache=False), leak(use_cache=False, attention_mask=ones), leak()
print("How far the second example's logits are from those it has alone (largest difference):")
print(f"no mask, use_cache=False:      {apart:.5f}")
print(f"mask of ones, use_cache=False: {masked:.5f}")
print(f"no mask, use_cache by default: {cached:.5f}")
assert apart < 1e-4
assert masked > 0.1
assert cached > 0.1
PY
"$dir/venv/bin/python" observe.py
