"""`hotlora.train`, `profile`, `evaluate`, `export_adapter`: what the commands do. Imports nothing heavy."""

import inspect
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, fields, replace
from functools import cache, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from .base.errors import HotLoraError, ModelError, Stopped
from .base.heap import free
from .base.options import ALIASES, Options, by_own_names, suggest
from .runs.keywords import EvaluateKeywords, ProfileKeywords, TrainKeywords
from .runs.methods import resolve
from .runs.options import EVALUATE_LEAVES, PROFILE_LEAVES, EvalOptions, ProfileOptions, RunOptions

if TYPE_CHECKING:
    from torch import nn

    from .routing.profile import RoutingProfile
    from .runs.load import Run

_log = logging.getLogger(__name__)
_ROWS = "rows in memory"
_F = TypeVar("_F", bound=Callable[..., Any])


def _options_of(options: type[Options], *leave: str, aliases: Mapping[str, str] | None = None) -> Callable[[_F], _F]:
    """For a function whose keywords are the options: it has them in its signature, which `help` and notebooks read,
    and any other is an error that names the nearest. (Type checkers read `runs.keywords`.)

        aliases: other names -> those.
    """
    others = aliases or {}

    def decorate(function: _F) -> _F:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in own} | set(leave)
        made = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(options)
            if f.metadata["cli"] and f.name not in taken and f.default is not MISSING
        ]
        signature = inspect.signature(function).replace(parameters=[*own, *made])
        known = signature.parameters.keys()

        @wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            if unknown := sorted(given.keys() - known - others.keys()):
                told = suggest(unknown, {*known, *others})
                raise HotLoraError(f"hotlora.{function.__name__} has no option {told}.")
            by_own_names(dict(zip(known, args, strict=False)) | given, others)  # also where one is given by its place
            return function(*args, **by_own_names(given, others))

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """Around a function: what it loaded goes. Models have cycles, which Python clears late, and a notebook keeps the
    frames of its last error. On a GPU the next cell's model would find no room, whatever its options."""
    try:
        yield
    except (HotLoraError, KeyboardInterrupt, MemoryError, RuntimeError) as error:  # torch's for memory is of the last
        each: BaseException | None = error
        while each is not None:
            traceback.clear_frames(each.__traceback__)
            each = each.__cause__ or each.__context__
        raise
    finally:
        free()


@_options_of(RunOptions, aliases=ALIASES)
@_memory_given_back()
def train(
    model: str | os.PathLike[str],
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    test_data: Any = None,
    method: str | None = None,
    preset: str | None = None,
    placement: str | None = None,
    preflight: bool = True,
    progress: bool = True,
    **options: Unpack[TrainKeywords],
) -> "Run":
    """Profiles the router, chooses experts, trains their adapter and evaluates it, as `hotlora train` does.

        run = hotlora.train("allenai/OLMoE-1B-7B-0924", "train.jsonl", "runs/mine", epochs=1, test_split=0.05)
        run.model.generate(**run.tokenizer("Question: …", return_tensors="pt"))

    Called again with the same arguments, it goes on from where it was stopped; once done, it gives back what is there.

    Args:
        model: a folder, a name on the Hub, or nano. (Onto a model that is loaded already, put a `HotLoraConfig`.)
        data: as `--data` takes it; or rows in memory, which are kept in the run's folder: a list of dictionaries, a
            `datasets.Dataset` or `IterableDataset`, a DataFrame.
        output: the run's folder; None: runs/MODEL-DATA-METHOD-SEED.
        test_data: held-out data, in the same ways.
        method, preset, placement: names from `runs.methods`.
        preflight: first find out whether it fits into memory; an error where it cannot.
        progress: bars, and what is going to happen, on stderr.
        options: docs/options.md has each; the defaults are the command line's. transformers' names are taken, too.

    Raises:
        HotLoraError: an option that does not exist (the nearest is named), that is of another type or out of range;
            `output` holds a run with other options; what is wrong with model and data.
        KeyboardInterrupt: by Ctrl-C, when what was done is saved.
    """
    _check_model(
        model, "a loaded model takes hotlora.HotLoraConfig and peft.get_peft_model, and TRL's SFTTrainer trains"
    )
    given: Any = {"model": model, "data": _named(data), "test_data": _named(test_data), **options}
    _check_output(output)
    chosen = resolve(method, preset=preset, placement=placement, **given)
    name = preset or chosen.condition or chosen.rule
    parts = (chosen.model, chosen.data, name, f"seed{chosen.seed}")
    folder = Path(output) if output is not None else Path("runs") / "-".join(_slug(part) for part in parts)
    kept = {option: folder / f"{option}.jsonl" for option in ("data", "test_data") if given[option] is _ROWS}
    there: dict[str, Any] = {option: str(file) for option, file in kept.items()}
    chosen = replace(chosen, **there)
    own = [option for option, value in options.items() if value is not None]

    from .base.processes import is_main, start, wait_for_all
    from .base.quiet import without_bars
    from .hf.hub import push
    from .report.card import write_card
    from .runs.folder import is_begun
    from .runs.load import Run
    from .runs.stages import run_method
    from .tasks.in_memory import save_rows
    from .training.checkpoints import last_complete

    @cache  # a method may have several trainings
    def begin() -> None:
        if progress and is_main():
            last = last_complete(folder / "checkpoints")
            going_on = f", {'extending' if chosen.extend else 'resuming'} from {last.name}" if last else ""
            _tell(f"training {chosen.model} on {given['data']} into {folder}{going_on}")
        if preflight:
            _check_memory(chosen, progress)

    with _ctrl_c_as_ever(), nullcontext() if progress else without_bars():
        start(chosen.device)
        for option, file in kept.items() if is_main() else ():
            save_rows({"data": data, "test_data": test_data}[option], file, replace=not is_begun(folder))
        wait_for_all()
        if chosen.fit is not None:
            chosen = _fitted(chosen, own, folder, progress)
        run_method(chosen, folder, progress=progress, begin=begin)
        if progress and is_main() and not begin.cache_info().currsize:
            _tell(f"{folder} is done: nothing was trained now (--extend trains it on)")
        if is_main():
            write_card(folder)
            if chosen.push_to_hub is not None:
                address = push(folder, chosen.push_to_hub, private=chosen.hub_private_repo)
                if progress:
                    _tell(f"pushed: {address}")
    return Run(folder)


@_options_of(ProfileOptions, *PROFILE_LEAVES)
@_memory_given_back()
def profile(
    model: str | os.PathLike[str],
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
    **options: Unpack[ProfileKeywords],
) -> "RoutingProfile":
    """Which experts the model's router uses on the data, in one pass without gradients, as `hotlora profile` does.

        profile = hotlora.profile("nano", "nano-math", limit=200)
        plan = hotlora.select_experts(profile, fraction=0.25)

    Args:
        model: a folder, a name on the Hub, or nano. (Of a model that is loaded already: `profile_routing`.)
        data: as `train` takes it.
        output: a .safetensors file or a folder to save it to; None: it is not saved.
        progress: bars on stderr.
        options: `hotlora profile --help` has each; the defaults are the command line's.

    Raises:
        HotLoraError: as `train`.
    """
    _check_model(model, "of a loaded model, hotlora.profile_routing(model, batches) makes the profile")
    _check_output(output)
    chosen, named = ProfileOptions(model=model, **options), _named(data)  # type: ignore[arg-type]

    from .base.files import check_writable, file_in
    from .base.processes import is_main, start
    from .base.quiet import without_bars
    from .hf.models import load_tokenizer, vocab_size
    from .runs.checks import check_adapters, check_sizes
    from .runs.folder import load_base
    from .runs.profiling import Watching, profile_data
    from .tasks.data import load_examples
    from .tasks.in_memory import save_rows
    from .tasks.tokens import tokenize

    sizes: dict[str, Any] = {"batch_size": chosen.batch_size, "max_length": chosen.max_length}
    check_sizes(**sizes)
    if output is not None:
        check_writable(file_in(output, "profile.safetensors"))
    bars = nullcontext() if progress else without_bars()
    with _ctrl_c_as_ever(), bars, TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        start(chosen.device)
        check_adapters(
            chosen.model, (), dtype=chosen.dtype, device=chosen.device, attn_implementation=chosen.attn_implementation
        )
        tokenizer = load_tokenizer(chosen.model)
        source = named if named is not _ROWS else str(save_rows(data, Path(temporary) / "data.jsonl"))
        read = {"tokenizer": tokenizer, **chosen.reading()}
        examples = load_examples(source, "train", limit=chosen.limit, seed=chosen.seed, tell_unread=False, **read)
        dataset = tokenize(examples, tokenizer, chosen.max_length, vocab_size=vocab_size(chosen.model))
        base = load_base(chosen.model, **chosen.loading())
        result = profile_data(
            base, tokenizer, examples, named, chosen.model, dataset=dataset, progress=progress and is_main(),
            watching=Watching(chosen.profile_until, saliency=chosen.saliency, seed=chosen.seed),
            more="give a larger --limit" if chosen.limit == len(examples) else "", **sizes,
        )  # fmt: skip
        if output is not None and is_main():
            result.save(output)
    return result


@_options_of(EvalOptions, *EVALUATE_LEAVES)
@_memory_given_back()
def evaluate(
    run: "Run | str | os.PathLike[str]",
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    rouge: bool = False,
    engine: str = "transformers",
    progress: bool = True,
    **options: Unpack[EvaluateKeywords],
) -> dict[str, Any]:
    """Scores a run, an adapter or a model on a task's test split or on rows of your own, as `hotlora evaluate` does.

        found = hotlora.evaluate("runs/mine", "held-out.jsonl")
        found["loss"], found["loss_ci"], found["accuracy"]

    With `output`, an evaluation that was stopped goes on when it is called again; once done, it gives what is there.

    Args:
        run: a run's folder or a `Run`, an adapter's folder, or a model: a folder, a name on the Hub, or nano.
        data: as `train` takes it; rows in memory are kept in `output`, where there is one.
        output: gets run.json and every example's result; None: nothing is kept.
        model: the base, where it is not at the place that the adapter notes.
        samples, temperature, top_p, seed: how answers are drawn; several samples give pass@k.
        rouge: of own rows also ROUGE-L.
        engine: transformers or vllm.
        progress: bars on stderr.
        options: `hotlora evaluate --help` has each; the defaults are the command line's.

    Returns:
        what the record holds of it: `task`, `metric`, `accuracy`, `correct`, `n`, `ci_low` and `ci_high` (Wilson's 95%
        interval) and `seconds`; of own rows also `loss` (nats a token), `perplexity`, `token_accuracy` and, if asked
        for, `rouge_l`, each with its 95% interval (`loss_ci`, …), and `tokens`; of rows of text the metric is token
        accuracy. With `output` the paths `results` and
        `losses`: JSON lines, one an example.

    Raises:
        HotLoraError: an option that does not exist (the nearest is named) or does not go with another; `output` holds
            other work; what is wrong with run and data.
    """
    from .runs.load import Run

    run = run.folder if isinstance(run, Run) else run
    if not isinstance(run, str | os.PathLike):
        raise ModelError(f"run is a {type(run).__name__}: give a run, or the name or folder of a model or an adapter.")
    _check_output(output)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HotLoraError("hotlora.evaluate runs in one process: call it without torchrun or accelerate.")

    from .base.quiet import without_bars
    from .evaluation.generate import Sampling
    from .runs.evaluation import run_evaluation
    from .runs.folder import is_begun
    from .runs.load import find
    from .tasks.in_memory import save_rows

    found, named = find(os.fspath(run), model), _named(data)
    chosen = EvalOptions(model=found.model, adapter=found.adapter, **options)
    with nullcontext() if progress else without_bars(), TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary if output is None else output)
        is_folder, is_kept = folder.exists(), (folder / "data.jsonl").exists()
        source = (
            named if named is not _ROWS else str(save_rows(data, folder / "data.jsonl", replace=not is_begun(folder)))
        )
        try:
            record, _ = run_evaluation(
                chosen, source, None if output is None else folder,
                sampling=Sampling(samples, temperature, top_p, seed), engine=engine, rouge=rouge, progress=progress,
            )  # fmt: skip
        except HotLoraError:
            if named is _ROWS and not is_kept:  # refused: leave nothing that the call with other options would meet
                with suppress(OSError):  # Windows deletes no file that is open; what was refused is to be told
                    (folder / "data.jsonl").unlink()
                    if not is_folder and not any(folder.iterdir()):
                        folder.rmdir()
            raise
    ((task, result),) = record["evaluation"].items()
    kept = {name: str(folder / result[name]) for name in ("results", "losses") if name in result}
    return {"task": task, **result, **kept}


def _check_model(model: Any, otherwise: str) -> None:
    if not isinstance(model, str | os.PathLike):
        raise ModelError(
            f"model is a {type(model).__name__}: give a folder, a name on the Hub or nano; {otherwise}: docs/python.md."
        )


def _check_output(output: Any) -> None:
    if output is not None and not (isinstance(output, str | os.PathLike) and os.fspath(output)):
        raise HotLoraError(f"output is {output!r}: give a folder to write to.")


def _fitted(options: RunOptions, given: Collection[str], folder: Path, progress: bool) -> RunOptions:
    """The options with what `--fit` chooses, or chose when the run in `folder` was begun."""
    from .base.processes import all_objects, is_main
    from .base.records import read_record
    from .cost.fit import fit
    from .cost.setups import LEVERS
    from .runs.folder import is_begun

    def choose() -> dict[str, Any]:
        then: dict[str, Any] = {}
        goes_on = (folder / "run.json").is_file() and is_begun(folder)
        if (folder / "run.json").is_file():
            record = read_record(folder)
            had, was_fitted = record["config"], record["config"].get("fit") is not None
            # Without --fit then, what may not change: the batch is split up anew, and the rest changes nothing learned.
            is_kept = goes_on or record["status"] == "done"
            held = LEVERS if was_fitted and is_kept else ("quantize",) if goes_on else ()
            then = {name: had[name] for name in held if name in had and name not in given}
            if was_fitted and record["status"] == "done" and not options.extend:
                return then
        # What the record does not hold changes nothing of what is learned: it is chosen for the memory of now.
        found = fit(replace(options, **then), given, held=[*then] if goes_on or then else None)
        for line in found.lines if progress else ():
            _tell(line)
        return then | dict(found.chosen)

    return replace(options, **all_objects(choose() if is_main() else {})[0])


def _check_memory(options: RunOptions, progress: bool) -> None:
    """Says whether it fits; an error where it cannot. Of several processes the first one finds out, for all."""
    from .base.processes import all_objects, is_main
    from .cost.preflight import preflight

    found = all_objects(preflight(options) if is_main() else None)[0]
    if found is None:
        return
    if found.is_hopeless:
        raise HotLoraError(f"{found} --no-preflight (preflight=False) tries it all the same.")
    if is_main() and not found.fits:
        _log.warning("%s", found)
    elif is_main() and progress:
        _tell(str(found))


def export_adapter(
    model: "nn.Module",
    output: str | os.PathLike[str],
    *,
    format: str,
    adapter_name: str = "default",
    merge_router: bool = False,
    drop_router: bool = False,
    merge_attention: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Writes a HotLoRA adapter in the format of an engine or a library. `model` is left as it was.
    A model card beside it says what loads it, and how.

    vllm: one pair of matrices for each expert and projection, zeros for the cold experts. sglang: the same,
    hot experts only. sglang-shared: of an adapter with `share_a`, each factor that experts share once. peft: a
    plain PEFT adapter (`target_parameters`), which `peft.PeftModel.from_pretrained` loads. gguf: one file for
    llama.cpp, of some families (needs the extra gguf). mlx: for mlx-lm, of some families. merged: a whole
    checkpoint of the model with the adapter folded in.

    vLLM's and SGLang's formats hold no router. An adapter that trains it needs either of

    - merge_router: `output/adapter` holds the rest, and `output/base` the base model with the routers'
      updates folded in. Serve the two together.
    - drop_router: the routers' updates are left out, so answers differ from the trained model's.

    vLLM and MLX apply no adapter to MLA's `kv_b_proj` (DeepSeek, Kimi, GLM-5, …), llama.cpp to none of MLA's
    projections but the last. An adapter that trains these needs

    - merge_attention: their updates are folded into `output/base`, too.

    Args:
        model: a `PeftModel` with a HotLoRA adapter.
        output: a folder that is not there yet, or is empty.
        tokenizer: saved beside a checkpoint (merged, merge_router, merge_attention), and a plain PEFT adapter (peft).

    Returns:
        `output`.

    Raises:
        HotLoraError: an unknown format or adapter, or something that the format cannot hold (named).
        FileError: `output` is taken.
    """
    from .adapter.formats.export import base_name
    from .adapter.formats.export import export_adapter as write
    from .adapter.formats.room import room_of
    from .report.card import write_export_card

    folder = write(
        model, Path(output), format=format, adapter_name=adapter_name, merge_router=merge_router,
        drop_router=drop_router, merge_attention=merge_attention, tokenizer=tokenizer,
    )  # fmt: skip
    adapted: Any = model
    base = base_name(adapted, adapter_name) or "its base model"
    source = adapted.base_model.entry_of(adapter_name).get("path")
    room = room_of(adapted.get_base_model(), format, folder, adapted.get_base_model().dtype)
    write_export_card(folder, format, base, [source] if source else [], room, drop_router)
    return folder


@contextmanager
def _ctrl_c_as_ever() -> Iterator[None]:
    """Ctrl-C in a training saves what was done and ends the process, which in a notebook or a prompt would lose the
    session: there it is a KeyboardInterrupt. (The command line has a handler of its own.)"""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        yield
    except Stopped as stopped:
        if is_usual and stopped.code == 130:
            raise KeyboardInterrupt(stopped.message) from None
        raise


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _named(data: Any) -> Any:
    """The data by its name or path; rows in memory have none. None as it is."""
    return os.fspath(data) if isinstance(data, str | os.PathLike) else None if data is None else _ROWS


def _slug(text: str) -> str:
    """The last part of a name or path, fit for a folder's name."""
    text = Path(text.rstrip("/")).stem if "/" in text else text
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("_.") or "x"
