"""GRPO whose trainer sends each token to the experts that the engine used. Goes on from trl_sft.py (run that first).

The engine here is the model with weights rounded to bfloat16, which routes otherwise at near-ties, as an engine does.
"""

import os

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import hotlora
from hotlora.data import load_examples
from hotlora.tasks.gsm8k import final_answer

MODEL, ADAPTER, OUTPUT = "nano", "runs/examples/sft/adapter", "runs/examples/grpo_replay"

model = hotlora.load_adapter(hotlora.load_model(MODEL), ADAPTER, is_trainable=True)
engine = hotlora.load_adapter(hotlora.load_model(MODEL), ADAPTER)
tokenizer = hotlora.load_tokenizer(MODEL)
data = [{"prompt": e.prompt, "answer": final_answer(e.completion)} for e in load_examples("nano-math")]
routes = hotlora.Routes()


def exact_match(completions, answer, **_):
    return [float(final_answer(text) == right) for text, right in zip(completions, answer, strict=True)]


@torch.no_grad()
def rollout(prompts, trainer):
    """The engine's answers with their log-probabilities; their experts go to `routes`."""
    for ours, theirs in zip(engine.parameters(), model.parameters(), strict=True):
        ours.copy_(theirs.bfloat16())
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(engine.device)
    options = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_scores": True}
    with hotlora.record_routing(engine) as recorded:
        made = engine.generate(**inputs, **options, max_new_tokens=40)
    logprobs = engine.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    experts, width = recorded.expert_ids(), inputs["input_ids"].shape[1]  # [layers, rows, positions, k]
    texts = []
    for row, mask in enumerate(inputs["attention_mask"]):
        ids, start = made.sequences[row].tolist(), width - int(mask.sum())
        end = ids.index(tokenizer.eos_token_id, width) + 1 if tokenizer.eos_token_id in ids[width:] else len(ids)
        routes.add(ids[start:end], experts[:, row, start : end - 1].transpose(0, 1))
        texts.append((ids[start:width], ids[width:end], logprobs[row, : end - width].tolist()))
    return dict(zip(("prompt_ids", "completion_ids", "logprobs"), map(list, zip(*texts, strict=True)), strict=True))


arguments = GRPOConfig(
    output_dir=f"{OUTPUT}/checkpoints", max_steps=int(os.environ.get("STEPS", 40)), learning_rate=5e-4,
    per_device_train_batch_size=64, num_generations=8, max_completion_length=40, gradient_checkpointing=False,
    router_aux_loss_coef=0.0, bf16=torch.cuda.is_available(), report_to="none",
)  # fmt: skip
data = Dataset.from_list(data)
trainer = GRPOTrainer(model, exact_match, arguments, data, processing_class=tokenizer, rollout_func=rollout)
with hotlora.replay_routing(model, routes):
    trainer.train()
trainer.save_model(f"{OUTPUT}/adapter")
print(f"{routes.found:,} rows went to the engine's experts, {routes.missing:,} to others; see {OUTPUT}/adapter")
