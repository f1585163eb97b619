"""Scores a model on a task: its answers, or the likelihood of each choice; every result is kept."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from datasets import Dataset

from ..base.errors import DataError, FileError
from ..base.files import append_to, atomic_path
from ..base.processes import all_objects, device_of, num_processes, rank, shared_out
from ..base.records import read_results
from ..hf.forward import LOGITS, head_for_chunks, hidden_at, inference, logits_at
from ..hf.models import context_length
from ..tasks import Example, Task
from ..tasks.tokens import IGNORE, MOST_TOKENS, batch_places, batches, encode_completion, encode_prompt, pad
from .generate import GREEDY, Answer, Sampling, answer_batches, check_batches, track
from .stats import pass_at_k, proportion_interval, ratio_interval

KS = (1, 5, 10)  # of pass@k, where every example has that many answers
_JUDGES = min(4, os.cpu_count() or 1)  # answers judged at once: each may wait for a process of its own

Result = dict[str, Any]


class RowLoss(NamedTuple):
    """What a model makes of a row's response tokens: their summed loss in nats, their number, and how many of them it
    ranks first."""

    loss: float
    tokens: int
    right: int


T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A task's score, its 95% Wilson interval, and what each example came to.

    Attributes:
        metric: "exact_match", "execution_accuracy", "test_suite_accuracy", "pass@1", "acc", "acc_norm" or
            "refusal_rate", where an example is right if it is refused.
        correct: the examples answered right; where an example has several answers, it counts by their right share.
        results: one dict an example, in order: `index`, `id` (a hash of the prompt, to pair runs by),
            `prediction` (the text, or the index of the choice), `correct`; for choices also `scores` (nats; for
            acc_norm over the length), and `cut`, the tokens of its prompt that did not fit into the model's window, if
            any; for several answers, the lists `predictions` and `passed`; `unfinished`, how many of its answers were
            cut at the task's `max_new_tokens`, if any.
        seconds: wall-clock time, of what was not done before.
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

    @property
    def cut(self) -> int:
        """Examples whose prompt was cut, for it did not fit into the model's window."""
        return sum("cut" in result for result in self.results)

    @property
    def unfinished(self) -> int:
        """Answers that were cut at the longest that they may be."""
        return sum(result.get("unfinished", 0) for result in self.results)

    def summary(self) -> dict[str, Any]:
        """The numbers, without the examples, as a run record holds them."""
        names = ("metric", "accuracy", "n", "correct", "ci_low", "ci_high", "seconds")
        passes = {f"pass@{k}": value for k, value in self.pass_at_k.items()}
        told = {name: number for name in ("cut", "unfinished") if (number := getattr(self, name))}
        return {name: getattr(self, name) for name in names} | passes | told

    def write_results(self, path: str | os.PathLike[str]) -> None:
        """One JSON line an example; the file is whole or absent."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(map(_line, self.results))


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    results: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Runs every example through the model, without few-shot examples; greedily, unless `sampling` says otherwise.

    Args:
        batch_size: prompts generated at once (of the longest; more of shorter ones), or examples whose choices are
            scored together, so many sequences at once.
        results: a file that each example's result is appended to when it is there, in the order of the work. What it
            holds from an evaluation that was stopped is not made again. Give the same options: it cannot tell.
        progress: whether to show a progress bar.

    Raises:
        DataError: no examples, a batch size below 1, an example that the task cannot judge, or data without a scorer;
            several samples of a choice.
        FileError: `results` holds other examples' results.
    """
    task.check_scored()
    check_batches(examples, batch_size)

    def answers(done: Collection[int]) -> Iterator[list[Answer]]:
        return answer_batches(
            model, tokenizer, examples, max_new_tokens=task.max_new_tokens, stop=task.stop,
            batch_size=batch_size, sampling=sampling, done=done, progress=progress,
        )  # fmt: skip

    if task.kind != "choice":
        return evaluate_answers(task, examples, answers, samples=sampling.samples, results=results)
    if not sampling.is_greedy:
        raise DataError(f"{task.name} ranks choices, and nothing is drawn: leave samples and temperature out.")

    def scored(done: Collection[int]) -> Iterator[list[Result]]:
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
        groups = [sorted(group) for group in _groups(order, batch_size)]
        groups = [picked for picked in groups if not set(picked).issubset(done)]
        window = context_length(model.config, tokenizer)
        encoded = {i: _encoded(i, examples[i], tokenizer, window) for picked in groups for i in picked}
        for picked in track(groups, "scoring", progress):
            found = _scores(model, tokenizer, {i: encoded[i] for i in picked}, batch_size)
            yield [_choice_result(task, i, examples[i], values, encoded[i].cut) for i, values in found.items()]

    evaluation = _evaluate(task, examples, scored, results)
    if evaluation.cut:
        _log.warning(
            "%d of %d examples are longer than the model's window of %d tokens: their prompts were cut on the left.",
            evaluation.cut, len(examples), context_length(model.config, tokenizer),
        )  # fmt: skip
    return evaluation


def evaluate_answers(
    task: Task,
    examples: Sequence[Example],
    answers: Callable[[Collection[int]], Iterable[Sequence[Answer]]],
    *,
    samples: int = 1,
    results: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Judges answers as they come; `evaluate_task` for answers of any engine.

    Args:
        answers: given the examples that are done, batches of answers; others than the missing ones are left out.
        samples: answers that each example gets.
        results: as of `evaluate_task`.
    """

    def judged(done: Collection[int]) -> Iterator[list[Result]]:
        waiting: dict[int, dict[int, Answer]] = {}
        for batch in answers(done):
            for answer in batch:
                waiting.setdefault(answer.index, {})[answer.sample] = answer
            whole = sorted(i for i, texts in waiting.items() if len(texts) == samples)
            found = {i: waiting.pop(i) for i in whole}
            texts = {i: [by_sample[sample].text for sample in range(samples)] for i, by_sample in found.items()}
            fresh = {i: t for i, t in texts.items() if i not in done}
            results = results_of(task, examples, fresh, several=samples > 1)
            for result in results:
                if cut := sum(answer.unfinished for answer in found[result["index"]].values()):
                    result["unfinished"] = cut
            yield results

    return _evaluate(task, examples, judged, results)


def results_of(
    task: Task, examples: Sequence[Example], texts: Mapping[int, Sequence[str]], several: bool, progress: bool = False
) -> list[Result]:
    """The judged results of some examples, by their index; with `several` texts each, as lists."""
    pairs = [(examples[i], text) for i, some in texts.items() for text in some]
    verdicts = iter(judge(task, [e for e, _ in pairs], [text for _, text in pairs], progress=progress))
    results = []
    for i, some in texts.items():
        right = [next(verdicts) for _ in some]
        result = _named(i, examples[i])
        if several:
            result |= {"predictions": list(some), "passed": right, "correct": sum(right) / len(right) if right else 0.0}
        else:
            result |= {"prediction": some[0] if some else None, "correct": bool(right and right[0])}
        results.append(result)
    return results


def summarize(task: Task, examples: Sequence[Example], results: list[Result], seconds: float) -> Evaluation:
    """The evaluation that the results of all examples, in order, come to."""
    correct, n = sum(result["correct"] for result in results), len(examples)
    passed = [result["passed"] for result in results if "passed" in result]
    fewest = min((len(right) for right in passed if right), default=0)
    passes = {}
    for k in (k for k in KS if k <= fewest):
        passes[k] = sum(pass_at_k(len(right), sum(right), k) if right else 0.0 for right in passed) / n
    name, (low, high) = task.metric_name(examples), proportion_interval(correct, n)
    return Evaluation(task.name, name, correct / n, n, correct, low, high, results, seconds, passes)


def judge(task: Task, examples: Sequence[Example], texts: Sequence[str], *, progress: bool = False) -> list[bool]:
    """Whether each text answers its example, by the task's scorer; some are judged at once, as far as it allows."""
    assert task.score is not None
    with ThreadPoolExecutor(_JUDGES) as pool:
        return list(track(pool.map(task.score, examples, texts), "judging", progress, len(texts)))


def example_id(example: Example) -> str:
    """A hash of the prompt, by which the results of two runs are paired."""
    return hashlib.sha256(example.prompt.encode()).hexdigest()[:16]


def _evaluate(
    task: Task, examples: Sequence[Example], work: Callable[[Collection[int]], Iterable[list[Result]]],
    path: str | os.PathLike[str] | None,
) -> Evaluation:  # fmt: skip
    """The results of `work` on what is not done, and of what is; each is in the file as soon as it is there."""
    started = time.perf_counter()
    results = {} if path is None else _kept(Path(path), examples)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if path is None else append_to(path) as file:
        if len(results) < len(examples):
            for batch in work(frozenset(results)):
                fresh = [result for result in batch if result["index"] not in results]
                results |= {result["index"]: result for result in fresh}
                if file is not None and fresh:
                    file.write("".join(_line(result) for result in fresh))
                    file.flush()
    seconds = time.perf_counter() - started
    return summarize(task, examples, [results[i] for i in range(len(examples))], seconds)


def _kept(path: Path, examples: Sequence[Example]) -> dict[int, Result]:
    """The results that a file holds, by index. A last line that a kill cut short is cut off."""
    if not path.is_file():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    rows = {row["index"]: row for row in read_results(path, "index", "id")}
    for index, row in rows.items():
        if index not in range(len(examples)) or row["id"] != example_id(examples[index]):
            raise FileError(
                f"{path} holds results of other examples (index {index}): give another folder, or delete it."
            )
    return rows


def _line(result: Result) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"


def _named(index: int, example: Example) -> Result:
    named = {"task_id": example.meta["task_id"]} if "task_id" in example.meta else {}
    return {"index": index, "id": example_id(example), **named}


def _choice_result(task: Task, index: int, example: Example, values: Sequence[float], cut: int) -> Result:
    """Choices are ranked by their likelihood: acc by the whole, acc_norm over the choice's length in characters."""
    scores = list(values)
    if task.metric == "acc_norm":
        scores = [value / len(choice) for value, choice in zip(values, example.choices, strict=True)]
    best = max(range(len(scores)), key=scores.__getitem__)  # a tie goes to the lower index
    result = {**_named(index, example), "prediction": best, "correct": best == example.label, "scores": scores}
    return {**result, "cut": cut} if cut else result


@dataclass(frozen=True)
class _Encoded:
    """An example's choices, each after the prompt."""

    choices: list[tuple[torch.Tensor, int]]
    """token ids, and how many of them are the prompt's"""
    cut: int
    """tokens of the longest one that do not fit into the window"""


def _encoded(index: int, example: Example, tokenizer: Any, window: int | None) -> _Encoded:
    """DataError: an empty choice or prompt, or a choice that alone is longer than the window."""
    prompt, choices, longest = encode_prompt(example, tokenizer), [], 0
    for j, choice in enumerate(example.choices):
        completion = encode_completion(example, f" {choice}", prompt, tokenizer)
        if not choice or not completion or not prompt:
            raise DataError(f"Example {index}: choice {j} or its prompt is empty, so it has no likelihood.")
        if window is not None and len(completion) > window:
            raise DataError(
                f"Example {index}: choice {j} has {len(completion)} tokens, and the model's window is {window}: "
                "leave the example out."
            )
        # As lm-eval cuts: the window holds what is read, and the last token is only predicted.
        cut = max(0, len(prompt + completion) - window - 1) if window is not None else 0
        longest = max(longest, cut)
        choices.append((torch.tensor((prompt + completion)[cut:]), len(prompt) - cut))
    return _Encoded(choices, longest)


def _scores(model: Any, tokenizer: Any, encoded: Mapping[int, _Encoded], batch_size: int) -> dict[int, list[float]]:
    """By example, the log-likelihood of each choice after the prompt (nats)."""
    # (example, choice, token ids, number of prompt tokens)
    rows = [(i, j, *choice) for i, one in encoded.items() for j, choice in enumerate(one.choices)]
    scores = {i: [0.0] * len(one.choices) for i, one in encoded.items()}
    rows.sort(key=lambda row: (-len(row[2]), -row[3]))
    with inference(model):
        for picked in _groups(rows, batch_size):
            ids = [tokens[:-1] for _, _, tokens, _ in picked]
            labels = [tokens.index_fill(0, torch.arange(start), IGNORE) for _, _, tokens, start in picked]
            batch = {
                "input_ids": pad(ids, tokenizer.pad_token_id),
                "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
                "labels": pad(labels, IGNORE),
            }
            for (i, j, *_), value in zip(picked, _log_likelihood(model, batch).tolist(), strict=True):
                scores[i][j] = value
    return scores


def response_loss(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    progress: bool = False,
    most_tokens: int = MOST_TOKENS,
    share_out: bool = False,
    rows: list[RowLoss] | None = None,
) -> float:
    """Mean negative log-likelihood (nats) over all response tokens of a tokenized data set, each once.

    batch_size, most_tokens: of a batch, as `tasks.tokens.batches` takes them.

    rows: gets what each row of `dataset` came to, in its order.

    share_out: for several processes, all of which call this with the same data: each takes its share, and gets the
    mean of all.
    """
    found: list[tuple[int, float, list[RowLoss]]] = []  # batch, its loss, its rows
    all_batches = batches(dataset, tokenizer, batch_size, most_tokens)
    turns = shared_out(all_batches) if share_out else ((batch, True) for batch in all_batches)
    many = num_processes() if share_out else 1
    places = batch_places(dataset, batch_size, most_tokens)
    with inference(model):
        for turn, (batch, is_mine) in enumerate(track(turns, "loss", progress, -(-len(places) // many))):
            each = _row_losses(model, batch)
            if is_mine:
                loss = torch.tensor([row.loss for row in each], dtype=torch.float64).sum().item()
                found.append((turn * many + rank(), loss, each))
    if share_out:
        found = sorted(part for some in all_objects(found) for part in some)
    total, num_tokens = sum(loss for _, loss, _ in found), sum(row.tokens for *_, each in found for row in each)
    if not num_tokens:
        raise DataError("The data has no response tokens, so it has no loss; check its completions.")
    if rows is not None:
        read = [row for *_, each in found for row in each]
        by_place = dict(zip((place for batch in places for place in batch), read, strict=True))
        rows.extend(by_place[place] for place in range(len(read)))
    return total / num_tokens


def _row_losses(model: Any, batch: dict[str, torch.Tensor]) -> list[RowLoss]:
    values, is_right, found = _by_token(model, batch)
    columns = ((-values.sum(1)).tolist(), found.sum(1).tolist(), is_right.sum(1).tolist())
    return [RowLoss(*row) for row in zip(*columns, strict=True)]


def write_losses(
    folder: str | os.PathLike[str], examples: Sequence[Example], dataset: Dataset, rows: Sequence[RowLoss]
) -> str:
    """Writes losses.jsonl, a line a row of a tokenized data set, to pair runs by; returns its name."""
    path = Path(folder) / "losses.jsonl"
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for place, row in zip(dataset["index"][:], rows, strict=True):
            line = {"index": place, "id": example_id(examples[place])}
            line |= {"loss": row.loss, "tokens": row.tokens, "right": row.right}
            file.write(json.dumps(line) + "\n")
    return path.name


def response_scores(
    model: Any, tokenizer: Any, dataset: Dataset, *, batch_size: int = 32, progress: bool = False,
    rows: list[RowLoss] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Of the response tokens of a tokenized data set: `loss` (nats a token), `perplexity`, `token_accuracy` (the share
    that the model ranks first, the tokens before being the data's own), each with its 95% interval over examples
    (`loss_ci`, …), and `tokens`."""
    rows = [] if rows is None else rows
    response_loss(model, tokenizer, dataset, batch_size=batch_size, progress=progress, rows=rows)
    losses, counts, right = zip(*rows, strict=True)
    tokens = sum(counts)
    loss, (low, high) = sum(losses) / tokens, ratio_interval(losses, counts)
    found_ci = [None if math.isnan(end) else end for end in (low, high)]
    right_ci = [None if math.isnan(end) else min(max(end, 0.0), 1.0) for end in ratio_interval(right, counts)]
    return {
        "loss": loss, "loss_ci": found_ci, "perplexity": _perplexity(loss),
        "perplexity_ci": [None if end is None else _perplexity(end) for end in found_ci],
        "token_accuracy": sum(right) / tokens, "token_accuracy_ci": right_ci, "tokens": tokens,
    }  # fmt: skip


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # float64 ends there


def _log_likelihood(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the labelled tokens' log-probabilities, float64 `[B]`."""
    return _by_token(model, batch)[0].sum(1)


def _by_token(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each position where some row has a label next, `[B, positions]` on the CPU: the labels' log-probabilities
    (float64, 0 where there is none), whether the label is the likeliest token, and whether there is one.

    The LM head runs only there, a chunk at a time where all logits are too many.
    """
    batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    positions = (labels != IGNORE).any(0).nonzero()[:, 0]
    labels = labels[:, positions]
    if (head := head_for_chunks(model, labels, batch["input_ids"][0].tolist())) is None:
        given, logits_of = logits_at(model, batch, positions).logits, lambda logits: logits
    else:
        given, logits_of = hidden_at(model, batch, positions, head)[1], head
    labels = labels.to(given.device)
    found = labels != IGNORE
    parts, is_label = [], []
    rows = max(1, LOGITS // model.config.get_text_config().vocab_size)
    for some, target in zip(given[found].split(rows), labels[found].split(rows), strict=True):
        logits = logits_of(some)
        parts.append(-torch.nn.functional.cross_entropy(logits.float(), target, reduction="none"))
        is_label.append(logits.argmax(-1) == target)
    # Summed on the CPU: not every device has float64.
    values, is_right = torch.zeros(labels.shape, dtype=torch.float64), torch.zeros(labels.shape, dtype=torch.bool)
    found = found.cpu()
    if parts:
        values[found], is_right[found] = torch.cat(parts).cpu().double(), torch.cat(is_label).cpu()
    return values, is_right, found


def _groups(order: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (order[start : start + size] for start in range(0, len(order), size))
