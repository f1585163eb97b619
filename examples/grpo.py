"""TRL's GRPOTrainer: the adapter of trl_sft.py (run that first) goes on with a reward for right answers."""

import os

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import hotlora
from hotlora.data import load_examples
from hotlora.tasks.gsm8k import final_answer

MODEL, ADAPTER, OUTPUT = "nano", "runs/examples/sft/adapter", "runs/examples/grpo"
STEPS = int(os.environ.get("STEPS", 40))

model = hotlora.load_adapter(hotlora.load_model(MODEL), ADAPTER, is_trainable=True)
tokenizer = hotlora.load_tokenizer(MODEL)
rows = [{"prompt": e.prompt, "answer": final_answer(e.completion)} for e in load_examples("nano-math")]


def exact_match(completions, answer, **_):
    return [float(final_answer(text) == right) for text, right in zip(completions, answer, strict=True)]


arguments = GRPOConfig(
    output_dir=f"{OUTPUT}/checkpoints", max_steps=STEPS, learning_rate=5e-4, temperature=0.7,
    per_device_train_batch_size=64, num_generations=8, max_completion_length=40, gradient_checkpointing=False,
    router_aux_loss_coef=0.0, bf16=torch.cuda.is_available(), logging_steps=0.1, report_to="none",
)  # fmt: skip
trainer = GRPOTrainer(
    model, reward_funcs=exact_match, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
)
trainer.train()
trainer.save_model(f"{OUTPUT}/adapter")
rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
print(f"Reward from {rewards[0]:.2f} to {rewards[-1]:.2f} in {STEPS} steps; the adapter lies in {OUTPUT}/adapter")
