"""Answers to prompts: greedy or sampled, in batches of similar length, with a KV cache.

What a prompt is answered does not depend on what was answered before: batches are the same for the same examples and
options, and every sample draws from a seed of its own. So an evaluation that was stopped comes to the same end when it
is run again.
"""

import hashlib
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper, TopPLogitsWarper

from ..adapter.mergeable import MergeableLayer
from ..base.errors import DataError, HotLoraError
from ..base.processes import device_of
from ..hf.forward import inference, padding_matters
from ..hf.models import context_length
from ..hf.peft_hooks import dora_norms_kept
from ..hf.stopping import stop_tokens
from ..tasks import Example
from ..tasks.ends import turn_ends
from ..tasks.tokens import encode_prompt, pad

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily, one each, unless said otherwise.

    Attributes:
        samples: answers to each prompt, for pass@k.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: the share of the probability that is drawn from, the likeliest tokens first.
        seed: of the draws; sample i of a prompt is the same whatever else is answered.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_right, told in (
            ("samples", self.samples >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more, and finite"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not is_right:
                raise HotLoraError(f"{name} = {getattr(self, name)} is out of range: it must be {told}.")
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise HotLoraError(
                "Greedy answers to a prompt are all the same: give a temperature above 0 (--temperature 0.2), or leave "
                "samples and top_p out."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: then the seed says nothing."""
        return self.temperature == 0

    def seed_of(self, example: Example, sample: int) -> int:
        """A seed by the prompt and the sample's number, below 2^63."""
        text = f"{self.seed}/{sample}/{example.prompt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """One text: the example's index, the sample's number from 0, what the model wrote, and whether that was cut at the
    longest that an answer may be."""

    index: int
    sample: int
    text: str
    unfinished: bool = False


def answer_batches(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    done: Collection[int] = (),
    progress: bool = False,
) -> Iterator[list[Answer]]:
    """Answers as they come, a batch at a time: each up to the end-of-text token or the first of `stop`.

    Prompts of similar length go together, padded on the left, the longest first: what does not fit in memory fails at
    once. A batch has as many tokens as `batch_size` of the longest prompts with their answers, so batches of shorter
    prompts have more rows. Where a probe shows that padding changes answers, prompts of one length alone go together.

    Args:
        done: indices of examples that need no answer. A batch is left out where it has no other: the rest is made in
            the same batches as without `done`, so that its numbers are the same to the last bit.

    Raises:
        DataError: no examples, or a batch size below 1.
    """
    check_batches(examples, batch_size)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    window = context_length(model.config, tokenizer)
    if window is not None and (long := sum(len(prompt) > window for prompt in prompts)):
        _log.warning("%d of %d prompts are longer than the model's window of %d tokens.", long, len(prompts), window)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = [(i, sample) for i in order for sample in range(sampling.samples)]
    groups = list(_by_tokens(rows, [len(prompt) + max_new_tokens for prompt in prompts], batch_size))
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) > 1 and max(map(len, groups)) > 1 and _answers_change_with_padding(model, prompts, max_new_tokens):
        _log.info("this model's answers depend on padding: prompts of one length go together, and no others")
        groups = [list(same) for group in groups for _, same in groupby(group, key=lambda row: len(prompts[row[0]]))]
    ends = end_ids(model, tokenizer, chat=any(example.text is not None for example in examples))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id or 0
    )
    missing = set(range(len(examples))).difference(done)
    for group in track(groups, "generating", progress):
        if not any(i in missing for i, _ in group):
            continue
        ids = [torch.tensor(prompts[i]) for i, _ in group]
        width = max(len(row) for row in ids)
        drawing: list[LogitsProcessor] = []
        if sampling.temperature > 0:
            seeds = [sampling.seed_of(examples[i], sample) for i, sample in group]
            drawing = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
            drawing.append(_Draw(seeds, width, max_new_tokens))
        with generation(model):
            output = model.generate(
                input_ids=pad(ids, tokenizer.pad_token_id, "left").to(device_of(model)),
                attention_mask=pad([torch.ones_like(row) for row in ids], 0, "left").to(device_of(model)),
                generation_config=config,
                logits_processor=drawing,
                stopping_criteria=[_StopTexts(tokenizer, stop, width)] if stop else None,
            )
        answers, made = output[:, width:].tolist(), []
        decoded = written(tokenizer, [prompts[i] for i, _ in group], answers)
        for (i, sample), text, ids in zip(group, decoded, answers, strict=True):
            found = cut(text, stop)
            unfinished = len(ids) >= max_new_tokens and found == text and not set(ends).intersection(ids)
            made.append(Answer(i, sample, found, unfinished))
        yield made


def written(tokenizer: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[str]:
    """What the answers' tokens add to the prompts' text.

    Tokenizers of Llama's kind drop the first space of a text: decoded alone, an answer loses one of its indentation.
    """
    heads = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    wholes = tokenizer.batch_decode([p + a for p, a in zip(prompts, answers, strict=True)], skip_special_tokens=True)
    alone = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        whole[len(head) :] if whole.startswith(head) else text  # not where a prompt ends amid a character
        for whole, head, text in zip(wholes, heads, alone, strict=True)
    ]


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of `stop`."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def end_ids(model: Any, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """The tokenizer's end-of-text token and those of the generation config; to prompts that the chat template wrote
    (`chat`) also what ends an answer by it."""
    ends = (tokenizer.eos_token_id, *stop_tokens(model), *(turn_ends(tokenizer) if chat else ()))
    return sorted({i for i in ends if i is not None})


@contextmanager
def generation(model: Any) -> Iterator[None]:
    """What tokens are generated in: the model as it is, whose DoRA norms are thus worked out once and not for each."""
    with inference(model), _without_generation_config(model), dora_norms_kept():
        try:
            yield
        finally:
            for module in model.modules():
                if isinstance(module, MergeableLayer | DoraLinearLayer):
                    module.train().eval()  # which forgets the norms: the weights may change from here on


@contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """Without what the checkpoint's generation_config.json says, which `generate` takes wherever it is told nothing."""
    owners = [m for m in model.modules() if isinstance(vars(m).get("generation_config"), GenerationConfig)]
    own = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in zip(owners, own, strict=True):
            module.generation_config = config


def track(items: Iterable, description: str, progress: bool, total: int | None = None) -> Iterable:
    """The items, with a progress bar on standard error if asked for."""
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        return items
    return bar(items, description, total=total, transient=True, console=console)


def check_batches(examples: Sequence[Example], batch_size: int) -> None:
    """DataError: no examples, or a batch size below 1."""
    if not examples:
        raise DataError("There are no examples to evaluate; give at least one.")
    if batch_size < 1:
        raise DataError(f"A batch size of {batch_size} is out of range; give at least 1.")


def _answers_change_with_padding(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> bool:
    """By a text as long as the longest prompt and its answer, of the prompts' tokens shuffled."""
    pool = torch.tensor([token for prompt in prompts for token in prompt])
    length = max(map(len, prompts)) + max_new_tokens
    picked = torch.randint(len(pool), (length,), generator=torch.Generator().manual_seed(0))
    return padding_matters(model, pool[picked].tolist())


def _by_tokens(
    rows: Sequence[tuple[int, int]], lengths: Sequence[int], batch_size: int
) -> Iterator[Sequence[tuple[int, int]]]:
    """Rows in batches of at most as many tokens as the first `batch_size` have; the longest come first."""
    budget = batch_size * lengths[rows[0][0]]
    start = 0
    while start < len(rows):
        size = budget // lengths[rows[start][0]]
        yield rows[start : start + size]
        start += size


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


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by the row's own random numbers: the inverse of the cumulative probability.

    transformers' own sampling draws a whole batch from one generator, so a row would depend on its neighbours.
    """

    def __init__(self, seeds: Sequence[int], prompt_width: int, max_new_tokens: int) -> None:
        draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.uniform = torch.stack(draws)  # [B, max_new_tokens]
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        # In float64, where there is one: a GPU's sums differ in their last bits from time to time.
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative = scores.to(dtype).softmax(-1).cumsum(-1)  # [B, V]
        # Scaled by the sum as it came out, and below it: the draw is never past the last token of any probability.
        total = cumulative[:, -1:]
        at = self.uniform[:, step, None].to(total) * total
        at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulative, at, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
