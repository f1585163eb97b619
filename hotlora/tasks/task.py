"""What a task is: examples from local files or the hub, and how an answer is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..base.errors import DataError

Kind = Literal["generate", "choice", "text"]
TRAINED = {"assistant": "every answer", "last": "the last answer", "all": "prompts and answers"}
"""What may carry loss (`train_on`), in words."""


@dataclass(frozen=True)
class Example:
    """One prompt and the text that should follow it.

    Attributes:
        prompt: what the model reads; carries no training loss.
        completion: what the model should write, with the space that joins it to the prompt.
        choices: the possible continuations of a multiple-choice row, each without its joining space.
        label: index of the right choice.
        meta: what the scorer needs besides (the gold query, the database's folder).
        text: of a conversation, all that its chat template writes, special tokens included. It is trained on as it is,
            and need not begin with `prompt`, which is what the template gives a model to answer.
        spans: the parts of `text` that carry training loss, as (start, end) in characters; where there is no `text`,
            those of `prompt` that do, beside the completion.
        place: the file and line that it was read from, for errors.
        format: what its row was read as, and how it is written, for people to read.
        source_hash: SHA-256 of what a conversation was read from: `text` may hold the date.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    place: str = field(default="", compare=False)
    format: str = field(default="", compare=False)
    source_hash: str | None = None


def _meta(example: Example) -> dict[str, Any]:
    return example.meta


@dataclass(frozen=True)
class Task:
    """A benchmark: where its rows come from and how an answer is judged; or data without a judge.

    Attributes:
        name: as users type it.
        kind: "generate" (greedy text, judged by `score`), "choice" (log-likelihood of each choice), or "text"
            (no scorer: data to profile a router and to train on, of which the response loss can be taken).
        metric: "exact_match", "execution_accuracy", "acc" (the likeliest choice), "acc_norm" (the likeliest
            per character), "refusal_rate" (the share declined, by keywords), or "loss" for kind "text".
        read: `(split, source, limit, seed)` to examples, as `load` has them.
        score: whether a generated text answers the example; None for the other kinds.
        max_new_tokens: longest answer, in tokens.
        stop: texts that end an answer, for base models that never say the end-of-text token.
        splits: those that it has; not all data has a "test".
        needs_files: nothing of it is on the hub, so a source must be given.
        judged_by: what judges an example's answer beside its completion and choices, as JSON holds it: equal on every
            machine, so without the paths of files and with their hashes.
    """

    name: str
    kind: Kind
    metric: str
    read: Callable[[str, str | None, int | None, int], list[Example]]
    score: Callable[[Example, str], bool] | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "test")
    needs_files: bool = False
    judged_by: Callable[[Example], Any] = _meta

    def load(self, split: str, source: str | None = None, limit: int | None = None, seed: int = 0) -> list[Example]:
        """The examples of a split.

        Args:
            source: a folder, a file or a hub id; None: the task's own.
            limit, seed: a generated task draws so many rows; a published one gives all.

        Raises:
            DataError: no such split, or rows that are not there or not the task's.
        """
        if split not in self.splits:
            raise DataError(f"{self.name} has no split {split!r}; its splits are {', '.join(self.splits)}.")
        return self.read(split, source, limit, seed)

    def check_scored(self) -> None:
        """Raises DataError for data without a scorer, which nothing can be evaluated on."""
        if self.kind == "text":
            raise DataError(
                f"{self.name} has no scorer, so it cannot be evaluated on: it is data to profile the router and "
                "to train on. Its response loss is taken after training."
            )

    def metric_name(self, examples: Sequence[Example]) -> str:
        """The metric as measured: execution accuracy is the test suite's only with several databases each."""
        if self.metric == "execution_accuracy" and min((e.meta["databases"] for e in examples), default=1) > 1:
            return "test_suite_accuracy"
        return self.metric
