#!/bin/sh
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0, CPU)
#
# Behaviour: an adapter for sequence classification names its head once more in `modules_to_save` each time that it is
# loaded and saved: the names are appended again whenever a model is made, to what the config has from the last time.
#
# A good engineer would guess: an adapter that is loaded and saved has the config that it had, so that two can be compared.
#
# Output seen:
#   saved 1 times: ['classifier', 'score']
#   saved 2 times: ['classifier', 'score', 'classifier', 'score']
#   saved 3 times: ['classifier', 'score', 'classifier', 'score', 'classifier', 'score']
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache"
cat > observe.py <<'PY'
import json

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, num_labels=2,
)
model, seen = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", r=2)), []
for number in (1, 2, 3):
    model.save_pretrained(f"adapter{number}")
    with open(f"adapter{number}/adapter_config.json") as file:
        seen.append(json.load(file)["modules_to_save"])
    print(f"saved {number} times: {seen[-1]}")
    model = PeftModel.from_pretrained(LlamaForSequenceClassification(config), f"adapter{number}")
names = ["classifier", "score"]
raise SystemExit(0 if seen == [names, 2 * names, 3 * names] else 1)
PY
"$dir/venv/bin/python" observe.py
