"""A plain PyTorch loop: train the hot experts, save, load onto a fresh base model, generate."""

import os

import peft
import torch

import hotlora
from hotlora.data import batches, load_examples, tokenize

MODEL, DATA, OUTPUT = "nano", "nano-math", "runs/examples/plain"  # or "allenai/OLMoE-1B-7B-0924", "train.jsonl"
STEPS = int(os.environ.get("STEPS", 100))

model, tokenizer = hotlora.load_model(MODEL), hotlora.load_tokenizer(MODEL)
dataset = tokenize(load_examples(DATA, tokenizer=tokenizer), tokenizer, max_length=256)
profile = hotlora.profile_routing(model, batches(dataset.select(range(200)), tokenizer, batch_size=16))
plan = hotlora.select_experts(profile, rule="hot", fraction=0.25)
model = peft.get_peft_model(model, hotlora.HotLoraConfig(plan=plan, r=8, lora_alpha=16)).train()
model.print_trainable_parameters()

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3, weight_decay=0.0)
for step in range(1, STEPS + 1):
    picked = dataset.shuffle(seed=step).select(range(24))
    (batch,) = batches(picked, tokenizer, batch_size=24)  # input_ids, attention_mask, labels; loss on the response
    loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == STEPS:
        print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(OUTPUT)

model = hotlora.load_adapter(hotlora.load_model(MODEL), OUTPUT)
prompt = load_examples(DATA, "test", limit=1)[0].prompt
answer = model.generate(**tokenizer(prompt, return_tensors="pt").to(model.device), max_new_tokens=32)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
print(f"The adapter lies in {OUTPUT}")
