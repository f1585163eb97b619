"""Times ways to adapt one model's experts side by side: each in a process of its own, one step each in turn.

Taking turns is what makes the times comparable on a machine whose speed drifts, and a ratio is taken within a round.
A process of its own makes a memory peak its own, and one that fails leaves the others alone. Only one of them has its
model in memory at a time.
"""

import dataclasses
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from ..base.errors import HotLoraError, ModelError
from ..base.precision import cpu_dtype, in_float32, say_once
from ..base.records import environment
from ..base.signals import without_ctrl_c
from ..cost.estimate import estimate, meta_model, sized_config, torch_dtype
from ..cost.flops import attention_adapter_flops, dense_update_flops, expert_adapter_flops, forward_flops, step_flops
from ..hf.models import packing
from ..hf.moe_layers import fingerprint, moe_layers
from ..routing.profile import RoutingProfile
from .contenders import KINDS, BenchConfig, Contender
from .worker import PARTS, Worker

VERSION = 1
AXES = ("tokens", "experts", "rank", "layers")

Rows = dict[str, dict[str, Any]]
"""Contender -> what a result holds of it."""
Times = dict[str, list[dict[str, float] | None]]
"""Contender -> seconds of each round's step and its parts; None from the round on in which it failed."""


def run_bench(config: BenchConfig, *, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Times every contender and returns what a result's JSON holds; see docs/speed.md for its keys.

    tell: is told what is being done, in a line.

    Raises:
        HotLoraError: a setting is out of range, or no contender could be run.
        FileError, ModelError: as `models.model_from_config`.
    """
    config = _resolved(config)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    contenders = config.all_contenders()
    cut = sized_config(config.model, config.layers)
    if (stored := packing(cut)) is not None:
        tell(f"random weights are dense, also of the experts, which are published in {stored['quant_method']}")
    rows = {c.name: {"name": c.name, "kind": c.kind, "fraction": c.fraction, "status": "done"} for c in contenders}
    for contender in contenders:
        if contender.missing:
            rows[contender.name] |= {"status": "missing", "reason": contender.missing}
    with _processes(config, [c for c in contenders if not c.missing]) as processes:
        if not processes:
            raise HotLoraError("none of the contenders is here: name some of floor, hot, all, peft, loop.")
        tell("starting processes")
        for process in processes:  # what follows is timed: none of them may still be importing
            process.ask("ready")
        tell("skewing routers, profiling, measuring the machine's matrix rate")
        common = processes[0].ask("calibrate")
        times = _rounds(config, processes, common, rows, tell)
    # What goes from process to process holds no tensor.
    profiled = common["profile"] | {name: torch.tensor(common["profile"][name]) for name in ("counts", "mass")}
    profile = RoutingProfile(**profiled)
    model = meta_model(cut)
    _add_times(rows, times, config.tokens)
    _add_arithmetic(rows, config, model, profile, common["rate"])
    text = cut.get_text_config()
    return {
        "version": VERSION, "kind": "bench", "started": started, "settings": dataclasses.asdict(config),
        "model": {
            "type": cut.model_type, "fingerprint": fingerprint(model), "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size, "num_experts": profile.num_experts,
            "num_experts_per_tok": profile.num_experts_per_tok,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "routing": {"cv": profile.mean_layer_cv(), "layer_cv": profile.layer_cv().tolist()},
        "matrix_rate": common["rate"], "contenders": list(rows.values()), "environment": environment(),
    }  # fmt: skip


def _resolved(config: BenchConfig) -> BenchConfig:
    """The config with its "auto"s and Nones worked out."""
    cut = sized_config(config.model, config.layers)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    length = config.length
    if length is None:
        length = min(2048, config.tokens, getattr(cut.get_text_config(), "max_position_embeddings", 2048))
        while config.tokens % length:
            length -= 1
    dtype = torch_dtype(config.dtype, cut)
    if config.dtype == "auto" and torch.device(device).type == "cpu":
        say_once(in_float32(dtype))
        dtype = cpu_dtype(dtype)
    name, layers = str(dtype).removeprefix("torch."), cut.get_text_config().num_hidden_layers
    return dataclasses.replace(config, device=device, length=length, dtype=name, layers=layers)


def _rounds(
    config: BenchConfig, processes: "list[_Process]", common: dict[str, Any], rows: Rows, tell: Callable[[str], None]
) -> Times:
    def attempt(process: _Process, what: str, *args: Any) -> Any:
        try:
            return process.ask(what, *args)
        except _Failed as failure:
            rows[process.contender.name] |= {"status": "failed", "reason": str(failure)}
            process.end()  # what it holds is needed by the others
            return None

    alive = []
    for process in processes:
        tell(f"{process.contender.name}: building, counting, warming up")
        measured = attempt(process, "prepare", common["spreads"], common["plans"].get(process.contender.name))
        if measured is not None:
            rows[process.contender.name] |= measured
            alive.append(process)
    times: Times = {process.contender.name: [] for process in alive}
    for i in range(config.rounds):
        tell(f"round {i + 1} of {config.rounds}")
        first = i % max(1, len(alive))
        for process in alive[first:] + alive[:first]:
            is_done = rows[process.contender.name]["status"] == "done"
            times[process.contender.name].append(attempt(process, "turn") if is_done else None)
    if not any(row["status"] == "done" for row in rows.values()):
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows.values())
        raise HotLoraError(f"no contender could be run. {reasons}")
    return times


def _add_times(rows: Rows, times: Times, tokens: int) -> None:
    floor = times.get("floor", [])
    for name, found in times.items():
        if rows[name]["status"] != "done":
            continue
        whole = [t for t in found if t is not None]
        rows[name]["seconds"] = {part: _spread([t[part] for t in whole]) for part in PARTS}
        rows[name]["tokens_per_second"] = tokens / rows[name]["seconds"]["step"]["median"]
        if rows.get("floor", {}).get("status") == "done":
            ratios = [t["step"] / f["step"] for t, f in zip(found, floor, strict=True) if t and f]
            rows[name]["times_floor"] = _spread(ratios)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high, "min": min(values), "all": list(values)}


def _add_arithmetic(rows: Rows, config: BenchConfig, model: Any, profile: RoutingProfile, rate: float) -> None:
    """FLOPs of a step by formula, their share of the machine's rate, the coverage, and the memory that `estimate`
    foresees."""
    assert config.length is not None
    forward = forward_flops(model, config.length)
    attention = attention_adapter_flops(model, config.r)
    everything = dict.fromkeys(profile.layers, 1.0)
    for row in rows.values():
        kind, fraction = row["kind"], row["fraction"]
        if row["status"] == "missing" or kind not in KINDS:  # the formulas do not know the papers' methods
            continue
        coverage = everything if kind != "floor" else {}
        if kind == "hot":
            coverage = dict(zip(profile.layers, profile.coverage(fraction=fraction).tolist(), strict=True))
            row["coverage"] = float(np.mean(list(coverage.values())))
        shared_a = kind in ("unsloth", "axolotl")  # adapters of PEFT's form
        split = expert_adapter_flops(model, config.r, coverage, shared_a=shared_a) if kind != "peft" else 0.0
        flops = step_flops(forward, attention + split, config.tokens)
        if kind == "peft":
            flops += dense_update_flops(model, forward, config.r, config.tokens)
        row["flops"] = flops
        if row["status"] == "done":
            row["share_of_rate"] = flops / row["seconds"]["step"]["median"] / rate
        if kind in ("hot", "all"):
            row["estimated_memory_bytes"] = _estimated_memory(config, fraction or 1.0, row.get("coverage", 1.0))


def _estimated_memory(config: BenchConfig, fraction: float, coverage: float) -> int | None:
    """None where `estimate` cannot run the family without values: what was timed is not lost for it."""
    assert config.length is not None
    try:
        foreseen = estimate(
            config.model, layers=config.layers, batch_size=config.tokens // config.length, max_length=config.length,
            fraction=fraction, coverage=coverage, r=config.r, train_router=False, train_shared=False,
            dtype=config.dtype, device=config.device, quantize=0,  # the random weights are dense, whatever is published
        )  # fmt: skip
    except ModelError:
        return None
    return int(foreseen["memory"]["total"])


class _Failed(Exception):
    """A contender's process could not do what it was asked."""


class _Process:
    """One contender's process, from the side that asks."""

    def __init__(self, config: BenchConfig, contender: Contender) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, config, contender), daemon=True)
        with without_ctrl_c():
            self.process.start()
        theirs.close()

    def ask(self, what: str, *args: Any) -> Any:
        try:
            self.connection.send((what, args))
            is_done, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise _Failed(f"its process ended with exit code {self.process.exitcode}: out of memory?") from None
        if not is_done:
            raise _Failed(answer)
        return answer

    def end(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _processes(config: BenchConfig, contenders: list[Contender]) -> "Iterator[list[_Process]]":
    processes: list[_Process] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the processes': torch's profiler tells that it starts
    try:
        processes += [_Process(config, contender) for contender in contenders]
        yield processes
    except _Failed as failure:
        raise HotLoraError(f"the model could not be built and profiled: {failure}") from None
    finally:
        for process in processes:
            process.end()


def _serve(connection: Any, config: BenchConfig, contender: Contender) -> None:
    """What a contender's process does: answers until the other side hangs up."""
    worker = Worker(config, contender)
    while True:
        try:
            what, args = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            answer = True, getattr(worker, what)(*args)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        connection.send(answer)


def run_growth(
    config: BenchConfig,
    axis: str,
    values: Sequence[int] | None = None,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """How step time grows with one thing, all else as in `config`: the results of `run_bench`, one a value.

    axis: tokens (of a step), experts (adapted in each layer), rank or layers. values: None: up to `config`'s own; for
    rank 8 to 64.

    Raises:
        HotLoraError: an axis that does not exist, or a value out of range; and as `run_bench`.
    """
    if axis not in AXES:
        raise HotLoraError(f"there is no growth by {axis!r}: choose one of {', '.join(AXES)}.")
    config = _resolved(config)
    if not values and axis == "rank":
        values = [8, 16, 32, 64]
    elif not values:
        most = {"tokens": config.tokens, "experts": _num_experts(config), "layers": config.layers or 1}[axis]
        values = sorted({most * part // 4 for part in (1, 2, 3, 4)} - {0})
    if axis == "tokens":  # in sequences of one length
        config = dataclasses.replace(config, length=math.gcd(config.length or 1, *values))
    runs = []
    for value in values:
        tell(f"{axis} = {value}")
        runs.append(run_bench(_grown(config, axis, value), tell=tell))
    return {"version": VERSION, "kind": "growth", "axis": axis, "values": list(values), "runs": runs}


def _num_experts(config: BenchConfig) -> int:
    return moe_layers(meta_model(sized_config(config.model, config.layers)))[0].num_experts


def _grown(config: BenchConfig, axis: str, value: int) -> BenchConfig:
    if axis == "experts":
        experts = _num_experts(config)
        kinds = ("floor", "all" if value == experts else "hot")
        return dataclasses.replace(config, contenders=kinds, fractions=(value / experts,) if value < experts else ())
    changed: dict[str, Any] = {{"rank": "r"}.get(axis, axis): value}
    return dataclasses.replace(config, **changed)
