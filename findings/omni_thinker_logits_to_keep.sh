#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: Qwen3OmniMoeThinkerForConditionalGeneration takes `logits_to_keep` and drops it without a word: the
# logits come back for all positions. The text model of the same kind, Qwen3MoeForCausalLM, gives those asked for.
#
# A good engineer would guess: logits_to_keep=1 gives the last position's logits in every model with a language head,
# or raises for an argument that is not known.
#
# Output seen:
#   Qwen3MoeForCausalLM:                          (1, 1, 128)
#   Qwen3OmniMoeThinkerForConditionalGeneration: (1, 7, 128)
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

torch.manual_seed(0)
text = dict(
    vocab_size=128, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
)  # fmt: skip
audio = dict(
    d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, output_dim=32, downsample_hidden_size=8
)
vision = dict(
    hidden_size=32, intermediate_size=32, depth=1, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[]
)
config = AutoConfig.for_model(
    "qwen3_omni_moe_thinker", text_config=text, audio_config=audio, vision_config=vision, vision_start_token_id=110
)
thinker = Qwen3OmniMoeThinkerForConditionalGeneration(config).eval()
text.pop("rope_parameters")
plain = Qwen3MoeForCausalLM(Qwen3MoeConfig(**text)).eval()
ids = torch.randint(1, 100, (1, 7))
with torch.no_grad():
    outs = [model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1) for model in (plain, thinker)]
shapes = [tuple(out.logits.shape) for out in outs]
print("Qwen3MoeForCausalLM:                         ", shapes[0])
print("Qwen3OmniMoeThinkerForConditionalGeneration:", shapes[1])
assert shapes == [(1, 1, 128), (1, 7, 128)]
PY
"$dir/venv/bin/python" observe.py
