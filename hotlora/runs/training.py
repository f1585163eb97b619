"""A whole run: profile the router on the data, select experts, train an adapter, evaluate, keep a record.

Run again with the same options, it goes on from where it was stopped; once done, it gives back its record.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed

from ..adapter.config import HotLoraConfig
from ..adapter.count import count_parameters
from ..adapter.load import WEIGHTS_FILE
from ..adapter.mask import SparseMask
from ..adapter.offload import keep_on_device
from ..adapter.stored import quantized_parameters
from ..base.errors import DataError, HotLoraError
from ..base.files import atomic_folder, file_in, sha256_file
from ..base.precision import say_once
from ..base.processes import (
    all_objects,
    check_alike,
    gathered,
    is_main,
    is_sharded,
    num_processes,
    own_device,
    rank,
    start,
    wait_for_all,
)
from ..base.quiet import quiet
from ..base.records import SAME_LOSS, Record, new_record, read_record, write_record
from ..evaluation.score import Evaluation, RowLoss, evaluate_task, response_loss, summarize, write_losses
from ..hf.models import context_length, load_config, load_tokenizer, named_base, vocab_size
from ..hf.moe_layers import fingerprint
from ..hf.stopping import add_stop_tokens, save_stop_tokens
from ..hf.weights import file_hashes, folder_hash
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from ..tasks import Example, Task, task_of
from ..tasks.chat import template_source
from ..tasks.data import data_hash, load_examples, scorer_hash, test_source, trained_parts
from ..tasks.ends import told_ends, turn_ends
from ..tasks.split import drawn, held_out
from ..tasks.tokens import MOST_TOKENS, tokenize, told
from ..training.checkpoints import last_complete
from ..training.config import TrainConfig
from ..training.rank_growth import RankGrowth, allocated
from ..training.reprofile import Reprofiling
from ..training.trainer import check_family, train
from .checks import check_made_on, check_run, select
from .folder import (
    data_time,
    finished,
    hashes_underneath,
    is_begun,
    load_base,
    recorded,
    save_evaluation,
    underneath,
)
from .options import RunOptions
from .profiling import Watching, profile_data, profile_sample, profile_source

_log = logging.getLogger(__name__)

_OF_THE_BASE = ("dtype", "quantize", "quantize_linear", "attn_implementation")
_UNSET: dict[str, Any] = {name: getattr(RunOptions, name) for name in _OF_THE_BASE} | {"on_top_of": []}
"""how a profile's base was loaded, where its source does not say"""
_NAMES = ("model", "data", "test_data", "scores")  # of files and folders, which may be others on another machine


def run_training(
    options: RunOptions, output: str | Path, *, progress: bool = False, begin: Callable[[], None] = lambda: None,
    sample: int | None = None,
) -> Record:  # fmt: skip
    """Profile, select, train, evaluate: everything lands in `output`, and its `run.json` tells what happened.

    `output` gets profile.safetensors (unless `options.profile` names one to share), plan.json, checkpoints/,
    metrics.jsonl, adapter/ (or model/, by full fine-tuning), results-TASK.jsonl and run.json. The options of what comes
    before a training in some methods (`warmup`, `keep`, …) are `stages.run_method`'s.

    begin: called before the model is loaded, when options and data have been found right and there is work to do.
    sample: at most so many of the rows that `options.limit` leaves.

    Several processes that torchrun or `accelerate launch` started call this with the same arguments and do it
    together; `processes.sharding` has how the model is spread over them.

    Raises:
        HotLoraError: `output` holds a run with other options (each is named), or an input is wrong: of options that is
            told before anything is written or loaded. What fails later leaves a record with the status "failed" and the
            message.
    """
    start(options.device)
    options = replace(options, on_top_of=underneath(options.model, options.on_top_of))
    if options.full and options.dtype == "auto":
        options = replace(options, dtype="float32")
    output, progress = Path(output), progress and is_main()
    check_run(options)
    run = _Run(options, output, progress, sample)
    if (done := finished(output, run.identity, longer=options if options.extend else None)) is not None:
        return done
    run.read_base_loss()
    wait_for_all()  # until each has seen what was there
    run.tokenize()
    begin()
    if progress:
        print(f"data: {told(run.examples, run.dataset, options.train_on)}", file=sys.stderr)
        if run.ends:
            print(f"data: {told_ends(run.tokenizer, run.ends)}", file=sys.stderr)
    with recorded(run.record, output):
        run.train()
    return run.record


class _Run:
    """One training, from its data to its record."""

    def __init__(self, options: RunOptions, output: Path, progress: bool, sample: int | None) -> None:
        self.options, self.output, self.progress = options, output, progress
        self.tokenizer = load_tokenizer(options.model)
        now = data_time(output)
        read: dict[str, Any] = {"tokenizer": self.tokenizer, "now": now, **options.reading()}
        self.examples = drawn(load_examples(options.data, "train", limit=options.limit, **read), sample)
        source = test_source(options.data, options.test_data)
        self.task = task_of(source) if source is not None else None
        self.test: Sequence[Example] = []
        if source is not None and options.test_split is not None:
            raise DataError(f"{source} holds out rows of its own: leave test_split out.")
        if source is not None:
            if self.task is not None:  # it reads its own rows
                read |= {"columns": None, "apply_chat_template": None}
            self.test = load_examples(source, "test", limit=options.test_limit, **read)
        elif options.test_split is not None:
            self.examples, self.test = held_out(self.examples, options.test_split)
            self.test = drawn(self.test, options.test_limit)
        if options.test_limit is not None and not self.test:
            say_once("test_limit changes nothing: no rows are held out (--test-data, --test-split)")
        if options.eval_steps is not None and not any(example.completion for example in self.test):
            raise DataError("eval_steps takes a held-out loss: give test_data or test_split.")
        self.plan = ExpertPlan.load(options.plan) if options.plan is not None else None
        template = template_source(self.tokenizer, chain(self.examples, self.test))
        self.identity = {
            **options.recorded(), "scores": None if options.scores is None else str(options.scores),
            "data_hash": data_hash(self.examples), "test_data": source, "test_hash": data_hash(self.test),
            "profile_hash": RoutingProfile.load(options.profile).hash if options.profile else None,
            "plan_hash": self.plan.hash if self.plan else None,
            "scores_hash": sha256_file(Path(options.scores)) if options.scores is not None else None,
            "mask_hash": None if options.mask is None else mask_hash(options.mask, output),
            **hashes_underneath(options.on_top_of),
            "train_on": trained_parts(options.train_on, chain(self.examples, self.test)),
            "keep_hot": options.keep_hot or None, "processes": num_processes(), **template,
        }  # fmt: skip
        self.identity |= {"scorer_hash": judged} if (judged := scorer_hash(self.task, self.test)) else {}
        files = file_hashes(options.model)
        # Not the Hub's commit: a change of a README there would end a training for which there is no way back.
        if files and (found := self._hash_of_then(files) or folder_hash(options.model)):
            self.identity["model_hash"] = found
        check_alike({name: value for name, value in self.identity.items() if name not in _NAMES})
        self.condition = options.condition or options.condition_by(self.plan.rule if self.plan else options.rule)
        self.record = new_record(
            name=self.condition, condition=self.condition, seed=options.seed, config=self.identity,
            device=options.device, model={"name": options.model, "fingerprint": "", "files": files},
            data={
                "name": options.data, "hash": self.identity["data_hash"],
                "train": len(self.examples), "test": len(self.test),
            },
        )  # fmt: skip
        self.record["data"] |= {"read_at": now.isoformat()} if template else {}
        # Of the last answers of conversations; the tokenizer's own is in every model's config already.
        self.ends = [i for i in (turn_ends(self.tokenizer) if template else ()) if i != self.tokenizer.eos_token_id]

    def _hash_of_then(self, files: dict[str, str]) -> str | None:
        """The model's hash that the run in `output` was begun with, where all that a training reads is what it was: a
        new generation_config.json, or other weights beside those that are loaded, change nothing of it."""
        if not (self.output / "run.json").is_file():
            return None
        record = read_record(self.output)
        then: dict[str, str] = record["model"].get("files") or {}
        changed = [name for name in sorted(then | files) if then.get(name) != files.get(name)]
        if then and changed and is_begun(self.output):
            told = "%s is not what it was when the run in %s was begun: %s"
            _log.warning(told, self.options.model, self.output, ", ".join(changed))
        return None if changed else record["config"].get("model_hash")

    def read_base_loss(self) -> None:
        """Of a run that goes on, what its base's weights came to: a name on the Hub has no hash here, nor has a run of
        before there was one, and the weights may be others by now."""
        if last_complete(self.output / "checkpoints") is not None and (self.output / "run.json").is_file():
            self.record["model"] |= {"test_loss": read_record(self.output)["model"].get("test_loss")}

    def _check_base(self, loss: float) -> None:
        """HotLoraError: the run was begun on other weights. The record gets the held-out loss before training."""
        model = self.record["model"]
        then = model.get("test_loss")
        if then is not None and not math.isclose(loss, then, rel_tol=SAME_LOSS):
            raise HotLoraError(
                f"the weights of {self.options.model} are not those that the run in {self.output} was begun on: its "
                f"held-out loss before training is {loss:.4f}, and was {then:.4f}. Give the model as it was (--model), "
                "or another --output."
            )
        model["test_loss"] = loss

    def tokenize(self) -> None:
        size, length = vocab_size(self.options.model), self.options.max_length
        window = context_length(load_config(self.options.model), self.tokenizer)
        self.dataset = tokenize(self.examples, self.tokenizer, length, vocab_size=size, window=window)
        # Requests to refuse have no answer that a loss could be taken of.
        some = any(example.completion for example in self.test)
        self.held = tokenize(self.test, self.tokenizer, length, vocab_size=size) if some else None

    def train(self) -> None:
        """From the base model to the scores; `record` gets what comes of it, step by step."""
        options, record = self.options, self.record
        base = self._load(self.plan)
        check_family(base, self.tokenizer, options)
        num_parameters = base.num_parameters() + quantized_parameters(base)
        record["model"] |= {"fingerprint": fingerprint(base), "num_parameters": num_parameters}
        moving: Reprofiling | None = None
        growing: RankGrowth | None = None
        if options.full:
            model = base.requires_grad_(True)
            record["parameters"] = {"trainable": num_parameters, "total": num_parameters, "percent": 100.0}
        else:
            if self.plan is None:
                self.plan = self._select(base)
                if options.keep_hot:
                    del base
                    base = self._load(self.plan)
            model = self._adapt(base, self.plan)
            moving = self._reprofiling(model) if options.reprofile_every is not None else None
            if options.grow_every is not None:
                growing = RankGrowth(model, options.r, options.grow_every, self.output / "ranks.jsonl")
        if is_main():
            write_record(self.output, record)
        scoring: dict[str, Any] = {"batch_size": options.eval_batch_size, "progress": self.progress}
        before = self.held and self._loss_of_held_out(model, progress=self.progress)
        if before:
            self._check_base(before)
            if is_main():
                write_record(self.output, record)
        result = train(
            model, self.tokenizer, self.dataset, options, self.output,
            identity={**self.identity, "plan_hash": self.plan.hash if self.plan else None},
            held_out_loss=partial(self._loss_of_held_out, model) if options.eval_steps is not None else None,
            held_out_score=self._held_out_score(model) if options.eval_steps is not None else None,
            callbacks=[callback for callback in (moving, growing) if callback is not None], progress=self.progress,
        )  # fmt: skip
        if moving is not None:
            moving.finish()
            record["parameters"] |= count_parameters(model)
            record["reprofile"] = moving.drift()
        if growing is not None:
            record["parameters"] |= growing.finish()
            record["ranks"] = growing.events()
        record["training"] = {
            **asdict(result), "metrics": "metrics.jsonl",
            "cut": sum(self.dataset["cut"]), "left_out": len(self.examples) - len(self.dataset),
        }  # fmt: skip
        if options.full:
            _save_model(model, self.tokenizer, self.output / "model")
        else:
            size = _save_adapter(model, self.tokenizer, self.output / "adapter", options.model, self.ends)
            record["parameters"]["adapter_bytes"] = size
        if is_main():
            write_record(self.output, record)

        if self.held is not None:
            each: list[RowLoss] = []
            after = self._loss_of_held_out(model, progress=self.progress, rows=each)
            record["training"] |= {"test_loss_before": before, "test_loss": after}
            if (self.task is None or self.task.kind == "text") and is_main():
                record["training"]["losses"] = write_losses(self.output, self.test, self.held, each)
        if self.task is not None and self.task.kind != "text" and options.evaluate:
            evaluation = _evaluate(model, self.tokenizer, self.task, self.test, **scoring)
            record["evaluation"] = save_evaluation(evaluation, self.output)

    def _loss_of_held_out(self, model: Any, **given: Any) -> float:
        """In batches of no more tokens than a step has, so that it fits where training does."""
        assert self.held is not None
        options = self.options
        return response_loss(
            model, self.tokenizer, self.held, batch_size=options.eval_batch_size, share_out=True,
            most_tokens=min(MOST_TOKENS, options.batch_size * options.max_length), **given,
        )  # fmt: skip

    def _held_out_score(self, model: Any) -> Callable[[], dict[str, float]] | None:
        """Of a task that has a scorer."""
        task, size = self.task, self.options.eval_batch_size
        if task is None or task.kind == "text" or not self.options.evaluate:
            return None

        def score() -> dict[str, float]:
            found = _evaluate(model, self.tokenizer, task, self.test, batch_size=size)
            return {found.metric: found.accuracy}

        return score

    def _load(self, plan: ExpertPlan | None) -> Any:
        keep = plan.experts if plan and self.options.keep_hot else None
        loading = self.options.loading() | ({"quantize": 0} if self.options.full else {})  # all weights train
        base = load_base(self.options.model, keep=keep, **loading)
        add_stop_tokens(base, self.ends)
        return base

    def _select(self, base: Any) -> ExpertPlan:
        """A plan by the options' rule and this model's profile."""
        routing, file = self._profile(base)
        self.record["profile"] = {
            "path": os.path.relpath(file, self.output), "hash": routing.hash, "num_tokens": routing.num_tokens,
            **{name: routing.source[name] for name in ("examples", "stability") if "until" in routing.source},
        }  # fmt: skip
        return select(routing, self.options)

    def _profile(self, base: Any) -> tuple[RoutingProfile, Path]:
        """The profile that is shared, or was made for this run before, or is made now; and its file."""
        options = self.options
        if options.profile is not None:
            file = file_in(options.profile, "profile.safetensors")
            routing = RoutingProfile.load(file)
            check_made_on(routing, fingerprint(base), file, options.model)
            return routing, file
        file = self.output / "profile.safetensors"
        some, watching = profile_sample(self.examples, options.share_profiled), Watching.of(options)
        named: dict[str, Any] = {
            "model": base, "tokenizer": self.tokenizer, "examples": some, "data": options.data,
            "model_name": options.model, "max_length": options.max_length, "watching": watching,
        }  # fmt: skip
        how = {name: getattr(options, name) for name in _OF_THE_BASE} | {"on_top_of": self.identity["on_top_of"]}
        how = {name: value for name, value in how.items() if value != _UNSET[name]}
        if file.is_file():
            routing = RoutingProfile.load(file)
            said = routing.source.get("base")
            # A profile from before this was noted is of this base where the run goes on, whose options were compared.
            goes_on = last_complete(self.output / "checkpoints") is not None
            is_of_base = said == how if said is not None else not how or goes_on
            source = profile_source(**named)
            same = all(routing.source.get(key) == value for key, value in source.items())
            if is_of_base and same and watching.is_held_by(routing):
                return routing, file
        routing = profile_data(
            **named, dataset=self._sample(), progress=self.progress, batch_size=options.batch_size,
            more="give a larger --profile-fraction" if len(some) < len(self.examples) else "",
        )  # fmt: skip
        if how:
            routing.source["base"] = how
        if is_main():
            routing.save(file)
        return routing, file

    def _sample(self) -> Dataset:
        """The rows of the training data that the router is profiled on."""
        places = set(profile_sample(range(len(self.examples)), self.options.share_profiled))
        rows = [row for row, place in enumerate(self.dataset["index"]) if place in places]
        if not rows:
            raise DataError(
                f"Every example to profile on has a prompt of {self.options.max_length} tokens (max_length) or more: "
                "give a larger max_length."
            )
        return self.dataset.select(rows)

    def _adapt(self, base: Any, plan: ExpertPlan) -> Any:
        """The model with a fresh adapter, the same for the same seed; the record and `output` get the plan."""
        check_alike({"plan_hash": plan.hash})
        if is_main():
            plan.save(self.output / "plan.json")
        self.record["plan"] = {"path": "plan.json", "hash": plan.hash, "rule": plan.rule, "params": plan.params}
        self.record["name"] = _describe(self.condition, plan)
        names = {field.name for field in fields(HotLoraConfig)} & {field.name for field in fields(TrainConfig)}
        if self.options.offload == "cold":
            keep_on_device(base, plan.experts)
        given = {name: getattr(self.options, name) for name in names}
        if self.options.grow_every is not None:
            given |= allocated(self.options.r, self.options.lora_alpha)
        config = HotLoraConfig(plan=plan, mask=self.options.mask, **given)
        set_seed(self.options.seed)
        with quiet():
            model: Any = get_peft_model(base, config)
        if is_sharded(base) and (device := own_device()):  # where the base computes, not where its shards may wait
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if "lora_" in name:
                    tensor.data = tensor.data.to(device)
        self.record["parameters"] = count_parameters(model)
        return model

    def _reprofiling(self, model: Any) -> Reprofiling:
        options, sample, watching = self.options, self._sample(), Watching.of(self.options)
        assert options.reprofile_every is not None
        return Reprofiling(
            model,
            profile=lambda: watching.profile(model, sample, self.tokenizer, options.batch_size),
            select=lambda routing: select(routing, options),
            every=options.reprofile_every,
            left=options.reprofile_left,
            seed=options.seed,
            log=self.output / "reprofile.jsonl",
        )


def mask_hash(mask: str | Path, output: Path) -> str:
    """Of its content; where the run in `output` was begun with the hash of this very file, as older ones were, that."""
    found, file = SparseMask.load(mask).hash, sha256_file(file_in(mask, "mask.safetensors"))
    begun = read_record(output)["config"] if (output / "run.json").is_file() else {}
    return file if begun.get("mask_hash") == file else found


def _evaluate(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], **options: Any) -> Evaluation:
    """The task's score; of several processes each does a share. Where the model is spread over them, each does all: a
    text is longer than another, and all processes must go step by step."""
    many = num_processes()
    if many == 1 or is_sharded(model) or len(examples) < many:
        return evaluate_task(model, tokenizer, task, examples, **options)
    part = evaluate_task(model, tokenizer, task, examples[rank() :: many], **options)
    found = all_objects((part.results, part.seconds))
    results = [
        {**result, "index": result["index"] * many + process}
        for process, (some, _) in enumerate(found)
        for result in some
    ]
    results.sort(key=lambda result: result["index"])
    return summarize(task, examples, results, max(seconds for _, seconds in found))


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    if not is_main():
        return
    with atomic_folder(folder) as beside, quiet():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def _save_adapter(model: Any, tokenizer: Any, folder: Path, model_name: str, ends: Sequence[int]) -> int:
    """Saves the adapter, and its tokenizer beside it, and the generation config with the tokens that end an answer,
    where the tokenizer does not tell; returns the size of its weights in bytes."""
    model.peft_config["default"].base_model_name_or_path = named_base(model_name)
    with gathered(parameter for parameter in model.parameters() if parameter.requires_grad):
        if is_main():  # each process has all of the adapter, whatever of the base
            ours = {name: value for name, value in model.state_dict().items() if "lora_" in name}
            with atomic_folder(folder) as beside, quiet():
                # No embedding is trained, and PEFT would ask the hub for the base's vocabulary.
                model.save_pretrained(beside, save_embedding_layers=False, state_dict=ours)
                tokenizer.save_pretrained(beside)
                save_stop_tokens(model.get_base_model(), ends, beside)
                (beside / "README.md").unlink(missing_ok=True)  # PEFT's blank form; `report.card` writes one
    wait_for_all()
    return (folder / WEIGHTS_FILE).stat().st_size


def _describe(condition: str, plan: ExpertPlan) -> str:
    """`hot 12.5%`: the share of all experts that the plan keeps."""
    kept = sum(map(len, plan.experts.values())) / (plan.num_experts * len(plan.experts))
    # Of a share that was given no digit is lost; of a rule's own, with others in each seed, whole percents are enough.
    percent = 100 * kept
    is_given = len(set(map(len, plan.experts.values()))) == 1 and math.isclose(float(f"{percent:g}"), percent)
    return condition if kept == 1 else f"{condition} {percent:g}%" if is_given else f"{condition} {percent:.0f}%"
