#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: a GenerationConfig that is passed to `generate` is filled up from the checkpoint's own generation_config
# wherever it holds None, and None is what every setting holds that was not given. So a config made for greedy
# decoding, GenerationConfig(max_new_tokens=...), samples where the checkpoint samples; and None cannot switch off
# what the checkpoint sets: eos_token_id=None still stops at its end token.
#
# A good engineer would guess: the object passed takes the place of the checkpoint's; what it leaves out has
# GenerationConfig's own default. That is also what the documentation of `generate` says.
#
# Output seen:
#   five runs, checkpoint without settings:      1 different
#   five runs, checkpoint has do_sample=True:    5 different
#   tokens with eos_token_id=None, checkpoint has one: 2 of 8
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
ids = torch.tensor([[1, 5, 9]])


def new_tokens(**settings):
    return model.generate(ids, generation_config=GenerationConfig(max_new_tokens=8, **settings))[0, 3:].tolist()


before = [new_tokens() for _ in range(5)]
greedy = before[0]
model.generation_config.do_sample = True  # as many a chat model's generation_config.json has it
sampled = [new_tokens() for _ in range(5)]
model.generation_config.do_sample = None
model.generation_config.eos_token_id = greedy[1]
stopped = new_tokens(eos_token_id=None)
print("five runs, checkpoint without settings:     ", len(set(map(tuple, before))), "different")
print("five runs, checkpoint has do_sample=True:   ", len(set(map(tuple, sampled))), "different")
print("tokens with eos_token_id=None, checkpoint has one:", len(stopped), "of 8")
assert all(row == greedy for row in before)
assert len(set(map(tuple, sampled))) > 1
assert len(stopped) < 8
PY
"$dir/venv/bin/python" observe.py
