"""A routing profile of data: how much of it is read, and where the profile came from."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from datasets import Dataset

from ..base.processes import check_alike, is_main
from ..hf.moe_layers import fingerprint
from ..routing.agreement import disagreements
from ..routing.profile import RoutingProfile
from ..routing.profiler import profile_routing
from ..routing.rules import READS
from ..routing.selection import Selection
from ..routing.until import asked, is_settled, profile_until, told_stability
from ..tasks import Example
from ..tasks.chat import template_source
from ..tasks.data import data_hash
from ..tasks.tokens import batch_places, batches, tokenize
from .options import RunOptions

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_MIN_PROFILED = 64  # examples, where there are so many: a tenth of a small set is too few to rank experts by


@dataclass(frozen=True)
class Watching:
    """How much of the data is profiled, and what of it is kept."""

    until: float = 1.0
    """`profile_until`; 1: all is read"""
    selection: Selection | None = None
    """whose experts are to be settled by then; the hot 25% where it is None"""
    saliency: bool = False
    seed: int = 0
    """of the order in which examples are drawn: one for all runs, so that those of other seeds profile the same"""

    @classmethod
    def of(cls, options: RunOptions) -> "Watching":
        """As a run's options have it."""
        selection = options.selection()
        by_saliency = selection.signal == "saliency" and "signal" in READS.get(selection.rule, ())
        return cls(options.until, selection, by_saliency)

    @property
    def tells_signals(self) -> bool:
        """Whether it is of use to hear that signals disagree: the rule reads one, and it is the default's."""
        chosen = self.selection or Selection()
        return chosen.signal == Selection.signal and "signal" in READS.get(chosen.rule, ())

    def asked(self) -> dict[str, Any]:
        """What the source of a profile holds of it."""
        return {} if self.until == 1 else {"until": asked(self.until, self.selection, self.seed)}

    def is_held_by(self, routing: RoutingProfile) -> bool:
        """Whether a profile that was made before is of this kind."""
        is_same = routing.source.get("until") == self.asked().get("until")
        return is_same and (routing.saliency is not None or not self.saliency)

    def profile(
        self, model: Any, dataset: Dataset, tokenizer: Any, batch_size: int, *, progress: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> RoutingProfile:  # fmt: skip
        """Of the rows of `dataset`, by all processes together."""
        shared: dict[str, Any] = {
            "saliency": self.saliency, "progress": progress, "source": source, "share_out": True,
        }  # fmt: skip
        if self.until == 1:
            total = len(batch_places(dataset, batch_size))
            return profile_routing(model, batches(dataset, tokenizer, batch_size), total=total, **shared)
        return profile_until(
            model, lambda places: batches(dataset.select(places), tokenizer, batch_size), len(dataset),
            until=self.until, selection=self.selection, seed=self.seed, **shared,
        )  # fmt: skip


def profile_data(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    data: str,
    model_name: str,
    *,
    batch_size: int = 16,
    max_length: int = 512,
    dataset: Dataset | None = None,
    watching: Watching | None = None,
    more: str = "",
    progress: bool = False,
) -> RoutingProfile:
    """The model's routing on prompts and responses, with where it came from in `source`. Several processes share it.

    dataset: what `tokenize` has made of the examples already.
    watching: how many of them are read, and what of them is kept; all, without saliency, where it is None.
    more: what gives more examples than these, where there are more: a warning names it where these are too few.
    """
    watching = watching or Watching()
    dataset = tokenize(examples, tokenizer, max_length) if dataset is None else dataset
    source = profile_source(model, tokenizer, examples, data, model_name, max_length, watching)
    check_alike({"data_hash": source["data_hash"], "fingerprint": source["fingerprint"]})
    found = watching.profile(model, dataset, tokenizer, batch_size, progress=progress, source=source)
    if is_main() and (said := told_stability(found)) is not None:
        if more and not is_settled(found):
            _log.warning("%s: %s to read more.", said, more)
        elif progress:
            print(f"{said}.", file=sys.stderr)
    if is_main() and progress and watching.tells_signals:
        for told in disagreements(found):
            if told.matters:
                print(f"{told}.", file=sys.stderr)
    return found


def profile_source(
    model: Any, tokenizer: Any, examples: Sequence[Example], data: str, model_name: str, max_length: int,
    watching: Watching,
) -> dict[str, Any]:  # fmt: skip
    """What is known before the model is run; of how many examples are read, only where it is all."""
    return {
        "fingerprint": fingerprint(model), "model": model_name, "data": data,
        "data_hash": data_hash(examples), **({"examples": len(examples)} if watching.until == 1 else {}),
        "max_length": max_length, **template_source(tokenizer, examples), **watching.asked(),
    }  # fmt: skip


def profile_sample(examples: Sequence[_T], fraction: float) -> list[_T]:
    """What the router is profiled on."""
    num = min(len(examples), max(_MIN_PROFILED, round(fraction * len(examples))))
    stride = len(examples) / num  # spread over the data, which may be sorted
    return [examples[int(i * stride)] for i in range(num)]
