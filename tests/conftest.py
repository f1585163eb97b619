"""Slow and GPU tests are listed as skipped unless asked for. What tests take can be recorded. A command, called."""

import functools
import gc
import io
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: each worker has a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("COLUMNS", None)  # xdist hands on its terminal's width, and the commands' console would keep it

import jinja2
import pytest
import torch
from interpreter import patch_once

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once()
# PEFT compiles the same template of a model card for each adapter that is saved: a tenth of a short training.
jinja2.Environment.compile = functools.lru_cache(maxsize=64)(jinja2.Environment.compile)  # type: ignore[method-assign]

SLOWEST = 25  # that are recorded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--record-durations", metavar="FILE", help="write what each file's tests take, as JSON")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not (path := config.getoption("--record-durations")):
        return
    tests: dict[str, float] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if hasattr(report, "duration"):  # of setup, call and teardown each
            tests[report.nodeid] = tests.get(report.nodeid, 0.0) + report.duration
    files: dict[str, float] = {}
    for test, seconds in tests.items():
        file = test.partition("::")[0]
        files[file] = files.get(file, 0.0) + seconds
    slowest = dict(sorted(tests.items(), key=lambda item: -item[1])[:SLOWEST])
    record = {
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "cores": os.cpu_count(),
        "tests": len(tests),
        "seconds": round(sum(tests.values())),
        "seconds of files": {f: round(s, 1) for f, s in sorted(files.items(), key=lambda item: -item[1])},
        "seconds of the slowest tests": {test: round(s, 1) for test, s in slowest.items()},
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported stays. Looked through at each collection, these half a million objects cost a tenth of all."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """So does what a file's tests have imported, for those of the next files."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        pytest_collection_finish()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process, which spares seconds of imports: (exit code, stdout, stderr)."""

    from hotlora.cli import main as cli

    def run_here(*words: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hotlora", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run_here
