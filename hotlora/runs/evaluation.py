"""Runs that score: a model with or without an adapter, lm-eval's harness, answers made elsewhere."""

import dataclasses
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ..adapter.formats.export import not_applied
from ..adapter.load import WEIGHTS_FILE, base_quantization, load_adapter, planned_experts, saved_config
from ..adapter.quantize import ExpertsQuantization, experts_in, quantized_parameters
from ..base.errors import DataError, HotLoraError
from ..base.files import sha256_file, write_json
from ..base.quiet import quiet
from ..base.records import Record, new_record
from ..evaluate.generate import GREEDY, Answer, Sampling
from ..evaluate.generations import read_generations, score_generations
from ..evaluate.harness import evaluate_by_lm_eval, lm_eval_version
from ..evaluate.score import Evaluation, evaluate_answers, evaluate_task, response_loss
from ..evaluate.vllm_engine import check_vllm, load_engine, vllm_answers
from ..hf.models import attention_modules, fingerprint, load_tokenizer, model_source, structure
from ..tasks import Example, Task
from ..tasks.data import data_hash, load_examples, task_of, tokenize
from .checks import check_adapters, check_sizes
from .export import export_saved
from .folder import finished, load_base, recorded, save_evaluation, underneath

ENGINES = ("transformers", "vllm")


def run_evaluation(
    model: str,
    data: str,
    output: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    on_top_of: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    merge: bool = False,
    engine: str = "transformers",
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    keep_hot: bool = False,
    progress: bool = False,
) -> tuple[Record, Evaluation | None]:
    """Scores a model, or a model with a saved adapter, on a task's test split.

    An evaluation that was stopped goes on: each example's result is in `output` as soon as it is there.

    Args:
        data: a task, or a task and its files (`gsm8k:DIR`).
        output: gets run.json and results-TASK.jsonl; None keeps nothing.
        on_top_of: saved adapters that are merged into the model, in this order, under `adapter`; those that it was
            trained on top of are merged by themselves.
        limit: at most so many examples, the same ones every time.
        sampling: how answers are drawn, and how many each example gets.
        merge: whether to fold the adapter into the weights first, in memory: faster, and rounded to their dtype.
        engine: "transformers" or "vllm".
        quantize: bits in which the routed experts are stored, 8 or 4, or 0 for the checkpoint's own; None: all as the
            adapter was trained on them.
        keep_hot: the experts of the adapter are not quantized; with `quantize`.

    Returns:
        the record, and the evaluation; None in its place where `output` held the same one, done.

    Raises:
        DataError: `data` names no task, so nothing says what a right answer is.
        HotLoraError: `output` holds other work, or options that do not go together.
    """
    task = _need_task(data)
    stored = _quantization(adapter, quantize, keep_hot)
    on_top_of = underneath(model, on_top_of, adapter)
    _check_engine(engine, task, merge=merge, adapter=adapter, on_top_of=on_top_of, stored=stored)
    check_sizes(batch_size=batch_size)
    check_adapters(model, (*on_top_of, *([adapter] if adapter else [])), dtype=dtype, device=device)
    tokenizer = load_tokenizer(model)
    test = load_examples(data, "test", limit=limit, tokenizer=tokenizer)
    weights = Path(adapter) / WEIGHTS_FILE if adapter else None
    options: dict[str, Any] = {
        "model": model, "data": data, "test_hash": data_hash(test), "dtype": dtype,
        "quantize": stored.bits if stored else None, "adapter": str(adapter) if adapter else None,
        "adapter_hash": sha256_file(weights) if weights else None,
        "on_top_of": [sha256_file(Path(folder) / WEIGHTS_FILE) for folder in on_top_of],
        "eval_batch_size": batch_size,
    }  # fmt: skip
    # Only where they say something, so that records made before there were such options still match.
    options |= {"sampling": dataclasses.asdict(sampling)} if sampling != GREEDY else {}
    options |= {"merge": True} if merge else {}
    options |= {"keep_hot": True} if stored and stored.keep else {}
    options |= {"engine": engine} if engine != "transformers" else {}
    results = None if output is None else Path(output) / f"results-{task.name}.jsonl"
    if output is not None and (done := finished(Path(output), options, results)) is not None:
        return done, None
    condition = "adapter" if adapter else "base"
    record = new_record(
        name=condition, condition=condition, config=options, model={"name": model, "fingerprint": ""},
        data={"name": data, "hash": options["test_hash"], "train": 0, "test": len(test)},
    )  # fmt: skip
    with recorded(record, Path(output) if output else None):
        if engine == "vllm":
            evaluation = _by_vllm(model, adapter, tokenizer, task, test, sampling, merge, dtype, results, progress)
        else:
            net = _adapted(record, model, adapter, on_top_of, merge, stored, dtype=dtype, device=device)
            evaluation = evaluate_task(
                net, tokenizer, task, test,
                batch_size=batch_size, sampling=sampling, results=results, progress=progress,
            )  # fmt: skip
        record["evaluation"] = save_evaluation(evaluation, Path(output) if output else None)
    return record, evaluation


def run_held_out(
    model: str,
    data: str,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    on_top_of: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int = 64,
    max_length: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    keep_hot: bool = False,
) -> Record:
    """The held-out loss of a model, or of a model with a saved adapter, on data that names no task: what stands for a
    score there. In the record it is where a training has its own, `training` / `test_loss`.

    Args: as of `run_evaluation`; max_length: tokens at which an example is cut.

    Raises:
        HotLoraError: `output` holds other work, or options that do not go together.
    """
    stored = _quantization(adapter, quantize, keep_hot)
    check_sizes(batch_size=batch_size, max_length=max_length)
    check_adapters(model, (*on_top_of, *([adapter] if adapter else [])), dtype=dtype, device=device)
    tokenizer = load_tokenizer(model)
    test = load_examples(data, "test", limit=limit, tokenizer=tokenizer)
    weights = Path(adapter) / WEIGHTS_FILE if adapter else None
    options = {
        "model": model, "test_data": data, "test_hash": data_hash(test), "dtype": dtype, "max_length": max_length,
        "quantize": stored.bits if stored else None, "adapter": str(adapter) if adapter else None,
        "adapter_hash": sha256_file(weights) if weights else None, "keep_hot": bool(stored and stored.keep),
        "on_top_of": [sha256_file(Path(folder) / WEIGHTS_FILE) for folder in on_top_of],
        "eval_batch_size": batch_size,
    }  # fmt: skip
    if (done := finished(Path(output), options)) is not None:
        return done
    condition = "adapter" if adapter else "base"
    record = new_record(
        name=condition, condition=condition, config=options, model={"name": model, "fingerprint": ""},
        data={"name": data, "hash": options["test_hash"], "train": 0, "test": len(test)},
    )  # fmt: skip
    with recorded(record, Path(output)):
        net = _adapted(record, model, adapter, on_top_of, False, stored, dtype=dtype, device=device)
        dataset = tokenize(test, tokenizer, max_length)
        record["training"] = {"test_loss": response_loss(net, tokenizer, dataset, batch_size=batch_size)}
    return record


def run_harness(
    model: str,
    tasks: Sequence[str],
    output: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    on_top_of: Sequence[str | Path] = (),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    merge: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    keep_hot: bool = False,
) -> Record:
    """Scores a model, or a model with a saved adapter, on tasks of lm-eval: its prompts, metrics and filters.

    Args:
        tasks: lm-eval's names; `gsm8k:DIR` and `hellaswag:DIR` read local files.
        output: gets run.json, results-TASK.jsonl of each task and results-lm-eval.json, what lm-eval itself reports.
        include_path: a folder with task configs of your own, as lm-eval's `--include_path`.
        num_fewshot: examples in the prompt; None: the task's own number.
        limit: at most so many examples, the first ones.
        model, adapter, on_top_of, merge, quantize, keep_hot: as `run_evaluation` takes them.

    Raises:
        HotLoraError: lm-eval is not installed, `output` holds other work, or lm-eval has no such task.
    """
    version = lm_eval_version()
    stored = _quantization(adapter, quantize, keep_hot)
    on_top_of = underneath(model, on_top_of, adapter)
    _check_engine("transformers", None, merge=merge, adapter=adapter, on_top_of=on_top_of, stored=stored)
    check_sizes(batch_size=batch_size, limit=limit)
    check_adapters(model, (*on_top_of, *([adapter] if adapter else [])), dtype=dtype, device=device)
    tokenizer = load_tokenizer(model)
    weights = Path(adapter) / WEIGHTS_FILE if adapter else None
    options: dict[str, Any] = {
        "model": model, "harness": f"lm-eval {version}", "tasks": list(tasks), "num_fewshot": num_fewshot,
        "limit": limit, "include_path": str(include_path) if include_path else None, "dtype": dtype,
        "quantize": stored.bits if stored else None, "merge": merge, "adapter": str(adapter) if adapter else None,
        "adapter_hash": sha256_file(weights) if weights else None,
        "on_top_of": [sha256_file(Path(folder) / WEIGHTS_FILE) for folder in on_top_of],
    }  # fmt: skip
    options |= {"keep_hot": True} if stored and stored.keep else {}
    if output is not None and (done := finished(Path(output), options)) is not None:
        return done
    condition = "adapter" if adapter else "base"
    record = new_record(
        name=condition, condition=condition, config=options, model={"name": model, "fingerprint": ""},
        data={"name": ",".join(tasks), "train": 0},
    )  # fmt: skip
    folder = Path(output) if output else None
    with recorded(record, folder):
        net = _adapted(record, model, adapter, on_top_of, merge, stored, dtype=dtype, device=device)
        report, evaluations = evaluate_by_lm_eval(
            net, tokenizer, tasks,
            include_path=include_path, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size,
        )  # fmt: skip
        record["evaluation"] = {}
        for evaluation in evaluations:
            record["evaluation"] |= save_evaluation(evaluation, folder)
        record["data"]["test"] = sum(evaluation.n for evaluation in evaluations)
        record["harness"] = {"name": "lm-eval", "version": version}
        if folder is not None:
            record["harness"]["results"] = "results-lm-eval.json"
            write_json(folder / "results-lm-eval.json", report)
    return record


def run_generations(
    data: str,
    generations: str | Path,
    output: str | Path | None = None,
    *,
    allow_missing: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> tuple[Record, Evaluation | None]:
    """Scores completions that were made elsewhere, on a task's test split; loads no model.

    Args:
        data, output, limit: as `run_evaluation` takes them.
        generations: JSON lines, as `generations.read_generations` reads them.
        allow_missing: whether an example without a completion counts as wrong, and is no error.

    Returns:
        the record, and the evaluation; None in its place where `output` held the same one, done.
    """
    task = _need_task(data)
    test = load_examples(data, "test", limit=limit)
    completions = read_generations(generations, task, test, allow_missing=allow_missing)
    options = {
        "data": data, "test_hash": data_hash(test), "generations": str(generations),
        "generations_hash": sha256_file(Path(generations)), "allow_missing": allow_missing,
    }  # fmt: skip
    if output is not None and (done := finished(Path(output), options)) is not None:
        return done, None
    record = new_record(
        name="generations", condition="generations", config=options, model={"name": "", "fingerprint": ""},
        data={"name": data, "hash": options["test_hash"], "train": 0, "test": len(test)},
    )  # fmt: skip
    with recorded(record, Path(output) if output else None):
        evaluation = score_generations(task, test, completions, progress=progress)
        record["evaluation"] = save_evaluation(evaluation, Path(output) if output else None)
    return record, evaluation


def _quantization(adapter: str | Path | None, quantize: int | None, keep_hot: bool) -> ExpertsQuantization | None:
    """How the base's experts are to be stored; None: as the checkpoint has them."""
    if keep_hot and not (quantize and adapter):
        raise HotLoraError("keep_hot is for the experts of an adapter on a quantized model: give adapter and quantize.")
    if quantize is None:
        return base_quantization(adapter) if adapter else None
    if quantize == 0:
        return None
    return experts_in(quantize, planned_experts(adapter) if adapter and keep_hot else None)


def _check_engine(
    engine: str,
    task: Task | None,
    *,
    merge: bool,
    adapter: str | Path | None,
    on_top_of: Sequence[str | Path],
    stored: ExpertsQuantization | None,
) -> None:
    if engine not in ENGINES:
        raise HotLoraError(f"engine {engine!r} does not exist: choose one of {', '.join(ENGINES)}.")
    if merge and adapter is None:
        raise HotLoraError("there is no adapter to merge: give one (--adapter), or leave merge out.")
    if stored and (merge or on_top_of):
        raise HotLoraError(
            f"an adapter cannot be merged into {stored}, whether asked for or as the adapter was trained on: leave "
            "merge and on_top_of out, or give quantize 0 (--quantize 0) for the experts of the checkpoint."
        )
    if engine == "vllm":
        if task is not None and task.kind == "choice":
            raise HotLoraError(f"{task.name} ranks choices, which the engine vllm is not used for: leave --engine out.")
        if on_top_of:
            raise HotLoraError(
                "the engine vllm takes no on_top_of here, whether asked for or as the adapter was trained: merge those "
                "adapters first (hotlora merge) and give the merged model, or leave the engine out."
            )
        if stored:
            raise HotLoraError(
                f"the engine vllm has no {stored}, whether asked for or as the adapter was trained on: leave the "
                "engine out, or give quantize 0 (--quantize 0) for the experts of the checkpoint."
            )
        check_vllm()


def _adapted(
    record: Record,
    model: str,
    adapter: str | Path | None,
    on_top_of: Sequence[str | Path],
    merge: bool,
    stored: ExpertsQuantization | None,
    **options: Any,
) -> Any:
    """The model with its adapter, or with the adapter folded into it; the record says what it is."""
    options |= {"quantize": stored.bits, "keep": stored.keep} if stored else {}
    net = load_base(model, on_top_of, **options)
    num_parameters = net.num_parameters() + quantized_parameters(net)
    record["model"] |= {"fingerprint": fingerprint(net), "num_parameters": num_parameters}
    record["parameters"] = {"trainable": 0, "total": num_parameters, "percent": 0.0}
    if adapter is None:
        return net
    record["parameters"]["adapter_bytes"] = (Path(adapter) / WEIGHTS_FILE).stat().st_size
    with quiet():
        net = load_adapter(net, adapter)
        return cast(Any, net).merge_and_unload() if merge else net


def _by_vllm(
    model: str,
    adapter: str | Path | None,
    tokenizer: Any,
    task: Task,
    test: Sequence[Example],
    sampling: Sampling,
    merge: bool,
    dtype: str,
    results: Path | None,
    progress: bool,
) -> Evaluation:
    """Exports the adapter for vLLM, for as long as this takes, and lets vLLM answer."""
    with tempfile.TemporaryDirectory() as temporary:
        base, lora, out = model_source(model), None, Path(temporary) / "export"
        if adapter is not None:
            config = saved_config(adapter)
            format = "merged" if merge else "vllm"
            router = not merge and config.train_router
            trained = attention_modules(structure(model)) if config.train_attention else []
            attention = bool(not_applied(trained, format))
            export_saved(
                model, adapter, out, format=format, merge_router=router, merge_attention=attention, device="cpu"
            )
            base = str(out) if merge else str(out / "base") if router or attention else base
            lora = None if merge else out / "adapter" if router or attention else out
        loaded, request = load_engine(base, lora, dtype=dtype)

        def answers(done: Collection[int]) -> Iterator[list[Answer]]:
            return vllm_answers(
                loaded, request, tokenizer, test,
                max_new_tokens=task.max_new_tokens, stop=task.stop, sampling=sampling, done=done, progress=progress,
            )  # fmt: skip

        return evaluate_answers(task, test, answers, samples=sampling.samples, results=results)


def _need_task(data: str) -> Task:
    task = task_of(data)
    if task is None:
        raise DataError(
            f"{data!r} names no task, so nothing says what a right answer is: give a task's name, or a task "
            "and its files, as in gsm8k:DIR."
        )
    task.check_scored()
    return task
