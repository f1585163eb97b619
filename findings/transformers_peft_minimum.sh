#!/bin/sh
# transformers 5.24.0, peft 0.21.2, torch 2.14.1
#
# Behaviour: transformers' own adapter methods (add_adapter, load_adapter, set_adapter, …) ask for PEFT 0.22.0 or newer,
# which was not on PyPI when 5.24.0 was: with the newest PEFT that pip installs beside it, each of them is a ValueError
# about PEFT's version. Its package's metadata do not name PEFT, so pip cannot tell. PEFT's own get_peft_model works on the
# same model, so a program that only uses PEFT notices nothing.
#
# A good engineer would guess: two newest releases from PyPI, of libraries that are developed side by side, go together.
#
# Output seen:
#   add_adapter: ValueError, wants PEFT 0.22.0
#   get_peft_model: 8 LoRA matrices
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.14.1 transformers==5.24.0 peft==0.21.2
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def model():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def config():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


try:
    model().add_adapter(config())
    outcome = "works"
except ValueError as error:
    outcome = "ValueError, wants PEFT 0.22.0" if "0.22.0" in str(error) else f"ValueError: {error}"
print("add_adapter:", outcome)
matrices = [name for name, _ in get_peft_model(model(), config()).named_parameters() if "lora_" in name]
print("get_peft_model:", len(matrices), "LoRA matrices")
assert outcome == "ValueError, wants PEFT 0.22.0"
assert len(matrices) == 8
PY
"$dir/venv/bin/python" observe.py
