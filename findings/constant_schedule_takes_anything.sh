#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: get_scheduler drops scheduler_specific_kwargs for the schedules "constant" and "constant_with_warmup": a
# name that no schedule has is taken without a word, and one that others have (min_lr_rate) changes nothing. Every
# other schedule raises a TypeError for a name that it does not know. Trainer's lr_scheduler_kwargs go the same way.
#
# A good engineer would guess: an argument that the schedule does not take is an error whatever the schedule.
#
# Output seen:
#   taken: constant, constant_with_warmup
#   TypeError: linear, cosine, cosine_with_min_lr, inverse_sqrt, polynomial
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from transformers import get_scheduler

taken, refused = [], []
for name in (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "inverse_sqrt", "polynomial",
):  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    given = {"no_such_option": 3}
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=given)
        taken.append(name)
    except TypeError:
        refused.append(name)
print(f"taken: {', '.join(taken)}")
print(f"TypeError: {', '.join(refused)}")
raise SystemExit(0 if taken == ["constant", "constant_with_warmup"] and len(refused) == 5 else 1)
PY
"$dir/venv/bin/python" observe.py
