"""The demo on the embedded model, with fewer steps."""

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from hotlora.base.records import find_records
from hotlora.papers.demo import CONDITIONS, CONFIG, PARTS, run_demo


def test_every_condition_ends_in_its_table_and_one_page(tmp_path: Path):
    config = dataclasses.replace(CONFIG, max_steps=2, batch_size=4)
    text = io.StringIO()
    console = Console(file=text, width=200)
    sizes = {"config": config, "train_examples": 16, "test_examples": 4, "console": console}
    page = run_demo("nano-choice", tmp_path, **sizes)
    found = find_records(tmp_path)
    records = {(f.parent.name, f.name): record for f, record in found.items() if f.name != "base"}
    assert set(records) == {(part, condition) for part in PARTS for condition in CONDITIONS} and len(found) == 9
    assert all(record["status"] == "done" for record in found.values())
    # One profile for all, the same data, and a quarter of the experts where there is a budget.
    assert len({record["profile"]["hash"] for record in records.values()}) == 1
    assert len({record["data"]["hash"] for record in records.values()}) == 1
    for part, (_, is_whole, _) in PARTS.items():
        counts = {condition: records[part, condition]["parameters"] for condition in CONDITIONS}
        every = counts["all"]["experts"] / 4
        assert [counts[condition]["experts"] for condition in CONDITIONS[1:]] == [every] * 3
        assert all((count["attention"] > 0) == (count["router"] > 0) == is_whole for count in counts.values())
    for adapted, _, _ in PARTS.values():
        assert f"LoRA on {adapted}" in text.getvalue() and f"LoRA on {adapted}" in page.read_text()
    assert page.is_file() and str(page.resolve()) in text.getvalue()
    for name in ("base", "all", "hot 25%", "random 25%", "cold 25%"):
        assert name in text.getvalue() and name in page.read_text()
    # Run again, nothing is trained anew.
    changed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.safetensors")}
    run_demo("nano-choice", tmp_path, **sizes)
    assert changed == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.safetensors")}
