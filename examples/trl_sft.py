"""TRL's SFTTrainer on the hot experts: an ordinary script, in which three lines are hotlora's."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hotlora
from hotlora.data import load_examples
from hotlora.hf.models import NANOS

MODEL = NANOS["nano"]  # embedded, needs no network; or the name of any supported model, "allenai/OLMoE-1B-7B-0924"
OUTPUT = "runs/examples/sft"
STEPS = int(os.environ.get("STEPS", 100))

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto" if torch.cuda.is_available() else torch.float32)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
rows = [{"prompt": e.prompt, "completion": e.completion} for e in load_examples("nano-math")]  # or your own
texts = [row["prompt"] + row["completion"] for row in rows[:200]]
batches = [tokenizer(texts[i : i + 16], padding=True, return_tensors="pt") for i in range(0, len(texts), 16)]

profile = hotlora.profile_routing(model, batches)  # hotlora, 1 of 3: which experts the data uses
plan = hotlora.select_experts(profile, rule="hot", fraction=0.25)  # 2 of 3: which of them are kept
config = hotlora.HotLoraConfig(plan=plan, r=8, lora_alpha=16)  # 3 of 3: a LoraConfig

arguments = SFTConfig(
    output_dir=f"{OUTPUT}/checkpoints", max_steps=STEPS, per_device_train_batch_size=24, learning_rate=2e-3,
    router_aux_loss_coef=0.0, bf16=torch.cuda.is_available(), logging_steps=0.1, report_to="none",
)  # fmt: skip
trainer = SFTTrainer(
    model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=config
)
trainer.train()
trainer.save_model(f"{OUTPUT}/adapter")
print(f"Loss {trainer.state.log_history[-2]['loss']:.3f} after {STEPS} steps; the adapter lies in {OUTPUT}/adapter")
