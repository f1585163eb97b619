"""ROUGE-L of answers to people's own rows, by the package rouge-score, an extra: ``pip install hotlora[rouge]``."""

import re
from collections.abc import Sequence
from typing import Any

from ..base.errors import HotLoraError
from .stats import mean_interval

_WORD = re.compile(r"[^\W_]+")


class _Words:
    """As rouge-score for ASCII. It drops every other letter: a Chinese text would score 0 against itself."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def rouge_scorer() -> Any:
    """rouge-score's scorer of ROUGE-L, without stemming; HotLoraError where the package is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise HotLoraError(
            f"ROUGE-L needs rouge-score ({error}): pip install 'hotlora[rouge]', or leave --rouge out."
        ) from error
    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_each(answers: Sequence[str], responses: Sequence[str]) -> list[float]:
    """ROUGE-L's F (0 to 1) of each answer against its row's response. HotLoraError: as `rouge_scorer`."""
    scorer = rouge_scorer()
    return [scorer.score(target, text)["rougeL"].fmeasure for target, text in zip(responses, answers, strict=True)]


def rouge_l(found: Sequence[float]) -> dict[str, Any]:
    """`rouge_l`, the mean over examples, and `rouge_l_ci`, its 95% interval over examples, of nulls for a single
    one."""
    ends = [min(max(end, 0.0), 1.0) for end in mean_interval(found)] if len(found) > 1 else [None, None]
    return {"rouge_l": sum(found) / len(found), "rouge_l_ci": ends}
