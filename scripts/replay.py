"""Does it matter which experts GRPO trains? nano, with an engine that routes otherwise at near-ties; 8 seeds each.

python scripts/replay.py           # an hour of CPU and more; runs that are done (runs/replay) are not run again
python scripts/replay.py --page    # results/nano/replay.json into docs/training.md, and its picture

The engine is the model itself; before its routers choose, each expert's score is multiplied by exp(noise) (the gate
weights stay the scores). The trainer takes the engine's log-probabilities as those of the old policy: then importance
ratios tell what the trainer computes otherwise, with the engine's routes replayed nothing, to rounding. Its own routes
are seen beside, in a forward without gradients.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from marks import filled, table
from torch import Tensor
from torch.overrides import TorchFunctionMode

import hotlora
from hotlora.base.files import write_json
from hotlora.data import load_examples
from hotlora.evaluation.stats import mean_interval, paired_test
from hotlora.report.figures import HOT, INK, LEGEND, MUTED, WIDTH, Figure, save_figure, style
from hotlora.tasks.gsm8k import final_answer

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "results" / "nano" / "replay.json", ROOT / "docs" / "training.md"
PICTURE, MARK = ROOT / "docs" / "assets" / "replay.png", "<!-- replay -->"
ARMS = {"replayed": (True, True), "the trainer's own": (True, False), "engine routes alike": (False, False)}
"""name -> whether the engine's routes are disturbed, and whether they are replayed"""
SEEDS, STEPS, ROWS, GROUP, LENGTH = 8, 30, 32, 8, 40
LAST = 10  # steps whose reward is compared
SFT = {"max_steps": 150, "seed": 0, "r": 8, "fraction": 0.25, "evaluate": False, "preflight": False}


class Disturbed(TorchFunctionMode):
    """topk over the experts' scores chooses by scores x exp(noise), and gives the scores."""

    def __init__(self, num_experts: int, noise: float, seed: int) -> None:
        super().__init__()
        self.num_experts, self.noise, self.random = num_experts, noise, torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, Tensor.topk) or args[0].shape[-1] != self.num_experts:
            return func(*args, **(kwargs or {}))
        scores = args[0]
        moved = scores * (self.noise * torch.randn(scores.shape, generator=self.random)).exp()
        index = func(moved, *args[1:], **(kwargs or {})).indices
        return torch.return_types.topk((scores.gather(-1, index), index))


def train(seed: int, arm: str, steps: int, noise: float, start: str) -> dict[str, Any]:
    """One run's reward by step, and at each step what the engine's text is to the trainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    is_disturbed, is_replayed = ARMS[arm]
    model = hotlora.load_adapter(hotlora.load_model("nano"), start, is_trainable=True)
    tokenizer = hotlora.load_tokenizer("nano")
    rows = [{"prompt": e.prompt, "answer": final_answer(e.completion)} for e in load_examples("nano-math")]
    routes = hotlora.Routes()
    names = ("reward", "flipped", "tokens_flipped", "kl", "kl_replayed", "ratio", "ratio_replayed")
    record: dict[str, Any] = {name: [] for name in names}

    def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        right = [float(final_answer(text) == wanted) for text, wanted in zip(completions, answer, strict=True)]
        record["reward"].append(fmean(right))
        return right

    @torch.no_grad()
    def rollout(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        options = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_scores": True}
        model.eval()
        disturbed = Disturbed(32, noise if is_disturbed else 0.0, seed * 100_003 + len(record["reward"]))
        with hotlora.record_routing(model) as recorded, disturbed:
            made = model.generate(**inputs, **options, max_new_tokens=LENGTH)
        model.train()
        logprobs = model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        experts, width = recorded.expert_ids(), inputs["input_ids"].shape[1]
        found: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        texts = []
        for row, mask in enumerate(inputs["attention_mask"]):
            ids, first = made.sequences[row].tolist(), width - int(mask.sum())
            end = ids.index(tokenizer.eos_token_id, width) + 1 if tokenizer.eos_token_id in ids[width:] else len(ids)
            found["prompt_ids"].append(ids[first:width])
            found["completion_ids"].append(ids[width:end])
            found["logprobs"].append(logprobs[row, : end - width].tolist())
            texts.append((ids[first:end], width - first, experts[:, row, first : end - 1]))
        routes.clear()  # what is compared finds none
        compare(texts, found["logprobs"])
        for ids, _, of_text in texts:
            routes.add(ids, of_text.transpose(0, 1))
        return found

    def compare(texts: list[tuple[list[int], int, Tensor]], logprobs: list[list[float]]) -> None:
        """The engine's texts in the trainer's forward, with its own routes and with the engine's."""
        width = max(len(ids) for ids, _, _ in texts)
        ids = torch.tensor([text + [tokenizer.pad_token_id] * (width - len(text)) for text, _, _ in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text, _, _ in texts])
        model.eval()
        own = torch.full((6, *ids.shape, 4), -1)
        for row, (text, _, experts) in enumerate(texts):
            own[:, row, : len(text) - 1] = experts
        with hotlora.record_routing(model) as live:
            free = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        with hotlora.replay_routing(model, own):
            replayed = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        model.train()
        chosen = live.expert_ids()
        flips, logs = [], {"": [], "_replayed": []}
        for row, ((text, start, experts), engine) in enumerate(zip(texts, logprobs, strict=True)):
            places = torch.arange(start, len(text))
            flips.append((chosen[:, row, : len(text) - 1].sort(-1).values != experts.sort(-1).values).any(-1))
            for name, scores in (("", free), ("_replayed", replayed)):
                at = scores[row, places - 1].gather(-1, ids[row, places, None])[:, 0]
                logs[name].append(at - torch.tensor(engine))
        flipped = torch.cat(flips, dim=1).double()  # [layers, tokens]
        record["flipped"].append(flipped.mean().item())
        record["tokens_flipped"].append(flipped.amax(dim=0).mean().item())
        for name, parts in logs.items():
            change = torch.cat(parts).double()
            record[f"kl{name}"].append((change.exp() - 1 - change).mean().item())
            record[f"ratio{name}"].append((change.exp() - 1).abs().max().item())

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        """The old policy is the engine, whose log-probabilities TRL takes for vLLM alone."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            made = super()._generate_and_score_completions(inputs)
            return made | {"old_per_token_logps": made["sampling_per_token_logps"]}

    arguments = GRPOConfig(
        output_dir=f"{start}/../../grpo", max_steps=steps, learning_rate=2e-4, per_device_train_batch_size=ROWS,
        num_generations=GROUP, max_completion_length=LENGTH, gradient_checkpointing=False, router_aux_loss_coef=0.0,
        bf16=False, report_to="none", save_strategy="no", seed=seed, disable_tqdm=True, logging_steps=steps,
    )  # fmt: skip
    trainer = Trainer(
        model, exact_match, arguments, Dataset.from_list(rows), processing_class=tokenizer, rollout_func=rollout
    )
    with hotlora.replay_routing(model, routes if is_replayed else hotlora.Routes()):
        trainer.train()
    assert not is_replayed or not routes.missing, "each row has the engine's routes"
    return record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--page", action="store_true", help="write the page from the record alone")
    parser.add_argument("--output", type=Path, default=Path("runs/replay"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation of the noise on a score's log")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if not arguments.page:
        measure(arguments)
    result = json.loads(RESULT.read_text())
    PAGE.write_text(filled(PAGE.read_text(), MARK, page(result)))
    draw(result)
    print(f"page: {PAGE}")


def measure(arguments: argparse.Namespace) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    start = arguments.output / "sft"
    hotlora.train("nano", "nano-math", start, **SFT, progress=False)
    jobs = [(seed, arm) for seed in range(arguments.seeds) for arm in ARMS]
    with ProcessPoolExecutor(arguments.processes) as pool:
        done = list(pool.map(run, [(*job, arguments) for job in jobs]))
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for (_, arm), record in zip(jobs, done, strict=True):
        runs[arm].append(record)
    write_json(RESULT, {"noise": arguments.noise, "steps": arguments.steps, "runs": runs})


def run(job: tuple[int, str, argparse.Namespace]) -> dict[str, Any]:
    seed, arm, arguments = job
    file: Path = arguments.output / f"{arm.replace(' ', '-')}-{seed}.json"
    if not file.exists():
        torch.set_num_threads(1)
        start = str(arguments.output / "sft" / "adapter")
        write_json(file, train(seed, arm, arguments.steps, arguments.noise, start))
        print(file, flush=True)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def page(result: dict[str, Any]) -> str:
    runs, rows = result["runs"], []
    last = {arm: [fmean(run["reward"][-LAST:]) for run in of] for arm, of in runs.items()}
    for arm, of in runs.items():
        kind = "_replayed" if ARMS[arm][1] else ""
        low, high = mean_interval(last[arm])
        rows.append([
            arm, f"{_mean(of, 'flipped'):.1%}", f"{_mean(of, 'tokens_flipped'):.0%}", f"{_mean(of, 'kl' + kind):.1e}",
            f"{max(max(run['ratio' + kind]) for run in of):.1e}", f"{fmean(last[arm]):.1%} ({low:.1%} to {high:.1%})",
        ])  # fmt: skip
    heads = ["experts in training", "routes that differ", "tokens with one", "KL", "largest ratio - 1", "reward"]
    test = paired_test(last["replayed"], last["the trainer's own"])
    assert test.interval is not None and test.p is not None
    count = len(next(iter(runs.values())))
    interval = f"{100 * test.interval.low:+.1f} to {100 * test.interval.high:+.1f}"
    return f"""{table(heads, rows)}

nano on nano-math, {count} seeds, {result["steps"]} steps of {ROWS} answers; the engine chooses by
scores times exp(noise of {result["noise"]:g}). Shares of tokens and layers, and KL (engine to trainer, of the sampled
tokens), are means of all steps; reward is of the last {LAST} steps, with the 95% interval over seeds. Replayed less the
trainer's own: {100 * test.mean:+.1f} points ({interval}, p = {test.p:.2f}). Made by `python scripts/replay.py`."""


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return fmean(value for run in runs for value in run[name])


def _series(runs: list[dict[str, Any]], name: str) -> Any:
    """Mean of the runs, then of 5 steps each."""
    values = np.array([run[name] for run in runs]).mean(axis=0)
    return np.convolve(values, np.ones(5) / 5, mode="valid")


def draw(result: dict[str, Any]) -> None:
    """Reward, and KL between engine and trainer, by step."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = dict(zip(ARMS, (HOT, INK, MUTED), strict=True))
    for arm, of in result["runs"].items():
        kind = "_replayed" if ARMS[arm][1] else ""
        for panel, name in zip(axes, ("reward", f"kl{kind}"), strict=True):
            values = _series(of, name)
            panel.plot(range(5, 5 + len(values)), values, color=colours[arm], label=arm)
    for panel, title in zip(axes, ("reward, mean of seeds", "KL of engine and trainer"), strict=True):
        style(panel)
        panel.set_title(title, loc="left")
        panel.set_xlabel("step (mean of 5)")
    axes[0].set_ylim(0)
    axes[1].set_yscale("log")
    axes[1].minorticks_off()
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes[0].legend(**LEGEND, loc="lower left")
    save_figure(figure, PICTURE, dpi=150)


if __name__ == "__main__":
    main()
