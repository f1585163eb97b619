#!/bin/sh
# transformers 5.23.0 (torch 2.13.0, accelerate 1.15.0)
#
# Behaviour: a training that is resumed with a larger max_steps makes its first step at the rate where the old schedule had
# ended, and only then follows the new one. After a linear schedule that rate is 0: the step changes no weight, its batch is
# spent, and the curve in the log jumps a step later than the training.
#
# A good engineer would guess: the schedule is built anew for the larger number of steps and set to the checkpoint's step, so
# that step 6 of 10 is made at the rate that a run of 10 steps has there.
#
# Output seen:
#   5 steps, then up to 10: {6: 0.0, 7: 0.4, 8: 0.3, 9: 0.2, 10: 0.1}
#   10 steps at once, from the sixth on: {6: 0.5, 7: 0.4, 8: 0.3, 9: 0.2, 10: 0.1}
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
from transformers import Trainer, TrainerCallback, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": ((self.linear(x) - labels) ** 2).mean()}


class Rates(TrainerCallback):
    """Which rate each step is made at."""

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        used[state.global_step + 1] = round(optimizer.param_groups[0]["lr"], 3)


def train(folder, steps, resume):
    used.clear()
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=5, learning_rate=1.0, lr_scheduler_type="linear", use_cpu=True,
        per_device_train_batch_size=1, report_to="none", disable_tqdm=True, logging_strategy="no",
    )
    data = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 40
    Trainer(Model(), arguments, train_dataset=data, callbacks=[Rates()]).train(resume_from_checkpoint=resume)
    return dict(used)


used = {}
with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
    train(folder, 5, None)
    longer = train(folder, 10, f"{folder}/checkpoint-5")
    whole = train(other, 10, None)
print(f"5 steps, then up to 10: {longer}")
print(f"10 steps at once, from the sixth on: { {step: rate for step, rate in whole.items() if step > 5} }")
raise SystemExit(0 if longer[6] == 0.0 and longer[7] == whole[7] == 0.4 and whole[6] == 0.5 else 1)
PY
"$dir/venv/bin/python" observe.py
