"""Runs with options as keywords: what they are not told is as `hotlora train` has it."""

from dataclasses import asdict
from typing import Any

from hotlora.base.records import Record
from hotlora.evaluation.generate import GREEDY, Sampling
from hotlora.evaluation.score import Evaluation
from hotlora.runs import evaluation, stages, training
from hotlora.runs.methods import resolve
from hotlora.runs.options import EvalOptions, RunOptions
from hotlora.training.config import TrainConfig


def run_options(model: Any, data: Any, config: TrainConfig | None = None, **options: Any) -> RunOptions:
    return resolve(**{"model": model, "data": data, **(asdict(config) if config else {}), **options})


def run_training(model: Any, data: Any, output: Any, *, progress: bool = False, **options: Any) -> Record:
    return training.run_training(run_options(model, data, **options), output, progress=progress)


def run_method(model: Any, data: Any, output: Any, **options: Any) -> Record:
    return stages.run_method(run_options(model, data, **options), output)


def run_evaluation(
    model: Any, data: Any, output: Any = None, *, sampling: Sampling = GREEDY, engine: str = "transformers",
    rouge: bool = False, progress: bool = False, **options: Any,
) -> tuple[Record, Evaluation | None]:  # fmt: skip
    scored = EvalOptions(model=model, **options)
    return evaluation.run_evaluation(
        scored, data, output, sampling=sampling, engine=engine, rouge=rouge, progress=progress
    )
