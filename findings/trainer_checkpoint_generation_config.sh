#!/bin/sh
# transformers 5.23.0 (torch 2.13.0, accelerate 1.15.0)
#
# Behaviour: a checkpoint whose generation_config.json has `temperature` beside `"do_sample": false` loads, and
# save_pretrained writes it again with a warning at most. Train it with Trainer and a tokenizer that has a pad token
# which the generation config lacks, and the first checkpoint cannot be saved: Trainer writes the pad token into the
# generation config, and one that has changed since it was loaded is checked strictly. The error, a ValueError, comes
# after the steps up to that checkpoint have been paid for, and names temperature, which nobody has touched.
#
# A good engineer would guess: what loads and saves before training saves after it; if the file is refused at all,
# then before the first step.
#
# Output seen:
#   saved before training: yes
#   steps taken: 2
#   error at the checkpoint: GenerationConfig is invalid: - `temperature`: `do_sample` is not set to `True`. However, `temperature` is set to `0.6` -- this flag is only used in sa
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 tokenizers==0.23.3
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import json
import logging
import warnings

from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Trainer, TrainingArguments

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
config = LlamaConfig(
    vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained("base")
with open("base/generation_config.json", "w") as file:
    json.dump({"bos_token_id": 1, "eos_token_id": 2, "do_sample": False, "temperature": 0.6}, file)
words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

model = AutoModelForCausalLM.from_pretrained("base")
model.save_pretrained("copy")
print("saved before training: yes")
rows = [{"input_ids": [1, 3, 3, 2], "labels": [1, 3, 3, 2]}] * 4
arguments = TrainingArguments("run", max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
error = None
try:
    trainer.train()
except ValueError as found:
    error = str(found)
print("steps taken:", trainer.state.global_step)
print("error at the checkpoint:", " ".join((error or "none").split())[:150])
assert error and "temperature" in error
assert trainer.state.global_step == 2
PY
"$dir/venv/bin/python" observe.py
