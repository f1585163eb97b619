#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: gpt_oss does not tell packed examples apart by position_ids. In a row of two examples whose position ids
# start again at 0, without a mask and with use_cache=False, the second attends to the first. mixtral, the same way,
# keeps them apart; neither says anything. (So a packing collator that returns position_ids trains one model on what
# another model would not see.)
#
# A good engineer would guess: what works this way in the library's other decoders works in this one, or raises.
#
# Output seen:
#   mixtral  second example, packed against alone, largest difference of the logits: 0.00000
#   gpt_oss  second example, packed against alone, largest difference of the logits: 6.09675
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3, pad_token_id=0,
)  # fmt: skip
torch.manual_seed(0)
first, second = torch.randint(1, 64, (2, 1, 6))
row = torch.cat([first, second], dim=1)
positions = torch.arange(6).repeat(2)[None]
found = {}
for model in (MixtralForCausalLM(MixtralConfig(**sizes)), GptOssForCausalLM(GptOssConfig(head_dim=16, **sizes))):
    model = model.eval()
    with torch.no_grad():
        packed = model(row, position_ids=positions, use_cache=False).logits[:, 6:]
        alone = model(second, use_cache=False).logits
    kind = model.config.model_type
    found[kind] = (packed - alone).abs().max().item()
    print(f"{kind:8} second example, packed against alone, largest difference of the logits: {found[kind]:.5f}")
assert found["mixtral"] < 1e-3
assert found["gpt_oss"] > 0.1
PY
"$dir/venv/bin/python" observe.py
