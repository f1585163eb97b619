"""The demo on the embedded model, with fewer steps."""

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from hotlora.base.records import find_records
from hotlora.papers.demo import CONDITIONS, CONFIG, run_demo


def test_every_condition_ends_in_one_table_and_one_page(tmp_path: Path):
    config = dataclasses.replace(CONFIG, max_steps=2, batch_size=4)
    text = io.StringIO()
    console = Console(file=text, width=200)
    sizes = {"config": config, "train_examples": 16, "test_examples": 4, "console": console}
    page = run_demo("nano-choice", tmp_path, **sizes)
    records = {record["condition"]: record for record in find_records(tmp_path).values()}
    assert set(records) == {"base", *CONDITIONS} and all(r["status"] == "done" for r in records.values())
    # One profile for all, the same data, and a quarter of the experts where there is a budget.
    assert len({records[c]["profile"]["hash"] for c in CONDITIONS}) == 1
    assert len({records[c]["data"]["hash"] for c in CONDITIONS}) == 1
    trained = {c: records[c]["parameters"]["experts"] for c in CONDITIONS}
    assert trained["hot"] == trained["random"] == trained["cold"] == trained["all"] / 4
    assert page.is_file() and str(page.resolve()) in text.getvalue()
    for name in ("base", "all", "hot 25%", "random 25%", "cold 25%"):
        assert name in text.getvalue() and name in page.read_text()
    # Run again, nothing is trained anew.
    changed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.safetensors")}
    run_demo("nano-choice", tmp_path, **sizes)
    assert changed == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.safetensors")}
