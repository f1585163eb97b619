"""docs/python.md and the notebooks of examples/ run from their first line to their last, on nano."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.logging import disable_progress_bar

import hotlora
from hotlora.plots import Figure

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def execute(code: str, names: dict[str, Any], place: str) -> Any:
    """Runs code as a notebook does, and gives the value that it would show: that of a last expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, place, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), place, "eval"), names)


def shown(value: Any) -> str:
    """What a notebook draws of it."""
    if isinstance(value, Figure):
        assert value._repr_png_().startswith(b"\x89PNG")
        return "a figure"
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    disable_progress_bar()
    return tmp_path


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_itself(book: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    names: dict[str, Any] = {}
    seen = []
    for number, cell in enumerate(json.loads(book.read_text("utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            value = execute("".join(cell["source"]), names, f"{book.name}, cell {number + 1}")
            seen.append("" if value is None else shown(value))
    assert sum(page.startswith("<div>") for page in seen) >= 2, "a profile and a plan"
    assert "a figure" in seen
    assert isinstance(names["run"], hotlora.Run) and names["run"].record["status"] == "done"
    assert not list((ROOT / "examples").glob("runs")), "what it writes goes where it is started"


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_plain(book: Path):
    """Without outputs and counts; of nbformat 4.5, whose cells have ids; and listed."""
    content = json.loads(book.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and content["cells"][0]["cell_type"] == "markdown"
    for cell in content["cells"]:
        assert cell["metadata"] == {} and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert not re.search(r"^\s*[%!]", "".join(cell["source"]), re.M), "plain Python runs anywhere"
    assert f"[{book.name}]({book.name})" in (ROOT / "examples" / "README.md").read_text("utf-8")


def test_both_notebooks_are_there():
    assert [book.name for book in NOTEBOOKS] == ["choosing_experts.ipynb", "first_steps.ipynb"]


def test_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        execute(block, names, f"docs/python.md, block {number}")
    assert "Run('runs/sums': hot 25%, done, 20 steps, loss" in capsys.readouterr().out
    assert names["chosen"].plan.hash == hotlora.ExpertPlan.load("runs/plan.json").hash
    assert Path("heat-map.png").stat().st_size > 5000
