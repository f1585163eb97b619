"""docs/memory.md is what scripts/memory.py makes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hotlora.cli.main import app
from hotlora.cost.estimate import step_of
from hotlora.cost.memory import memory

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("memory")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def olmoe_file(tmp_path_factory):
    """Two layers of it: as quick as nano, and as large as a card's."""
    config = json.loads((ROOT / "benchmarks" / "configs" / "olmoe-1b-7b" / "config.json").read_text())
    file = tmp_path_factory.mktemp("olmoe") / "config.json"
    file.write_text(json.dumps(config | {"num_hidden_layers": 2}))
    return file


@pytest.fixture(scope="module")
def olmoe(olmoe_file):
    return step_of(olmoe_file, batch_size=16, max_length=2048, fraction=0.25, r=16, padded=True)


def test_each_way_on_the_page_fits_its_card(script, olmoe):
    rows = [line.split(" | ") for line in script.models_table({"OLMoE": olmoe}).splitlines()[2:]]
    assert len(rows) == len(script.CARDS)
    speeds = []
    for row, card in zip(rows, script.CARDS, strict=True):
        assert float(row[8]) <= script.ROOM * card.memory / 1e9
        size, steps = map(int, row[4].split(" × "))
        assert size * steps == script.EXAMPLES
        speeds.append(float(row[10].replace(",", "")))
    assert speeds == sorted(speeds)  # larger cards are faster here


def command(config, row, *more):
    """What the page's command says with a row's sizes."""
    words = ["params", str(config), "--fraction", "0.25", "--r", "16", "--max-length", "2048", *more, "--json"]
    result = CliRunner().invoke(app, [*words, "--fit", row[1].replace(" ", ""), "--host", row[7]])
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)["fit"]


def check(row, found):
    chosen, memory = {"quantize": None, "offload": "none", **found["chosen"]}, found["memory"]
    batch = f"{chosen.get('batch_size', 16)} × {chosen.get('gradient_accumulation_steps', 1)}"
    bits = {None: ("16 bits", "MXFP4"), 8: ("8 bits",), 4: ("4 bits",)}[chosen["quantize"]]
    assert row[2] in bits and (row[3], row[4]) == (chosen["offload"], batch)
    assert (row[5] == "yes") == ("gradient_checkpointing" in chosen)
    assert float(row[8]) == round(memory["total"] / 1e9, 1)
    assert row[9] == (f"{memory['host'] / 1e9:.1f}" if memory["host"] else "–")


def test_a_row_is_what_the_command_says(script, olmoe, olmoe_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = [line.split(" | ") for line in script.models_table({"OLMoE": olmoe}).splitlines()[2:]]
    for row in rows:
        check(row, command(olmoe_file, row))


def page_rows(script):
    """Of the page's first table."""
    lines = script.PAGE.read_text(encoding="utf-8").split(script.MARK.format("models"))[1].split("<!--")[0].splitlines()
    return {(row[0], row[1]): row for row in (line.strip("| ").split(" | ") for line in lines if " | " in line)}


@pytest.mark.parametrize("model", ["OLMoE-1B-7B", pytest.param("gpt-oss-120b", marks=pytest.mark.slow)])
def test_a_row_of_the_page_is_what_the_command_says(script, model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    row = page_rows(script)[model, "12 GB"]
    small = ["--quantize-linear", "4", "--optim", "paged_adamw_8bit"] if row[6] == "small" else []
    check(row, command(script.CONFIGS / script.MODELS[model], row, *small))


def test_the_page_has_a_place_for_each_table(script, olmoe):
    text = script.PAGE.read_text(encoding="utf-8")
    found = dict.fromkeys(script.MODELS, olmoe)
    made = script.page(text, found)
    assert script.page(made, found) == made
    end = importlib.import_module("marks").END
    assert made.count(end) == text.count(end) == 2
    for goal in script.ASKED:
        assert f"| {goal.model} |" in text


def test_a_packed_checkpoint_is_counted_as_it_is_stored(script, tmp_path):
    """gpt-oss: 4 bits and a byte for 32 of them."""
    config = json.loads((ROOT / "benchmarks" / "configs" / "gpt-oss-20b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    step = step_of(tmp_path, batch_size=1, max_length=64, fraction=0.25, r=1)
    dense, packed = (
        memory(step, script.setups_of("x", step, script.CARDS[0], 1, quantize=bits).own.storage)["weights"]
        for bits in (0, None)
    )
    assert dense - packed == pytest.approx(step.expert_weights * (2 - 4.25 / 8), abs=2)


@pytest.mark.slow
def test_the_page_is_up_to_date(script):
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text, script.steps()) == text
