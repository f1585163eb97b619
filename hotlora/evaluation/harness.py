"""EleutherAI's lm-eval on a model in memory: the official prompts, metrics and filters; its data from local files, too.

lm-eval is an extra: ``pip install hotlora[eval]``.
"""

import hashlib
import importlib.metadata
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from ..base.errors import DataError, HotLoraError
from ..base.files import sha256_file, visible_files, write_text
from ..base.precision import say_if_slow
from ..hf.forward import TEXTS, padding_matters
from ..tasks import Example, hellaswag
from ..tasks.rows import Row, need_text, read_rows, split_file
from .score import Evaluation, example_id
from .stats import proportion_interval

LOCAL = ("gsm8k", "hellaswag")
"""Tasks whose rows may come from local files."""


def lm_eval_version() -> str:
    """The installed lm-eval's version; HotLoraError where there is none."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise HotLoraError(f"lm-eval cannot be used ({error}): pip install hotlora[eval].") from error
    return importlib.metadata.version("lm_eval")


def evaluate_by_lm_eval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> tuple[dict[str, Any], list[Evaluation]]:
    """lm-eval's report, and what it says of each task in hotlora's form.

    Args:
        model: as it is in memory, with an adapter on it or not; or an `lm_eval.api.model.LM`.
        batch_size: prompts at once; 1 where padding changes the model's answers.
        tasks: names of tasks, groups or tags; `gsm8k:DIR` and `hellaswag:DIR` read local files.
        include_path: a folder with task configs of your own.
        num_fewshot: examples in the prompt; None: as the task has it.
        limit: at most so many examples of a task, the first ones.

    Returns:
        the report without its samples; and an evaluation of each task that scores examples from 0 to 1, by acc_norm
        where there is one, else by the first metric and filter (gsm8k: strict-match). Its results are the samples.

    Raises:
        HotLoraError: lm-eval is not installed.
        DataError: no such task, or local files that are not there.
    """
    lm_eval_version()
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not isinstance(model, LM):
        say_if_slow(model.device, model.dtype)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, _calm():
        names = [_named(task, Path(temporary)) for task in tasks]
        paths = [str(path) for path in (include_path, temporary) if path is not None]
        # Reading all of lm-eval's configs takes many seconds, and those of local files name what they need.
        manager = TaskManager(include_path=paths, include_defaults=not all(":" in task for task in tasks))
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise DataError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists its tasks.")
        if isinstance(model, LM):
            lm = model
        else:
            if padding_matters(model, tokenizer(" ".join(TEXTS))["input_ids"]):
                batch_size = 1  # lm-eval pads on the left, and groups prompts of all lengths
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        report = simple_evaluate(
            model=lm, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=True
        )
        assert report is not None, "only other ranks than the first have no report"
    seconds = time.perf_counter() - started
    samples = report.pop("samples")
    evaluations = [_evaluation(name, some, seconds) for name, some in samples.items()]
    return json.loads(json.dumps(report, default=str)), [found for found in evaluations if found is not None]


def write_local_task(name: str, source: str | Path, folder: Path) -> Path:
    """A config of lm-eval's task `name` that reads local files, in `folder`, with those files' rows beside it.

    It takes over everything else from lm-eval's own config.

    Raises:
        DataError: another task than `LOCAL`, or files that are not there or not whole.
    """
    import lm_eval

    parts, files = _local_rows(name, source), {}
    for split, rows in parts.items():
        files[split] = str(folder / f"{name}-{split}.jsonl")
        write_text(files[split], "".join(json.dumps(row) + "\n" for row in rows))
    own = Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml"
    config: dict[str, Any] = {
        "include": str(own), "task": name, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }  # fmt: skip
    if "train" not in files:
        config["training_split"] = None  # few-shot examples then come from the rows that are not asked
    path = folder / f"{name}.yaml"
    write_text(path, json.dumps(config))  # YAML holds all of JSON
    return path


_CONFIGS = (".yaml", ".yml", ".py")
_ROWS = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow"),
    *(".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip"),
)
_TEXTS = re.compile(rb"\.txt\b|\btext\b")
"""how a config or code says that a .txt holds rows: by its name, or as what `datasets` reads (`dataset_path: text`)"""


def read_hashes(tasks: Sequence[str], include_path: str | Path | None = None) -> dict[str, Any]:
    """Of what `evaluate_by_lm_eval` reads from files of one's own: `tasks_hash`, a SHA-256 of each task's local rows,
    None of others; and `include_hash`, of configs, code and files of rows in `include_path`, but for what runs wrote
    there, and hidden ones. Neither where nothing is read. Files are read whole, a second for each GB: a row that was
    edited may be anywhere, and as long as it was.

    DataError: local files that are not there, or an `include_path` that is no folder.
    """
    found: dict[str, Any] = {}
    named = [task.partition(":") for task in tasks]
    if any(source for _, _, source in named):
        found["tasks_hash"] = [_rows_hash(name, source) if source else None for name, _, source in named]
    if include_path is None:
        return found
    folder, digest = Path(include_path).expanduser(), hashlib.sha256()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the one that holds your tasks' configs (--include-path).")
    files = visible_files(folder)
    written = {file.parent for file in files if file.name == "run.json"} - {folder}
    configs = b"".join(file.read_bytes() for file in files if file.suffix in _CONFIGS)
    read = (*_CONFIGS, *_ROWS, *([".txt"] if _TEXTS.search(configs) else []))  # else they are notes
    for file in files:
        is_result = file.parent == folder and (file.name == "run.json" or file.name.startswith("results-"))
        if file.suffix in read and not is_result and written.isdisjoint(file.parents):
            digest.update(f"{file.relative_to(folder).as_posix()} {sha256_file(file)}\n".encode())
    return found | {"include_hash": digest.hexdigest()}


def _rows_hash(name: str, source: str) -> str:
    return hashlib.sha256(json.dumps(_local_rows(name, source)).encode()).hexdigest()


def _local_rows(name: str, source: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The rows that lm-eval's task `name` is to read, by split. DataError: as `write_local_task`."""
    if name not in LOCAL:
        raise DataError(
            f"{name} cannot be read from {source} for lm-eval; {' and '.join(LOCAL)} can. Others read the hub, or "
            "configs of your own (--include-path)."
        )
    source = Path(source).expanduser()
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; lm-eval's {name} needs the folder with its published files.")
    return {"gsm8k": _gsm8k_rows, "hellaswag": _hellaswag_rows}[name](source)


def _named(task: str, folder: Path) -> str:
    """The task's name in lm-eval; where it names local files, a config is written to `folder`."""
    name, _, source = task.partition(":")
    if source:
        write_local_task(name, source, folder)
    return name


def _gsm8k_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    parts = {}
    names = ("question", "answer")
    for split in ("train", "test"):  # few-shot examples come from train
        rows = read_rows(split_file(folder, [f"{split}.jsonl", f"{split}.jsonl.gz"]))
        parts[split] = [dict(zip(names, need_text(row, *names), strict=True)) for row in rows]
    return parts


def _hellaswag_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    parts = {}
    for split, names in (("train", hellaswag.FILES["train"]), ("validation", hellaswag.FILES["test"])):
        if split == "train" and not any((folder / name).is_file() for name in names):
            continue
        parts[split] = [_hellaswag_row(row) for row in read_rows(split_file(folder, names))]
    return parts


def _hellaswag_row(row: Row) -> dict[str, Any]:
    """The four fields that lm-eval's task reads. A context that is joined already is taken apart at its label."""
    found = hellaswag.example(row)  # checks the row
    if "query" in row.values:
        label, _, context = row.values["query"].partition(": ")
        parts = {"activity_label": label, "ctx_a": context, "ctx_b": ""}
    else:
        parts = {name: row.values[name] for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**parts, "endings": row.values["endings"], "label": str(found.label)}


def _evaluation(task: str, samples: Sequence[dict[str, Any]], seconds: float) -> Evaluation | None:
    """lm-eval's samples of a task as an evaluation; None where no metric of an example is a number from 0 to 1."""
    first = samples[0]
    metrics = sorted(first["metrics"], key=lambda name: name != "acc_norm")  # stable: else the first
    for metric in metrics:
        values = [sample[metric] for sample in samples if metric in sample]
        if all(isinstance(value, Real) and 0 <= float(value) <= 1 for value in values):
            break
    else:
        return None
    results = []
    some = sorted((s for s in samples if s["filter"] == first["filter"]), key=lambda s: s["doc_id"])
    for sample in some:
        correct, text = float(sample[metric]), sample["resps"][0][0]
        # The text, or what the task's filter left of the choices' likelihoods.
        prediction = text if isinstance(text, str) else sample["filtered_resps"]
        results.append({
            "index": sample["doc_id"], "id": example_id(Example(sample["arguments"][0][0], "")),
            "prediction": prediction, "correct": bool(correct) if correct in (0, 1) else correct,
        })  # fmt: skip
    correct, n = sum(result["correct"] for result in results), len(results)
    low, high = proportion_interval(correct, n)
    return Evaluation(task, metric, correct / n, n, correct, low, high, results, seconds)


@contextmanager
def _calm() -> Iterator[None]:
    """Without lm-eval's remarks on every setting; its warnings of a model in memory are not for the user."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
