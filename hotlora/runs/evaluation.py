"""Runs that score: a model with or without an adapter, lm-eval's harness, answers made elsewhere."""

import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from ..adapter.formats.export import not_applied
from ..adapter.load import CONFIG_FILE, WEIGHTS_FILE, base_quantization, load_adapter, planned_experts, saved_config
from ..adapter.quantize import ExpertsQuantization, experts_in
from ..adapter.stored import quantized_parameters
from ..base.errors import DataError, FileError, HotLoraError
from ..base.files import sha256_file, write_json
from ..base.quiet import quiet
from ..base.records import Record, new_record, read_record
from ..evaluation.generate import GREEDY, Answer, Sampling
from ..evaluation.generations import read_generations, score_generations
from ..evaluation.harness import evaluate_by_lm_eval, lm_eval_version, read_hashes
from ..evaluation.rouge import rouge_each, rouge_l, rouge_scorer
from ..evaluation.score import (
    Evaluation,
    RowLoss,
    evaluate_answers,
    evaluate_task,
    response_loss,
    response_scores,
    write_losses,
)
from ..evaluation.vllm_engine import check_vllm, length_needed, load_engine, vllm_answers
from ..hf.models import checked_device, context_length, load_config, load_tokenizer, model_source, structure
from ..hf.moe_layers import attention_modules, fingerprint
from ..hf.stopping import saved_stop_tokens
from ..hf.weights import model_hash
from ..tasks import Example, Task, task_of
from ..tasks.chat import template_source
from ..tasks.data import data_hash, load_examples, scorer_hash, trained_parts
from ..tasks.own import own_task
from ..tasks.split import drawn, held_out
from ..tasks.tokens import tokenize
from .checks import check_adapters, check_sizes
from .export import export_saved
from .folder import (
    check_has_no_perft,
    finished,
    hashes_underneath,
    load_base,
    recorded,
    save_evaluation,
    underneath,
)
from .load import find
from .options import EvalOptions

_log = logging.getLogger(__name__)
_LONG = 1 << 20  # tokens, where no window is known
ENGINES = ("transformers", "vllm")


def run_evaluation(
    options: EvalOptions,
    data: str,
    output: str | Path | None = None,
    *,
    sampling: Sampling = GREEDY,
    engine: str = "transformers",
    rouge: bool = False,
    progress: bool = False,
) -> tuple[Record, Evaluation | None]:
    """Scores a model, or a model with a saved adapter, on a task's test split, or on people's own rows: those by exact
    match of the greedy answer, and by loss, perplexity and token accuracy; rows of text alone by these three.

    An evaluation that was stopped goes on: each example's result is in `output` as soon as it is there.

    Args:
        data: a task, or a task and its files (`gsm8k:DIR`); or rows of your own, as `load_examples` takes them.
        output: gets run.json and results-TASK.jsonl; None keeps nothing.
        sampling: how answers are drawn, and how many each example gets.
        engine: "transformers" or "vllm".
        rouge: of own rows ROUGE-L, too.

    Returns:
        the record, and the evaluation; None in its place where `output` held the same one, done, and of texts.

    Raises:
        DataError: a row has no answer, so nothing says what a right one is.
        HotLoraError: `output` holds other work, or options that do not go together.
    """
    task = task_of(data)
    if task is not None:
        task.check_scored()
    if rouge:
        if task is not None or sampling.samples != 1:
            raise HotLoraError("ROUGE-L is of one answer to each of your own rows: leave --rouge out.")
        rouge_scorer()  # before anything takes long
    options = _in_own_dtype(options, output) if engine == "transformers" else options
    scored = _Scored(options, engine, task)
    tokenizer = load_tokenizer(options.model)
    reading: dict[str, Any] = {"tokenizer": tokenizer, "tell_unread": False, **options.reading()}
    is_own = task is None
    if task is not None:
        if options.test_split is not None:
            raise DataError(f"{task.name} holds out rows of its own: leave test_split out.")
        test = load_examples(data, "test", limit=options.limit, **reading)
    else:
        test = load_examples(data, "test" if options.test_split is None else "train", **reading)
        _tell_trained(options, data, test)
        test = test if options.test_split is None else held_out(test, options.test_split)[1]
        test = drawn(test, options.limit)
    task = own_task(data, test, tokenizer) if task is None else task
    if options.max_new_tokens is not None:
        check_sizes(max_new_tokens=options.max_new_tokens)
        if task.kind != "generate":
            raise HotLoraError(f"nothing is answered on {task.name}: leave max_new_tokens (--max-new-tokens) out.")
        task = replace(task, max_new_tokens=options.max_new_tokens)
    is_text, written = task.kind == "text", template_source(tokenizer, test)
    if is_text:
        _check_texts(task, rouge, sampling, engine)
    elif is_own and options.adapter is not None:
        _tell_template(options, bool(written))
    identity = {
        "model": options.model, "data": data, "test_hash": data_hash(test), **scored.identity(),
        "eval_batch_size": options.batch_size, **({"chat_template": None} if is_own else {}),
        **written,
    }  # fmt: skip
    # Only where they say something, so that records made before there were such options still match.
    identity |= {} if sampling.is_greedy else {"sampling": asdict(sampling)}
    identity |= {"scorer_hash": judged} if (judged := scorer_hash(task, test)) else {}
    identity |= {"merge": True} if options.merge else {}
    identity |= {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens is not None else {}
    parts = trained_parts(options.train_on, test) if is_own else None
    identity |= {"train_on": parts} if parts else {}
    identity |= {"keep_hot": True} if scored.keep else {}
    identity |= {"rouge": True} if rouge else {}
    identity |= {"engine": engine} if engine != "transformers" else {}
    folder = None if output is None else Path(output)
    identity = _as_noted(identity, folder)
    results = None if folder is None else folder / f"results-{task.name}.jsonl"
    found: dict[str, Any] = {}
    if folder is not None and (done := finished(folder, identity, results)) is not None:
        return done, None
    record = scored.record(identity, {"name": data, "hash": identity["test_hash"], "train": 0, "test": len(test)})
    with recorded(record, folder):
        started = time.perf_counter()
        if engine == "vllm":
            evaluation = _by_vllm(options, tokenizer, task, test, sampling, results, progress)
        else:
            model = scored.load(record)
            if is_own:
                window = context_length(model.config, tokenizer) or _LONG
                rows = tokenize(test, tokenizer, window, window=window)
                each: list[RowLoss] = []
                found = response_scores(
                    model, tokenizer, rows, batch_size=options.batch_size, progress=progress, rows=each
                )
                found |= {"losses": write_losses(folder, test, rows, each)} if folder is not None else {}
            if is_text:
                seconds = round(time.perf_counter() - started, 3)
                record["evaluation"] = {task.name: _of_texts(found, len(test), seconds) | found}
                return record, None
            evaluation = evaluate_task(
                model, tokenizer, task, test,
                batch_size=options.batch_size, sampling=sampling, results=results, progress=progress,
            )  # fmt: skip
        if rouge:
            answers = [result["prediction"] for result in evaluation.results]
            each_rouge = rouge_each(answers, [example.completion for example in test])
            for result, value in zip(evaluation.results, each_rouge, strict=True):
                result["rouge_l"] = value  # to pair runs by
            found |= rouge_l(each_rouge)
        record["evaluation"] = save_evaluation(evaluation, folder)
        record["evaluation"][task.name] |= found
        if evaluation.unfinished:
            record["evaluation"][task.name]["max_new_tokens"] = task.max_new_tokens
    return record, evaluation


def _as_noted(identity: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """As the folder's record has it, where that is older: without the chat template, or with greedy answers' seed."""
    if folder is None or not (folder / "run.json").is_file():
        return identity
    old = read_record(folder)["config"]
    if "sampling" not in identity and (old.get("sampling") or {}).get("temperature") == 0:
        identity = identity | {"sampling": old["sampling"]}
    return {name: value for name, value in identity.items() if name != "chat_template" or name in old}


def _tell_trained(options: EvalOptions, data: str, rows: Sequence[Example]) -> None:
    """Warns where the run that made the adapter, or the model, was trained on rows that are scored here."""
    made = Path(options.adapter or options.model)
    if made.name not in ("adapter", "model") or not (made.parent / "run.json").is_file():
        return
    with suppress(FileError, DataError):  # another program's file; rows of which nothing would be held out
        config = read_record(made.parent)["config"]
        then = config.get("test_split")
        if then is None or (options.test_split or 1) > then:
            if data_hash(rows if then is None else held_out(rows, then)[0]) == config.get("data_hash"):
                held = f": --test-split {then:g} scores those that it held out" if then is not None else ""
                _log.warning("%s was trained on rows of %s%s", made.parent, data, held)


def _in_own_dtype(options: EvalOptions, output: str | Path | None) -> EvalOptions:
    """With the dtype that the adapter's run was trained in, where none is given, as `load` has it on a GPU. (A whole
    model that was trained is stored in it.) An evaluation goes on in what it was begun in; an older one in auto."""
    if options.dtype != "auto" or options.adapter is None:
        return options
    trained = find(str(options.adapter), options.model).dtype
    if output is not None and (Path(output) / "run.json").is_file():
        begun = read_record(output)["config"].get("dtype")
        return replace(options, dtype=begun) if begun in ("auto", trained) else options
    # On a CPU half precision is slower, and float32 no worse.
    return options if checked_device(options.device).type == "cpu" else replace(options, dtype=trained)


def _tell_template(options: EvalOptions, by_template: bool) -> None:
    """Warns where the adapter's run read its rows otherwise: its prompts are not those that are answered here."""
    was = find(str(options.adapter), options.model).is_chat
    if was is not None and was != by_template:
        ways = ("as plain text", "by the chat template")
        _log.warning(
            "the adapter was trained on rows written %s, and these are written %s: the other way is %s",
            ways[was], ways[by_template], "--apply-chat-template" if was else "--no-chat-template",
        )  # fmt: skip


def _check_texts(task: Task, rouge: bool, sampling: Sampling, engine: str) -> None:
    if rouge:
        raise HotLoraError(f"ROUGE-L is of answers, and {task.name} has texts alone: leave --rouge out.")
    if not sampling.is_greedy or engine != "transformers":
        raise HotLoraError(
            f"{task.name} has texts alone, to which nothing is answered: leave --engine and the options of sampling "
            "out."
        )


def _of_texts(found: Mapping[str, Any], n: int, seconds: float) -> dict[str, Any]:
    """An evaluation's numbers of texts, which are scored by their tokens."""
    share, (low, high) = found["token_accuracy"], found["token_accuracy_ci"]
    return {
        "metric": "token_accuracy", "accuracy": share, "n": n, "correct": share * n, "ci_low": low, "ci_high": high,
        "seconds": seconds,
    }  # fmt: skip


def run_held_out(
    options: EvalOptions, data: str, output: str | Path, *, max_length: int = 512, split: float | None = None,
    limit: int | None = None,
) -> Record:  # fmt: skip
    """The held-out loss of a model, or of a model with a saved adapter, on data that names no task: what stands for a
    score there. In the record it is where a training has its own, `training` / `test_loss`.

    max_length: tokens at which an example is cut. split, limit: of training data, the rows that
    `test_split` and `limit` of a training hold out.

    Raises:
        HotLoraError: `output` holds other work, or options that do not go together.
    """
    check_sizes(max_length=max_length)
    options = _in_own_dtype(options, output)
    scored = _Scored(options)
    tokenizer = load_tokenizer(options.model)
    reading: dict[str, Any] = {"tokenizer": tokenizer, "tell_unread": False, **options.reading()}
    if split is None:
        test = load_examples(data, "test", limit=options.limit, **reading)
    else:
        examples = load_examples(data, "train", limit=limit, **reading)
        test = drawn(held_out(examples, split)[1], options.limit)
    identity = {
        "model": options.model, "test_data": data, "test_hash": data_hash(test), "max_length": max_length,
        "chat_template": None, **template_source(tokenizer, test), **scored.identity(), "keep_hot": scored.keep,
        "eval_batch_size": options.batch_size, "train_on": trained_parts(options.train_on, test),
    }  # fmt: skip
    identity = _as_noted(identity, Path(output))
    if (done := finished(Path(output), identity)) is not None:
        return done
    record = scored.record(identity, {"name": data, "hash": identity["test_hash"], "train": 0, "test": len(test)})
    with recorded(record, Path(output)):
        model = scored.load(record)
        dataset = tokenize(test, tokenizer, max_length)
        each: list[RowLoss] = []
        loss = response_loss(model, tokenizer, dataset, batch_size=options.batch_size, rows=each)
        record["training"] = {"test_loss": loss, "losses": write_losses(output, test, dataset, each)}
    return record


def run_harness(
    options: EvalOptions,
    tasks: Sequence[str],
    output: str | Path | None = None,
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
) -> Record:
    """Scores a model, or a model with a saved adapter, on tasks of lm-eval: its prompts, metrics and filters.

    Args:
        options: `limit` takes the first examples here, as lm-eval does.
        tasks: lm-eval's names; `gsm8k:DIR` and `hellaswag:DIR` read local files.
        output: gets run.json, results-TASK.jsonl of each task and results-lm-eval.json, what lm-eval itself reports.
        include_path: a folder with task configs of your own, as lm-eval's `--include_path`.
        num_fewshot: examples in the prompt; None: the task's own number.

    Raises:
        HotLoraError: lm-eval is not installed, `output` holds other work, lm-eval has no such task, or a file is not
            there.
    """
    version = lm_eval_version()
    check_sizes(limit=options.limit)
    options = _in_own_dtype(options, output)
    scored = _Scored(options)
    tokenizer = load_tokenizer(options.model)
    identity = {
        "model": options.model, "harness": f"lm-eval {version}", "tasks": list(tasks), "num_fewshot": num_fewshot,
        "limit": options.limit, "include_path": str(include_path) if include_path else None, "merge": options.merge,
        **read_hashes(tasks, include_path), **scored.identity(),
    }  # fmt: skip
    identity |= {"keep_hot": True} if scored.keep else {}
    folder = Path(output) if output else None
    if folder is not None and (done := finished(folder, identity)) is not None:
        return done
    record = scored.record(identity, {"name": ",".join(tasks), "train": 0})
    with recorded(record, folder):
        report, evaluations = evaluate_by_lm_eval(
            scored.load(record), tokenizer, tasks,
            include_path=include_path, num_fewshot=num_fewshot, limit=options.limit, batch_size=options.batch_size,
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
    options |= {"scorer_hash": judged} if (judged := scorer_hash(task, test)) else {}
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


class _Scored:
    """What is scored: the model, with its adapter and what lies under that. Checks first, loads when asked."""

    def __init__(self, options: EvalOptions, engine: str = "transformers", task: Task | None = None) -> None:
        self.options = options
        self.stored = _quantization(options)
        self.keep = bool(self.stored and self.stored.keep)
        self.on_top_of = underneath(options.model, options.on_top_of, options.adapter)
        self._check_engine(engine, task)
        check_sizes(batch_size=options.batch_size)
        adapters = (*self.on_top_of, *([options.adapter] if options.adapter else []))
        names = ("dtype", "device", "attn_implementation")
        check_adapters(options.model, adapters, **{name: getattr(options, name) for name in names})

    def identity(self) -> dict[str, Any]:
        """What must be equal for an evaluation to go on, beside its data."""
        adapter = self.options.adapter
        return {
            "dtype": self.options.dtype, "quantize": self.stored.bits if self.stored else None,
            **({"quantize_linear": self.stored.linear} if self.stored and self.stored.linear else {}),
            "adapter": str(adapter) if adapter else None,
            "adapter_hash": sha256_file(Path(adapter) / WEIGHTS_FILE) if adapter else None,
            **({"adapter_config_hash": sha256_file(Path(adapter) / CONFIG_FILE)} if adapter else {}),
            **hashes_underneath(self.on_top_of),
            **({"attn_implementation": attention} if (attention := self.options.attn_implementation) else {}),
            **({"model_hash": found} if (found := model_hash(self.options.model)) else {}),
        }  # fmt: skip

    def record(self, identity: dict[str, Any], data: dict[str, Any]) -> Record:
        condition = "adapter" if self.options.adapter else "base"
        model = {"name": self.options.model, "fingerprint": ""}
        return new_record(
            name=condition, condition=condition, device=self.options.device, config=identity, model=model, data=data
        )

    def load(self, record: Record) -> Any:
        """The model with its adapter, or with the adapter folded into it; the record says what it is."""
        options, loading = self.options, {**self.options.loading(), "on_top_of": self.on_top_of}
        loading |= {"quantize": 0 if options.quantize == 0 or options.merge else None, "quantize_linear": None}
        if stored := self.stored:
            loading |= {"quantize": stored.bits, "keep": stored.keep, "quantize_linear": stored.linear}
        net = load_base(options.model, adapter=options.adapter, **loading)
        num_parameters = net.num_parameters() + quantized_parameters(net)
        record["model"] |= {"fingerprint": fingerprint(net), "num_parameters": num_parameters}
        record["parameters"] = {"trainable": 0, "total": num_parameters, "percent": 0.0}
        if options.adapter is None:
            return net
        record["parameters"]["adapter_bytes"] = (Path(options.adapter) / WEIGHTS_FILE).stat().st_size
        with quiet():
            net = load_adapter(net, options.adapter)
            return cast(Any, net).merge_and_unload() if options.merge else net

    def _check_engine(self, engine: str, task: Task | None) -> None:
        merge, stored = self.options.merge, self.stored
        if engine not in ENGINES:
            raise HotLoraError(f"engine {engine!r} does not exist: choose one of {', '.join(ENGINES)}.")
        if merge and self.options.adapter is None:
            raise HotLoraError("there is no adapter to merge: give one (--adapter), or leave merge out.")
        if merge and self.options.adapter is not None:
            check_has_no_perft([self.options.adapter])
        if stored and (merge or self.on_top_of):
            raise HotLoraError(
                f"an adapter cannot be merged into {stored}, whether asked for or as the adapter was trained on: leave "
                "merge and on_top_of out, or give quantize 0 (--quantize 0) for the experts of the checkpoint"
                + (", and quantize_linear 0 (--quantize-linear 0)." if stored.linear else ".")
            )
        if engine != "vllm":
            return
        unread = ("device", "attn_implementation", "offload", "offload_folder", "batch_size")
        if given := self.options.changed(unread):
            raise HotLoraError(f"the engine vllm decides by itself on {', '.join(given)}: leave them out.")
        if task is not None and task.kind == "choice":
            raise HotLoraError(f"{task.name} ranks choices, which the engine vllm is not used for: leave --engine out.")
        if self.on_top_of:
            raise HotLoraError(
                "the engine vllm takes no on_top_of here, whether asked for or as the adapter was trained: merge those "
                "adapters first (hotlora merge) and give the merged model, or leave the engine out."
            )
        if stored:
            raise HotLoraError(
                f"the engine vllm has no {stored}, whether asked for or as the adapter was trained on: leave the "
                "engine out, or give quantize 0 (--quantize 0) for the experts of the checkpoint"
                + (", and quantize_linear 0 (--quantize-linear 0)." if stored.linear else ".")
            )
        check_vllm()


def _quantization(options: EvalOptions) -> ExpertsQuantization | None:
    """How the base's experts are to be stored; None: as the checkpoint has them."""
    adapter, quantize, linear = options.adapter, options.quantize, options.quantize_linear
    if options.keep_hot and not (quantize and adapter):
        raise HotLoraError("keep_hot is for the experts of an adapter on a quantized model: give adapter and quantize.")
    own = base_quantization(adapter) if adapter and None in (quantize, linear) else None
    keep: Any = planned_experts(adapter) if adapter and options.keep_hot else None
    if quantize is None and own:
        quantize, keep = own.bits, own.keep
    if linear is None and own:
        linear = own.linear
    return experts_in(quantize, keep, linear)


def _by_vllm(
    options: EvalOptions, tokenizer: Any, task: Task, test: Sequence[Example], sampling: Sampling,
    results: Path | None, progress: bool,
) -> Evaluation:  # fmt: skip
    """Exports the adapter for vLLM, for as long as this takes, and lets vLLM answer."""
    with tempfile.TemporaryDirectory() as temporary:
        model, merge = options.model, options.merge
        base, lora, out = model_source(model), None, Path(temporary) / "export"
        if options.adapter is not None:
            config = saved_config(options.adapter)
            format = "merged" if merge else "vllm"
            router = not merge and config.train_router
            trained = attention_modules(structure(model)) if config.train_attention else []
            attention = bool(not_applied(trained, format))
            export_saved(
                model, options.adapter, out,
                format=format, merge_router=router, merge_attention=attention, device="cpu",
            )  # fmt: skip
            base = str(out) if merge else str(out / "base") if router or attention else base
            lora = None if merge else out / "adapter" if router or attention else out
        ends = saved_stop_tokens(options.adapter) if options.adapter is not None else []
        needed = length_needed(load_config(model), tokenizer, test, task.max_new_tokens)
        loaded, request = load_engine(base, lora, dtype=options.dtype, max_model_len=needed)

        def answers(done: Collection[int]) -> Iterator[list[Answer]]:
            return vllm_answers(
                loaded, request, tokenizer, test,
                max_new_tokens=task.max_new_tokens, stop=task.stop, sampling=sampling, ends=ends, done=done,
                progress=progress,
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
