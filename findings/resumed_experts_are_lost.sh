#!/bin/sh
# transformers 5.23.0 (torch 2.13.0, accelerate 1.15.0); 5.24.0 does the same
#
# Behaviour: full training of a mixture of experts whose files have experts one by one (OLMoE, Qwen-MoE, Mixtral, …) is
# saved by Trainer under the names of those files, while the model in memory holds all experts of a layer in one tensor.
# Resumed, Trainer looks for the names in memory: it loads everything but the experts, warns of missing keys, and goes on
# with the experts that the model was made with and the optimizer's state of the trained ones. from_pretrained of the same
# checkpoint finds them all.
#
# A good engineer would guess: resume_from_checkpoint gives back what save_pretrained wrote, as from_pretrained does.
#
# Output seen:
#   experts after resuming at step 2 equal those of the checkpoint: False
#   experts after resuming at step 2 equal those before any training: True
#   router and attention equal those of the checkpoint: True
#   experts of from_pretrained(checkpoint-2) equal those of the checkpoint: True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import tempfile

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainerCallback, TrainingArguments


def new_model():
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            num_experts=4, num_experts_per_tok=2, vocab_size=32, pad_token_id=0,
        )
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class AtStart(TrainerCallback):
    """The weights that the training goes on with."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.found = weights(model)


def train(folder, steps, resume=None):
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=2, learning_rate=0.1, lr_scheduler_type="constant", use_cpu=True,
        per_device_train_batch_size=2, report_to="none", disable_tqdm=True, logging_strategy="no",
    )
    rows = [{"input_ids": torch.arange(i, i + 8) % 32, "labels": torch.arange(i, i + 8) % 32} for i in range(16)]
    start = AtStart()
    model = new_model()
    Trainer(model, arguments, train_dataset=rows, callbacks=[start]).train(resume_from_checkpoint=resume)
    return start.found, weights(model)


def equal(a, b, experts):
    return all(torch.equal(a[name], b[name]) for name in a if (".experts." in name) == experts)


with tempfile.TemporaryDirectory() as folder:
    before, at_2 = train(folder, 2)
    resumed, _ = train(folder, 4, f"{folder}/checkpoint-2")
    loaded = weights(OlmoeForCausalLM.from_pretrained(f"{folder}/checkpoint-2"))
seen = [
    equal(resumed, at_2, True), equal(resumed, before, True), equal(resumed, at_2, False), equal(loaded, at_2, True)
]
print(f"experts after resuming at step 2 equal those of the checkpoint: {seen[0]}")
print(f"experts after resuming at step 2 equal those before any training: {seen[1]}")
print(f"router and attention equal those of the checkpoint: {seen[2]}")
print(f"experts of from_pretrained(checkpoint-2) equal those of the checkpoint: {seen[3]}")
raise SystemExit(seen != [False, True, True, True])
PY
"$dir/venv/bin/python" observe.py
