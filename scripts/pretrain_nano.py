"""Pretrain an embedded model from scratch: tokenizer, weights, log.

    python scripts/pretrain_nano.py --text FOLDER --output hotlora/nano/model
    python scripts/pretrain_nano.py --text FOLDER --output hotlora/nano/qwen --form qwen --half

Text is generated from a seed (`hotlora/nano/corpus.py`); `--text` adds a folder of plain text or JSONL. The committed
weights were trained with HellaSwag's training split (MIT) and PIQA's (AFL-3.0) there. The load-balancing loss is
OLMoE's: one loss over the concatenated logits of all layers of a micro-batch, which balances experts over the model
and leaves each layer skewed. A sequence holds one domain's documents, as a long document would fill it. On 2 CPU cores
each takes one to two hours.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast, Qwen2MoeConfig
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from hotlora.nano import choice, sql
from hotlora.nano import math as nano_math
from hotlora.nano.corpus import documents, read_texts

EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
console = Console()


def olmoe(width: int, shape: dict) -> OlmoeConfig:
    return OlmoeConfig(**shape, intermediate_size=width, norm_topk_prob=False)


def qwen(width: int, shape: dict) -> Qwen2MoeConfig:
    """Routing weights that are normalised over the chosen experts, and a shared expert of the width of two."""
    return Qwen2MoeConfig(
        **shape, moe_intermediate_size=width, shared_expert_intermediate_size=2 * width, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False,
    )  # fmt: skip


FORMS = {"olmoe": olmoe, "qwen": qwen}


def halve(file: Path) -> None:
    """Rounds a safetensors file's weights to bfloat16. config.json's dtype, in which they are computed, stays."""
    save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file, {"format": "pt"})


def train_tokenizer(stream: Iterator[tuple[str, str]], vocab_size: int, characters: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token of its own, so that numbers have one spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice((d for _, d in stream), characters // 200), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE, model_max_length=512
    )


def sequences(tokenizer, stream: Iterator[tuple[str, str]], length: int) -> Iterator[list[int]]:
    """Sequences of ``length`` tokens, each packed with one domain's documents, every one closed by EOS."""
    pending: dict[str, list[int]] = {}
    while True:
        domains, texts = zip(*itertools.islice(stream, 4000), strict=True)
        for domain, ids in zip(domains, tokenizer(list(texts))["input_ids"], strict=True):
            tokens = pending.setdefault(domain, [])
            tokens += [*ids, tokenizer.eos_token_id]
            while len(tokens) >= length:
                yield tokens[:length]
                del tokens[:length]


def balance_loss(router_logits: tuple[torch.Tensor, ...], batch_size: int, micro: int, top_k: int) -> torch.Tensor:
    """transformers' load-balancing loss, over all layers at once, of each micro-batch of ``micro`` sequences."""
    num_experts = router_logits[0].shape[-1]
    by_sequence = [logits.view(batch_size, -1, num_experts) for logits in router_logits]
    losses = [
        load_balancing_loss_func(
            tuple(logits[i : i + micro].flatten(0, 1) for logits in by_sequence), num_experts, top_k
        )
        for i in range(0, batch_size, micro)
    ]
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine decay to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def task_texts(n: int) -> dict[str, list[str]]:
    """Held-out text of the three nano tasks, prompt and answer."""
    return {
        "nano-math": [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in nano_math.rows("test", n)],
        "nano-sql": [f"Question: {r['question']}\nSQL: {r['query']}" for r in sql.rows("test", n)],
        "nano-choice": [f"{r['ctx']} {r['endings'][int(r['label'])]}" for r in choice.rows("test", n)],
    }


@torch.no_grad()
def routing_statistics(model, tokenizer, texts: list[str] | None, n: int = 200) -> dict:
    """Per nano task (and held-out text): layer and global CV, cold share, coverage; hot-set Jaccard between tasks."""
    from hotlora.routing.plan import select_experts
    from hotlora.routing.profile import jaccard
    from hotlora.routing.profiler import profile_routing

    domains = task_texts(n) | ({"text": texts[:n]} if texts else {})
    stats, plans = {}, {}
    for name, documents_ in domains.items():
        batches = (
            tokenizer(documents_[i : i + 50], return_tensors="pt", padding=True, truncation=True, max_length=256)
            for i in range(0, n, 50)
        )
        profile = profile_routing(model, batches)
        layer, overall = float(profile.layer_cv().mean()), float(profile.global_cv())
        stats[name] = {
            "layer_cv": round(layer, 3),
            "global_cv": round(overall, 3),
            "ratio": round(layer / overall, 2),
            "cold_share": round(float(torch.as_tensor(profile.cold_share()).double().mean()), 3),
            "coverage_25": round(float(profile.coverage(fraction=0.25).mean()), 3),
        }
        plans[name] = select_experts(profile, rule="hot", fraction=0.25).experts
    tasks = list(task_texts(1))
    stats["jaccard_25"] = {
        f"{a} ~ {b}": round(jaccard(plans[a], plans[b]), 3) for a, b in itertools.combinations(tasks, 2)
    }
    return stats


@torch.no_grad()
def held_out_loss(model, tokenizer, streams: dict[str, list[str]]) -> dict[str, float]:
    """Mean next-token loss of each domain's held-out documents, in nats a token."""
    losses = {}
    for domain, texts in streams.items():
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=256)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses[domain] = round(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item(), 4
        )
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hotlora/nano/model"))
    parser.add_argument("--form", choices=FORMS, default="olmoe", help="whose architecture")
    parser.add_argument("--text", type=Path, help="a folder of .txt, .jsonl or .jsonl.gz files")
    parser.add_argument("--half", action="store_true", help="store the weights in bfloat16")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--aux", type=float, default=0.01, help="coefficient of the load-balancing loss")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences that the balancing loss is taken over")
    parser.add_argument("--stats-every", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = read_texts(args.text) if args.text else []
    random.Random(args.seed).shuffle(texts)
    held_out_texts, texts = texts[:400], texts[400:]
    tokenizer = train_tokenizer(documents(args.seed + 1, texts), args.vocab_size, characters=8_000_000)
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    shape = {
        "vocab_size": args.vocab_size, "hidden_size": args.hidden_size, "num_hidden_layers": 6,
        "num_attention_heads": args.hidden_size // 32, "num_key_value_heads": args.hidden_size // 32,
        "max_position_embeddings": 512, "num_experts": 32, "num_experts_per_tok": 4, "output_router_logits": False,
        "router_aux_loss_coef": args.aux, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False,
    }  # fmt: skip
    config = FORMS[args.form](args.intermediate_size, shape)
    model = AutoModelForCausalLM.from_config(config).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    blocks = sequences(tokenizer, documents(args.seed, texts), args.length)
    held_out: dict[str, list[str]] = {"text": held_out_texts[:50]} if held_out_texts else {}
    for domain, document in itertools.islice(documents(args.seed + 2, None), 600):
        if len(held_out.setdefault(domain, [])) < 50:
            held_out[domain].append(document)

    args.output.mkdir(parents=True, exist_ok=True)
    log_path = args.output / "pretraining.jsonl"
    log_path.write_text("")
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; log: {log_path}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.time()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("pretraining", total=args.steps)
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.learning_rate)
            batch = torch.tensor([next(blocks) for _ in range(args.batch_size)], device=device)
            out = model.model(input_ids=batch, output_router_logits=True)
            logits = model.lm_head(out.last_hidden_state[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            aux = balance_loss(out.router_logits, args.batch_size, args.micro_batch, config.num_experts_per_tok)
            (loss + args.aux * aux).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(bar)
            if (step + 1) % 50 and step + 1 != args.steps:
                continue
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * args.batch_size * args.length,
                "seconds": round(time.time() - started, 1),
                "loss": round(loss.item(), 4),
                "aux_loss": round(aux.item(), 4),
                "grad_norm": round(norm.item(), 3),
            }
            if (step + 1) % args.stats_every == 0 or step + 1 == args.steps:
                model.eval()
                entry["held_out_loss"] = held_out_loss(model, tokenizer, held_out)
                entry["routing"] = routing_statistics(model, tokenizer, held_out_texts)
                model.train()
                model.save_pretrained(args.output)
                tokenizer.save_pretrained(args.output)
            progress.console.print(json.dumps(entry))
            with log_path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
    if args.half:
        halve(args.output / "model.safetensors")
    size = sum(f.stat().st_size for f in args.output.iterdir()) / 1e6
    console.print(f"nano lies in {args.output} ({size:.1f} MB)")


if __name__ == "__main__":
    main()
