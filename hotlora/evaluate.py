"""Scores a model on a task: greedy answers, or the likelihood of each choice; every result is kept."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, StoppingCriteria

from .data import IGNORE, batches, encode_completion, encode_prompt, pad
from .errors import DataError
from .files import atomic_path
from .stats import proportion_interval
from .tasks import Example, Task

_CHUNK = 2048  # tokens whose float32 logits are held at once
_JUDGES = min(4, os.cpu_count() or 1)  # answers judged at once: each may wait for a process of its own


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A task's score, its 95% Wilson interval, and what each example came to.

    Attributes:
        metric: "exact_match", "execution_accuracy", "test_suite_accuracy", "pass@1", "acc" or "acc_norm".
        correct: the examples answered right; where an example has several answers, it counts by their right share.
        results: one dict an example, in order: `index`, `id` (a hash of the prompt, to pair runs by),
            `prediction` (the text, or the index of the choice), `correct`; for choices also `scores`, as
            `choice_scores`; for several answers, lists, as `generations` says.
        seconds: wall-clock time of the whole evaluation.
        pass_at_k: by k, the mean chance that k answers hold a right one; empty where each example has one answer.
    """

    task: str
    metric: str
    accuracy: float
    n: int
    correct: float
    ci_low: float
    ci_high: float
    results: list[dict[str, Any]]
    seconds: float
    pass_at_k: Mapping[int, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The numbers, without the examples, as a run record holds them."""
        names = ("metric", "accuracy", "n", "correct", "ci_low", "ci_high", "seconds")
        passes = {f"pass@{k}": value for k, value in self.pass_at_k.items()}
        return {name: getattr(self, name) for name in names} | passes

    def write_results(self, path: str | os.PathLike[str]) -> None:
        """One JSON line an example; the file is whole or absent."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in self.results)


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Runs every example through the model, greedily and without few-shot examples.

    Args:
        batch_size: prompts generated at once, or sequences (an example's choices count each) scored at once.
        progress: whether to show a progress bar.

    Raises:
        DataError: no examples, a batch size below 1, an example that the task cannot judge, or data without a
            scorer.
    """
    task.check_scored()
    _check(examples, batch_size)
    started = time.perf_counter()
    outcomes: list[dict[str, Any]]
    if task.kind == "choice":
        scores = choice_scores(
            model, tokenizer, examples,
            per_character=task.metric == "acc_norm", batch_size=batch_size, progress=progress,
        )  # fmt: skip
        outcomes = []
        for example, values in zip(examples, scores, strict=True):
            best = max(range(len(values)), key=values.__getitem__)  # a tie goes to the lower index
            outcomes.append({"prediction": best, "correct": best == example.label, "scores": values})
    else:
        texts = generate(
            model, tokenizer, examples,
            max_new_tokens=task.max_new_tokens, stop=task.stop, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        right = judge(task, examples, texts, progress=progress)
        outcomes = [{"prediction": text, "correct": correct} for text, correct in zip(texts, right, strict=True)]
    results = [
        {"index": i, "id": example_id(example), **outcome}
        for i, (example, outcome) in enumerate(zip(examples, outcomes, strict=True))
    ]
    correct, n = sum(outcome["correct"] for outcome in outcomes), len(examples)
    low, high = proportion_interval(correct, n)
    seconds = time.perf_counter() - started
    return Evaluation(task.name, task.metric_name(examples), correct / n, n, correct, low, high, results, seconds)


def judge(task: Task, examples: Sequence[Example], texts: Sequence[str], *, progress: bool = False) -> list[bool]:
    """Whether each text answers its example, by the task's scorer; some are judged at once, as far as it allows."""
    assert task.score is not None
    with ThreadPoolExecutor(_JUDGES) as pool:
        return list(_track(pool.map(task.score, examples, texts), "judging", progress, len(texts)))


def example_id(example: Example) -> str:
    """A hash of the prompt, by which the results of two runs are paired."""
    return hashlib.sha256(example.prompt.encode()).hexdigest()[:16]


def generate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """The model's greedy continuation of every prompt, up to the end-of-text token or the first of `stop`.

    Prompts of similar length go together, padded on the left, the longest first: a batch that does not fit in
    memory fails at once.
    """
    _check(examples, batch_size)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, use_cache=True,
        eos_token_id=_end_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id or 0,
    )  # fmt: skip
    texts = [""] * len(prompts)
    with _inference(model):
        for picked in _track(list(_groups(order, batch_size)), "generating", progress):
            ids = [torch.tensor(prompts[i]) for i in picked]
            width = max(len(row) for row in ids)
            output = model.generate(
                input_ids=pad(ids, tokenizer.pad_token_id, "left").to(model.device),
                attention_mask=pad([torch.ones_like(row) for row in ids], 0, "left").to(model.device),
                generation_config=config,
                stopping_criteria=[_StopTexts(tokenizer, stop, width)] if stop else None,
            )
            decoded = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for i, text in zip(picked, decoded, strict=True):
                texts[i] = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
    return texts


def choice_scores(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    per_character: bool = True,
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[float]]:
    """For every example and choice, the log-likelihood of the choice after the prompt (nats).

    Args:
        per_character: over the choice's length, as acc_norm ranks choices; acc ranks them by the whole.
    """
    _check(examples, batch_size)
    rows = []  # (example, choice, token ids, number of prompt tokens)
    for i, example in enumerate(examples):
        prompt = encode_prompt(example, tokenizer)
        for j, choice in enumerate(example.choices):
            completion = encode_completion(example, f" {choice}", prompt, tokenizer)
            if not choice or not completion or not prompt:
                raise DataError(f"Example {i}: choice {j} or its prompt is empty, so it has no likelihood.")
            rows.append((i, j, torch.tensor(prompt + completion), len(prompt)))
    scores = [[0.0] * len(example.choices) for example in examples]
    order = sorted(range(len(rows)), key=lambda r: (-len(rows[r][2]), -rows[r][3]))
    with _inference(model):
        for picked in _track(list(_groups(order, batch_size)), "scoring", progress):
            labels = [rows[r][2].index_fill(0, torch.arange(rows[r][3]), IGNORE) for r in picked]
            ids = [rows[r][2] for r in picked]
            batch = {
                "input_ids": pad(ids, tokenizer.pad_token_id),
                "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
                "labels": pad(labels, IGNORE),
            }
            for r, value in zip(picked, _log_likelihood(model, batch).tolist(), strict=True):
                i, j = rows[r][:2]
                scores[i][j] = value / len(examples[i].choices[j]) if per_character else value
    return scores


def response_loss(
    model: Any, tokenizer: Any, dataset: Dataset, *, batch_size: int = 32, progress: bool = False
) -> float:
    """Mean negative log-likelihood (nats) over all response tokens of a tokenized data set, each once."""
    total, num_tokens = 0.0, 0
    num_batches = -(-len(dataset) // batch_size) if batch_size > 0 else None
    with _inference(model):
        for batch in _track(batches(dataset, tokenizer, batch_size), "loss", progress, num_batches):
            total -= _log_likelihood(model, batch).sum().item()
            num_tokens += int((batch["labels"][:, 1:] != IGNORE).sum())
    if not num_tokens:
        raise DataError("The data has no response tokens, so it has no loss; check its completions.")
    return total / num_tokens


def _log_likelihood(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the labelled tokens' log-probabilities, float64 `[B]`.

    The LM head runs only where some row has a label next, and float32 logits are held a chunk at a time.
    """
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    positions = (labels != IGNORE).any(0).nonzero()[:, 0]
    logits = model(**batch, use_cache=False, logits_to_keep=positions).logits  # [B, positions, V]
    labels = labels[:, positions].to(logits.device)
    found = labels != IGNORE
    parts = [
        -torch.nn.functional.cross_entropy(some.float(), target, reduction="none")
        for some, target in zip(logits[found].split(_CHUNK), labels[found].split(_CHUNK), strict=True)
    ]
    # Summed on the CPU: not every device has float64.
    values = torch.zeros(labels.shape, dtype=torch.float64)
    values[found.cpu()] = torch.cat(parts).double().cpu() if parts else values.new_zeros(0)
    return values.sum(1)


class _StopTexts(StoppingCriteria):
    """Ends a row at a text in what it generated. transformers' own first reads the whole vocabulary."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_width: int) -> None:
        self.tokenizer, self.stop, self.prompt_width = tokenizer, tuple(stop), prompt_width
        self.window = max(len(text) for text in stop) + 4  # a token has a character or more, but for split ones

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tail = input_ids[:, max(self.prompt_width, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-text token and those of the generation config: a chat model has several."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in (tokenizer.eos_token_id, *own) if i is not None})


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the training flag comes back, also after an error."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _groups(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _track(items: Iterable, description: str, progress: bool, total: int | None = None) -> Iterable:
    from rich.console import Console
    from rich.progress import track

    return track(items, description, total=total, transient=True, console=Console(stderr=True)) if progress else items


def _check(examples: Sequence[Example], batch_size: int) -> None:
    if not examples:
        raise DataError("There are no examples to evaluate; give at least one.")
    if batch_size < 1:
        raise DataError(f"A batch size of {batch_size} is out of range; give at least 1.")
