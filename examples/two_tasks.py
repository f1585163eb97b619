"""Two adapters on one base model, each on its own task's experts; set_adapter switches, and both are scored."""

import os

import peft
import torch

import hotlora
from hotlora.data import batches, load_examples, tokenize
from hotlora.evaluation.score import evaluate_task
from hotlora.tasks import get_task

MODEL, TASKS, OUTPUT = "nano", {"math": "nano-math", "sql": "nano-sql"}, "runs/examples/two-tasks"
STEPS = int(os.environ.get("STEPS", 60))

base, tokenizer = hotlora.load_model(MODEL), hotlora.load_tokenizer(MODEL)
data = {name: tokenize(load_examples(task), tokenizer, max_length=256) for name, task in TASKS.items()}
plans = {}
for name, dataset in data.items():  # all plans come from the base, before any adapter is on it
    profile = hotlora.profile_routing(base, batches(dataset.select(range(200)), tokenizer, batch_size=16))
    plans[name] = hotlora.select_experts(profile, rule="hot", fraction=0.25)
print(f"The two plans share {hotlora.jaccard(plans['math'], plans['sql']):.0%} of their experts.")
model = peft.get_peft_model(base, hotlora.HotLoraConfig(plan=plans["math"], r=8, lora_alpha=16), adapter_name="math")
model.add_adapter("sql", hotlora.HotLoraConfig(plan=plans["sql"], r=8, lora_alpha=16))
for name, dataset in data.items():
    model.set_adapter(name)  # the other is frozen and takes no part
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3, weight_decay=0.0)
    for step in range(STEPS):
        (batch,) = batches(dataset.shuffle(seed=step).select(range(16)), tokenizer, batch_size=16)
        model(**{key: tensor.to(model.device) for key, tensor in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
model.save_pretrained(OUTPUT)
for name in TASKS:
    model.set_adapter(name)
    for task in TASKS.values():
        score = evaluate_task(model, tokenizer, get_task(task), load_examples(task, "test", limit=50))
        print(f"adapter {name}: {score.accuracy:.0%} of {score.n} on {task}")
print(f"The adapters lie in {OUTPUT}/math and {OUTPUT}/sql")
