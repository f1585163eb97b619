#!/bin/sh
# transformers 5.23.0 (torch 2.13.0, accelerate 1.15.0)
#
# Behaviour: the load-balancing loss of a mixture of experts, in plain Trainer, weighs as many times more as there are
# gradient accumulation steps. The same four rows, taken as one batch of four or as four batches of one, give the same
# gradient of the cross entropy and four times the gradient of the auxiliary loss: the model adds its coefficient
# times the auxiliary loss to each micro-batch's share, and Trainer leaves the division to the model.
#
# A good engineer would guess: a batch of 4 and 4 accumulated batches of 1 give the same step, here exactly, since the
# four rows are equal and none is padded.
#
# Output seen:
#   gradient, 4 batches of 1 against 1 batch of 4: cross entropy 1.000 times
#                                                  auxiliary loss 4.000 times
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import logging
import warnings

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PrinterCallback, Trainer, TrainingArguments

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def change(batch, accumulate, coefficient):
    """What one step of SGD with rate 1 takes from the router, which is its gradient."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
        output_router_logits=coefficient > 0, router_aux_loss_coef=coefficient,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    router = next(value for name, value in model.named_parameters() if name.endswith("gate.weight"))
    before = router.detach().clone()
    arguments = TrainingArguments(
        "run", max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [1, 5, 9, 3, 7, 2], "labels": [1, 5, 9, 3, 7, 2]}] * 4
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return before - router.detach()


plain = [change(batch, steps, 0.0) for batch, steps in ((4, 1), (1, 4))]
auxiliary = [change(batch, steps, 0.5) - base for (batch, steps), base in zip(((4, 1), (1, 4)), plain)]
by_entropy, by_auxiliary = ((few.norm() / one.norm()).item() for one, few in (plain, auxiliary))
print(f"gradient, 4 batches of 1 against 1 batch of 4: cross entropy {by_entropy:.3f} times")
print(f"                                               auxiliary loss {by_auxiliary:.3f} times")
assert abs(by_entropy - 1) < 0.01
assert abs(by_auxiliary - 4) < 0.05
PY
"$dir/venv/bin/python" observe.py
