"""Where a training's metrics also go: TensorBoard, wandb, trackio, …, by transformers' callbacks."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from ..base.errors import HotLoraError
from ..base.files import write_text
from ..base.processes import is_main
from ..hf.internals import internal

_LOGS = "TENSORBOARD_LOGGING_DIR"
_NAME = "logs/name.txt"
_OFFLINE = ("offline", "disabled", "dryrun")


def trackers(report_to: str) -> list[str]:
    """The trackers that `report_to` names: one or several, with commas between; all: those that are installed; none.

    HotLoraError: no such tracker, or its package is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    known = sorted(internal("transformers.integrations:INTEGRATION_TO_CALLBACK"))
    if names != ["all"] and not (names and set(names) <= set(known)):
        raise HotLoraError(
            f"report_to = {report_to!r} does not exist: it must be none, all, or some of {', '.join(known)}."
        )
    available = internal("transformers.integrations:get_available_reporting_integrations")()
    if names == ["all"]:
        if not available:
            raise HotLoraError(
                "report_to = 'all' finds no tracker that is installed: install one, such as tensorboard, or leave it "
                "out."
            )
        return available
    if missing := [name for name in names if name not in (*available, "flyte")]:
        raise HotLoraError(
            f"report_to = {missing[0]!r} needs a package that is not installed: install {missing[0]}, or leave it out."
        )
    return names


def check_report_to(report_to: str) -> None:
    """HotLoraError: as `trackers`; or wandb, which would be asked for a key after the model is loaded, has none."""
    if "wandb" not in trackers(report_to) or os.environ.get("WANDB_MODE") in _OFFLINE or not is_main():
        return
    import wandb

    try:
        wandb.login()
    except Exception as error:  # each of its versions has its own
        raise _cannot_begin("wandb", error) from error


@contextmanager
def tracked(trainer: Any, output: Path, start: int) -> Iterator[None]:
    """While `trainer` trains: TensorBoard's logs go to `output`/logs, unless its variable of the environment says
    otherwise, and not to runs/ of the working directory; a training that goes on from step `start` goes on in the same
    run of each tracker, and one that begins has a run of its own.

    HotLoraError: a tracker that cannot begin.
    """
    if not trainer.args.report_to:
        yield
        return
    name = _run_name(output, start)
    trainer.args.run_name = name
    callbacks = trainer.callback_handler.callbacks
    for callback in callbacks:
        if callback.__class__.__module__.startswith("transformers.integrations"):
            callback.on_train_begin = _told(callback)
        if isinstance(callback, TensorBoardCallback) and is_main():
            callback.tb_writer = _writer(output, start)
    given = {"WANDB_RUN_ID": name.rpartition("-")[2], "WANDB_RESUME": "allow"}
    has_own = given.keys() & os.environ.keys() or not any(isinstance(callback, WandbCallback) for callback in callbacks)
    os.environ |= {} if has_own else given
    try:
        yield
    finally:
        for variable in () if has_own else given:
            os.environ.pop(variable, None)


def _run_name(output: Path, start: int) -> str:
    """Its folders' names and eight digits of its own: by a name alone trackio takes two runs for one."""
    file = output / _NAME
    if start and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    name = "-".join([*output.resolve().parts[-2:], secrets.token_hex(4)]).replace("/", "")
    if is_main():
        write_text(file, name + "\n")
    return name


def _writer(output: Path, start: int) -> Any:
    """TensorBoard's, which leaves out what was logged after step `start` before."""
    from torch.utils.tensorboard import SummaryWriter

    folder = os.environ.get(_LOGS) or str(output / "logs")
    print(f"tensorboard: logs in {folder}", file=sys.stderr)
    return SummaryWriter(log_dir=folder, purge_step=start + 1)


def _told(callback: Any) -> Callable[..., Any]:
    begin = callback.on_train_begin

    def on_train_begin(*args: Any, **kwargs: Any) -> Any:
        try:
            return begin(*args, **kwargs)
        except Exception as error:  # each has its own
            raise _cannot_begin(type(callback).__name__.removesuffix("Callback").lower(), error) from error

    return on_train_begin


def _cannot_begin(name: str, error: Exception) -> HotLoraError:
    reason = " ".join(str(error).split()).rstrip(".")
    return HotLoraError(f"report_to = {name!r} cannot be used here ({reason}): set {name} up, or leave it out.")
