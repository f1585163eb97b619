"""What a task is: examples from local files or the hub, and how an answer is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["generate", "choice"]


@dataclass(frozen=True)
class Example:
    """One prompt and the text that should follow it.

    Attributes:
        prompt: what the model reads; carries no training loss.
        completion: what the model should write, with the space that joins it to the prompt.
        choices: the possible continuations of a multiple-choice row, each without its joining space.
        label: index of the right choice.
        meta: what the scorer needs besides (the gold query, the database's folder); `chat` marks a prompt
            made by a chat template, which brings its own special tokens.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A benchmark: where its rows come from and how an answer is judged.

    Attributes:
        name: as users type it.
        kind: "generate" (greedy text, judged by `score`) or "choice" (log-likelihood of each choice).
        metric: "exact_match", "execution_accuracy" or "acc_norm".
        load: `(split, source, limit, seed)` to examples. `source` is a folder, a file or a hub id; None is
        the
            task's own. A generated task draws `limit` rows by `seed`; a published one gives all its rows.
        score: whether a generated text answers the example; None for kind "choice".
        max_new_tokens: longest answer, in tokens.
        stop: texts that end an answer, for base models that never say the end-of-text token.
    """

    name: str
    kind: Kind
    metric: str
    load: Callable[[str, str | None, int | None, int], list[Example]]
    score: Callable[[Example, str], bool] | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def metric_name(self, examples: Sequence[Example]) -> str:
        """The metric as measured: execution accuracy is the test suite's only with several databases each."""
        if self.metric == "execution_accuracy" and min((e.meta["databases"] for e in examples), default=1) > 1:
            return "test_suite_accuracy"
        return self.metric
