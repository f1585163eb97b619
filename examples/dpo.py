"""TRL's DPOTrainer: right answers against wrong ones, on top of the adapter of trl_sft.py (run that first)."""

import os

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import hotlora
from hotlora.data import load_examples

MODEL, ADAPTER, OUTPUT = "nano", "runs/examples/sft/adapter", "runs/examples/dpo"
STEPS = int(os.environ.get("STEPS", 30))

tuned = hotlora.load_adapter(hotlora.load_model(MODEL), ADAPTER)
config = hotlora.HotLoraConfig(plan=tuned.peft_config["default"].plan, r=8, lora_alpha=16)  # the same experts
model = tuned.merge_and_unload()  # what was learned so far is the reference; DPO's adapter comes on top
tokenizer = hotlora.load_tokenizer(MODEL)
rows = []
for example in load_examples("nano-math", limit=1000):
    work, answer = example.completion.split("#### ")
    rows.append({"prompt": example.prompt, "chosen": example.completion, "rejected": f"{work}#### {int(answer) + 1}"})

arguments = DPOConfig(
    output_dir=f"{OUTPUT}/checkpoints", max_steps=STEPS, learning_rate=5e-4, per_device_train_batch_size=16,
    gradient_checkpointing=False, router_aux_loss_coef=0.0, bf16=torch.cuda.is_available(), logging_steps=0.1,
    report_to="none",
)  # fmt: skip
trainer = DPOTrainer(
    model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=config
)
trainer.train()
trainer.save_model(f"{OUTPUT}/adapter")
log = trainer.state.log_history[-2]
print(f"Loss {log['loss']:.3f}; {log['rewards/accuracies']:.0%} of the right answers gained on the wrong ones.")
print(f"The adapter, for the merged model, lies in {OUTPUT}/adapter")
