"""The command line: each command is one call into the library. Heavy imports wait until a command runs."""

import codecs
import dataclasses
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..base.errors import HotLoraError, Stopped
from ..base.escape import lines
from ..base.signals import on_stop, stop
from ..routing.selection import Selection
from ..runs.options import RunOptions
from .bench import bench
from .compare import compare
from .data import data
from .evaluate import evaluate
from .export import combine, export, merge, push
from .imported import import_
from .leaderboard import leaderboard
from .names import Commands
from .options import err, error_line, options_of, out
from .params import params
from .profile import profile
from .report import report
from .sweep import sweep
from .talk import chat, generate
from .train import train
from .verify import verify

# PEFT imports it where it is installed, and it says that an optional kernel is missing. Here, for the processes of
# `bench` come by here too.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

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
app.command()(evaluate)
app.command()(push)
app.command()(generate)
app.command()(chat)
app.command()(merge)
app.command()(export)
app.command()(verify)
app.command()(sweep)
app.command()(combine)
app.command()(report)
app.command()(compare)
app.command()(leaderboard)
app.command()(params)
app.command()(bench)


def main() -> None:
    """The entry point: a user's mistake is one message and exit code 1, never a traceback."""
    _in_utf8()
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


def _in_utf8() -> None:
    """On Windows what is piped or goes to a file is in the code page of the country, which lacks most characters."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            if codecs.lookup(stream.encoding).name != "utf-8":
                stream.reconfigure(encoding="utf-8", errors=errors)


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
