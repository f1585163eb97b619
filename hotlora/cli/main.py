"""The command line: each command is one call into the library. Heavy imports wait until a command runs."""

import dataclasses
import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..base.errors import HotLoraError, Stopped
from ..base.escape import lines
from ..base.signals import on_stop, stop
from ..routing.selection import Selection
from ..runs.options import EvalOptions, LoadOptions, RunOptions
from .bench import bench
from .compare import compare
from .data import data
from .imported import import_
from .leaderboard import leaderboard
from .names import Commands
from .options import AsJson, err, error_line, number_list, options_of, out
from .params import params
from .profile import profile
from .sweep import sweep
from .talk import chat, generate
from .train import print_evaluation, push, train
from .verify import verify

if TYPE_CHECKING:
    from ..adapter.formats.room import Room

# PEFT imports it where it is installed, and it says that an optional kernel is missing. Here, for the processes of
# `bench` come by here too.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_Base = Annotated[str | None, typer.Option("--model", "-m", help="The base (default: what the adapter notes).")]

app = typer.Typer(
    name="hotlora",
    cls=Commands,
    help="Fine-tune Mixture-of-Experts language models where they already work: LoRA on the experts a task really "
    "uses. Start with `hotlora demo`, or `hotlora train --model MODEL --data FILE.jsonl`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        print(f"hotlora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in ("train", "profile"):
        raise HotLoraError(
            f"hotlora {context.invoked_subcommand} runs in one process: call it without torchrun or accelerate. "
            "`train` and `profile` run in several."
        )


@app.command()
@options_of(RunOptions, only=("seed",))
def demo(
    task: Annotated[str, typer.Option(help="nano-math, nano-sql or nano-choice.")] = "nano-math",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where runs and page go.")] = Path("runs/demo"),
    **given: Any,
) -> None:
    """See the whole way in a few minutes, on the embedded model: no network and no GPU needed.

    Profiles nano's router on a task, trains LoRA on all experts, on the hot 25%, on as many random ones and on as
    many cold ones, with attention and router and on experts alone, evaluates each and the base model, and writes one
    page with a table of each. Run again, it goes on where it stopped.
    """
    from ..papers.demo import CONFIG, run_demo

    run_demo(task, output, config=dataclasses.replace(CONFIG, **given), console=out)


app.command()(profile)
app.command("import")(import_)


@app.command()
@options_of(Selection)
def plan(
    profile: Annotated[Path, typer.Argument(help="A profile.safetensors, or the folder that holds it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .json file or a folder.")] = Path("plan.json"),
    seed: Annotated[int, typer.Option(help="Of rules that draw.")] = 0,
    **given: Any,
) -> None:
    """Choose the experts to adapt, from a profile. The file can be edited by hand."""
    from ..routing.agreement import disagreements
    from ..routing.plan import selected
    from ..routing.profile import RoutingProfile

    selection = Selection(**given)
    routing = RoutingProfile.load(profile)
    chosen = selected(routing, selection, seed=seed)
    chosen.save(output)
    if "signal" in chosen.params and "signal" not in given:
        for told in disagreements(routing):
            err.print(f"{told}.")
    out.print(f"{chosen.summary}; plan: {output}")


app.command()(data)
app.command()(train)


@app.command()
@options_of(EvalOptions, leave=("model", "expert_parallel"))
def evaluate(
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", "--task", help="A task, with its files (gsm8k:DIR), or your own rows."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A folder, a name on the Hub, or nano.")] = None,
    engine: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = "transformers",
    samples: Annotated[
        int, typer.Option(rich_help_panel="Sampling", help="Answers to each prompt, for pass@k (with a temperature).")
    ] = 1,
    temperature: Annotated[float, typer.Option(rich_help_panel="Sampling", help="0: greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(rich_help_panel="Sampling", help="Draw from this share of the probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(rich_help_panel="Sampling", help="Of the draws.")] = 0,
    harness: Annotated[
        str | None, typer.Option(rich_help_panel="lm-eval", help="lm-eval: its prompts, metrics and filters.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="lm-eval",
            help="Its tasks, with commas between; gsm8k:DIR and hellaswag:DIR read local files.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(rich_help_panel="lm-eval", help="Examples in the prompt (default: the task's).")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(rich_help_panel="lm-eval", help="A folder with task configs of your own.")
    ] = None,
    generations: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel="Without a model",
            help="JSON lines with index or task_id, and completion: score these. Several of an example give pass@k.",
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            rich_help_panel="Without a model",
            help="Examples without a completion count as wrong; else they are an error.",
        ),
    ] = False,
    rouge: Annotated[
        bool, typer.Option("--rouge", help="Of your own rows also ROUGE-L, which needs the extra rouge.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep run.json and every example's result here.")
    ] = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Score a model, a model with an adapter, or completions made elsewhere, on a task's test split or your own rows.

    `hotlora evaluate --data rows.jsonl --adapter runs/mine` takes the base from the adapter. Of your own rows it tells
    exact match, loss, perplexity and token accuracy; with --rouge ROUGE-L.

    With --output, an evaluation that was stopped goes on where it was.

    humaneval runs Python that the model wrote, as far apart from all else as the system allows: docs/evaluation.md.
    """
    from ..evaluation.generate import Sampling
    from ..runs.evaluation import run_evaluation, run_generations, run_harness

    if generations is None and "adapter" in given:
        model, given["adapter"] = _tuned(given["adapter"], model)
        given = {name: value for name, value in given.items() if value is not None}
    if harness is not None or tasks is not None:
        if harness != "lm-eval" or not tasks or data or not model or generations:
            raise HotLoraError("Give --harness lm-eval with --tasks and --model (and an adapter), and no --data.")
        drawn = rouge or samples != 1 or temperature or top_p != 1 or engine != "transformers"
        if drawn or "max_new_tokens" in given:
            raise HotLoraError(
                "lm-eval's tasks say how answers are drawn: leave engine, sampling, --max-new-tokens and --rouge out."
            )
        names = [name.strip() for name in tasks.split(",")]
        options = EvalOptions(model=model, **given)
        record = run_harness(options, names, output, include_path=include_path, num_fewshot=num_fewshot)
        _show_evaluation(record, output, as_json)
        return
    if data is None or num_fewshot is not None or include_path is not None:
        raise HotLoraError("Give --data, a task to score; num-fewshot and include-path go with --harness lm-eval.")
    sampling = Sampling(samples, temperature, top_p, seed)
    answering = set(given) - {"limit"} or rouge or engine != "transformers" or sampling != Sampling()
    if (model is None) == (generations is None) or (generations is not None and answering):
        raise HotLoraError("Give --model (and an adapter), which answers, or --generations, which holds the answers.")
    if model is None:
        assert generations is not None
        limit = given.get("limit")
        record, _ = run_generations(
            data, generations, output, allow_missing=allow_missing, limit=limit, progress=not as_json
        )
    else:
        options = EvalOptions(model=model, **given)
        record, _ = run_evaluation(options, data, output, sampling=sampling, engine=engine, rouge=rouge, progress=True)
    _show_evaluation(record, output, as_json)


def _show_evaluation(record: dict[str, Any], output: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record["evaluation"]))
    else:
        print_evaluation(record, output)
        if output is None:
            out.print("kept nowhere: --output FOLDER keeps the record and every example's result")
        if bits := record.get("config", {}).get("quantize"):
            kept = "; those of the adapter are not" if record["config"].get("keep_hot") else ""
            out.print(f"experts were stored in {bits} bits{kept} (--quantize)")
        if bits := record.get("config", {}).get("quantize_linear"):
            out.print(f"other linear layers were stored in {bits} bits (--quantize-linear)")


app.command()(push)
app.command()(generate)
app.command()(chat)


@app.command()
@options_of(LoadOptions, only=("on_top_of", "device", "offload", "offload_folder"))
def merge(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the merged model.")],
    model: _Base = None,
    dtype: Annotated[str, typer.Option(help="auto: the base checkpoint's own.")] = "auto",
    **given: Any,
) -> None:
    """Fold an adapter into its base model: a plain checkpoint that any engine loads."""
    from ..runs.export import export_saved

    model, adapter = _noted(adapter, model)
    export_saved(model, adapter, output, format="merged", dtype=dtype, **given)
    _describe(output, "merged", model, [adapter])
    out.print(f"merged model: {output}")
    _tell_of_quantization(adapter)


@app.command()
@options_of(LoadOptions, only=("on_top_of", "device", "offload", "offload_folder"))
def export(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the export.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="vllm, sglang, sglang-shared, peft, gguf, mlx or merged.")
    ],
    model: _Base = None,
    merge_router: Annotated[
        bool,
        typer.Option("--merge-router", help="vllm, sglang: write a base model with the routers' updates in it, too."),
    ] = False,
    drop_router: Annotated[
        bool,
        typer.Option("--drop-router", help="vllm, sglang: leave the routers' updates out; answers then differ."),
    ] = False,
    merge_attention: Annotated[
        bool,
        typer.Option(
            "--merge-attention", help="vllm, gguf, mlx: what the engine does not apply of MLA goes there, too."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto: the base checkpoint's own.")] = "auto",
    **given: Any,
) -> None:
    """Write an adapter in the format of an engine, or of plain PEFT.

    vllm and sglang cannot hold a router's update: choose --merge-router or --drop-router, or train with --no-router.
    sglang-shared is for what was trained with --share-a.
    vllm and mlx apply no update to MLA's kv_b_proj, llama.cpp (gguf) to most of MLA: --merge-attention.

    `hotlora verify` loads the export in the engine, and finds out whether it is applied.
    """
    from ..adapter.formats.export import adapter_in
    from ..report.card import size_told
    from ..runs.export import export_saved, served_room

    model, adapter = _noted(adapter, model)
    export_saved(
        model, adapter, output, format=format, merge_router=merge_router, drop_router=drop_router,
        merge_attention=merge_attention, dtype=dtype, **given,
    )  # fmt: skip
    room = served_room(model, output, format=format, dtype=dtype)
    card = _describe(output, format, model, [adapter], room)
    out.print(f"{format}: {output}")
    out.print(f"how to use it: {card}")
    if format != "merged":
        out.print(size_told(adapter_in(output), room))
    if merge_router or merge_attention:
        out.print(f"serve {output / 'base'} with the adapter {output / 'adapter'}")
    _tell_of_quantization(adapter)


app.command()(verify)


def _noted(path: Path, model: str | None) -> tuple[str, Path]:
    """(base model, adapter) of a run's folder or an adapter's."""
    from ..base.errors import FileError
    from ..runs.load import find

    found = find(path, model)
    if found.adapter is None:
        raise FileError(f"{path} is not an adapter: give the folder that save_pretrained or a training wrote it to.")
    return found.model, found.adapter


def _tuned(path: Path, model: str | None) -> tuple[str, Path | None]:
    """The same; of a run of full fine-tuning its model, and no adapter."""
    from ..runs.load import find

    if (path / "run.json").is_file() and (path / "model").is_dir():
        return find(path, model).model, None
    return _noted(path, model)


def _describe(output: Path, format: str, model: str, adapters: list[Path], room: "Room | None" = None) -> Path:
    from ..report.card import write_export_card

    return write_export_card(output, format, model, adapters, room)


def _tell_of_quantization(adapter: Path) -> None:
    from ..adapter.load import saved_config

    if found := saved_config(adapter).base_quantization:
        kept = " but the hot ones" if found.get("keep") else ""
        stored = [f"all experts{kept} in {found['bits']} bits"] if "bits" in found else []
        stored += [f"linear layers in {found['linear']} bits"] if "linear" in found else []
        if stored:  # packed experts are the same numbers as dense ones
            out.print(
                f"It was trained on a base with {' and '.join(stored)}, and is written for the base as it is: answers "
                "may differ a little, so evaluate it there.",
            )


app.command()(sweep)


@app.command()
@options_of(LoadOptions, only=("on_top_of", "device"))
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Two runs' folders, or saved adapters, or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the adapter.")],
    model: _Base = None,
    weights: Annotated[str | None, typer.Option(help="One for each adapter, with commas between (default 1).")] = None,
    how: Annotated[
        str,
        typer.Option(
            help="cat: the exact sum, at the sum of the ranks; linear: sums of the factors; ties, dare_linear, "
            "dare_ties, magnitude_prune: PEFT's sums of pruned factors."
        ),
    ] = "cat",
    density: Annotated[
        float | None, typer.Option(help="Share of each factor that ties and its like keep (default 0.5).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of DARE's draws.")] = 0,
    **given: Any,
) -> None:
    """Make one adapter out of several tasks'. Its experts are all of theirs."""
    from ..runs.export import combine_saved, shared_experts

    numbers = None if weights is None else number_list("weights", weights, float)
    found = [_noted(adapter, model) for adapter in adapters]
    parts = [adapter for _, adapter in found]
    combine_saved(found[0][0], parts, output, weights=numbers, how=how, density=density, seed=seed, **given)
    _describe(output, "combined", found[0][0], parts)
    for told in shared_experts(parts):
        out.print(told)
    out.print(f"adapter: {output}")


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="A folder with runs in it.")] = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes (default: into RUNS).")
    ] = None,
) -> None:
    """Make one page with tables and pictures from the runs' records alone.

    Of recipes' runs also the papers' tables and figures, as HTML, Markdown, CSV, LaTeX and PNG.
    """
    gc.disable()  # while modules are imported, and their objects are never looked through: a fifth of the time
    from ..base.records import find_records
    from ..report.page import conditions_table, has_recipes, write_report

    gc.freeze()
    gc.enable()
    skipped: dict[Path, str] = {}
    records = find_records(runs, skipped)
    page = write_report(runs, output or runs)
    out.print(conditions_table(records))
    for folder, why in skipped.items():
        out.print(f"left out: {lines(f'{folder}: {why}')}")
    out.print(f"page: {page}")
    if has_recipes(records.values()):
        from ..papers.page import write_tables  # it brings the trainer along, which a plain report does without

        for tables in write_tables(runs, output or runs):
            out.print(f"tables: {tables}")


app.command()(compare)
app.command()(leaderboard)
app.command()(params)
app.command()(bench)


def main() -> None:
    """The entry point: a user's mistake is one message and exit code 1, never a traceback."""
    if not sys.stderr.isatty():  # other libraries' bars would fill a log
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    try:
        with on_stop(stop):
            app()
    except Stopped as stopped:
        err.print(lines(stopped.message))
        sys.exit(stopped.code)
    except HotLoraError as error:
        if _is_told_here(error):
            err.print(error_line(lines(str(error))))
        sys.exit(1)
    except OSError as error:  # a path that cannot be one, a disk that is full
        if _is_told_here(error):
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            err.print(error_line(f"{lines(what)}; check the path"))
        sys.exit(1)
    except Exception as error:
        if not _is_told_here(error):  # it waited for another process, whose error has been told
            sys.exit(1)
        if not _has_lost_another(error):
            raise
        from ..base.processes import LOST

        err.print(error_line(LOST))
        sys.exit(1)
    except SystemExit as ended:  # how a command that went well ends
        if not ended.code:
            _leave()
        raise


def _leave() -> None:
    if "WORLD_SIZE" in os.environ:
        from ..base.processes import leave

        leave()


def _has_lost_another(error: Exception) -> bool:
    if "WORLD_SIZE" not in os.environ:
        return False
    from ..base.processes import lost_another

    return lost_another(error)


def _is_told_here(error: Exception) -> bool:
    """Of several processes, whether this one failed first; where they do not know of each other yet, the first one."""
    if "WORLD_SIZE" not in os.environ:
        return True
    from ..base.processes import first_failure, num_processes

    if num_processes() == 1:
        return os.environ.get("RANK", "0") == "0"
    return first_failure(f"{type(error).__name__}: {error}")[1]
