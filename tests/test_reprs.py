"""What a prompt and a notebook show of profiles, plans, configs and comparisons: short, escaped, and right."""

import base64
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hotlora
from hotlora.base.records import new_record, write_record
from hotlora.report.comparison import compare_runs
from hotlora.report.paired import PairedRuns, PairedTask
from hotlora.routing.picture import CHOICE, LOADS, grid_html


def profile(num_layers: int = 3, num_experts: int = 8, **source: Any) -> hotlora.RoutingProfile:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (num_layers, num_experts), generator=generator)
    counts[0, min(1, num_experts - 1)] = 40_000  # above what the colours tell apart
    layers = tuple(range(1, num_layers + 1))
    return hotlora.RoutingProfile(layers, counts, counts.double(), 12_345, 2, source)


def pixels(page: str) -> tuple[list[tuple[int, int, int]], list[list[int]]]:
    """The palette and the rows of a page's picture, read as the PNG specification has it."""
    (data,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    content, chunks, at = base64.b64decode(data), {}, 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    flat = zlib.decompress(chunks[b"IDAT"])
    rows = [list(flat[row * (width + 1) + 1 : (row + 1) * (width + 1)]) for row in range(height)]
    palette = chunks[b"PLTE"]
    return [tuple(palette[i : i + 3]) for i in range(0, len(palette), 3)], rows  # type: ignore[misc]


def texts(page: str) -> list[str]:
    """Whatever stands in the page's picture, which must be well-formed."""
    return [element.text or "" for element in ElementTree.fromstring(page).iter() if element.tag.endswith("text")]


def test_a_profile():
    found = profile(model="nano", data="rows.jsonl")
    cv = found.mean_layer_cv()
    told = f"3 layers × 8 experts, top-2, 12,345 tokens, mean layer CV {cv:.2f}; model nano; data rows.jsonl"
    assert repr(found) == f"RoutingProfile({told})"
    page = found._repr_html_()
    assert told in page
    colors, levels = pixels(page)
    assert colors == list(LOADS)
    wanted = (found.shares() * 8 / 4 * 31).round().clamp(max=31)
    assert levels == wanted.int().tolist() and levels[0][1] == 31
    assert texts(page)[:6:2] == ["1", "2", "3"], "decoder indices"
    assert texts(page)[1] == f"CV {found.layer_cv()[0]:.2f}"


def test_a_profile_without_counts_or_source():
    nothing = torch.zeros(2, 4, dtype=torch.int64)
    found = hotlora.RoutingProfile((0, 1), nothing, nothing.double(), 0, 2)
    assert repr(found) == "RoutingProfile(2 layers × 4 experts, top-2, 0 tokens, mean layer CV nan)"
    assert pixels(found._repr_html_())[1] == [[0] * 4] * 2


def test_a_plan():
    plan = hotlora.select_experts(profile(), rule="hot", experts_per_layer=2)
    assert repr(plan) == "ExpertPlan(hot: 6 of 24 experts in 3 layers)"
    colors, levels = pixels(plan._repr_html_())
    assert colors == list(CHOICE)
    assert [tuple(i for i, level in enumerate(row) if level) for row in levels] == [*plan.experts.values()]
    uneven = hotlora.ExpertPlan({0: (1,), 2: (), 3: (0, 1, 2)}, 4, "manual", {}, ranks={0: (8,), 2: (), 3: (4, 4, 16)})
    assert repr(uneven) == "ExpertPlan(manual: 4 of 12 experts in 3 layers, 0 to 3 in each, ranks 4 to 16)"
    assert texts(uneven._repr_html_())[:6] == ["0", "1", "2", "0", "3", "3"], "layer, number of its experts"


def test_names_from_elsewhere_are_text():
    mean = "<script>alert(1)</script>&\x1b[2J\n" + "x" * 500
    found = profile(model=mean, data='"><img src=x>')
    plan = hotlora.ExpertPlan({0: (0,)}, 2, mean, {})
    for one in (found, plan):
        assert "\x1b" not in repr(one) and "\n" not in repr(one)
        page = one._repr_html_()
        assert "<script" not in page and "<img" not in page and "\x1b" not in page
        texts(page)


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 1), (60, 256), (94, 512)])
def test_size(num_layers: int, num_experts: int):
    found = profile(num_layers, num_experts)
    plan = hotlora.select_experts(found, rule="random")
    limit = 50_000 * max(1, num_layers * num_experts / (60 * 256))
    for one in (found, plan):
        assert len(one._repr_html_()) < limit and len(repr(one)) < 200


def test_a_grid_has_the_colour_of_the_page():
    page = grid_html("x", [0], [[0, 1]], CHOICE, [""], [])
    assert 'fill="currentColor"' in page and "color:" not in page and "background" not in page


def test_a_config():
    plan = hotlora.select_experts(profile(), experts_per_layer=2)
    short = "plan=ExpertPlan(hot: 6 of 24 experts in 3 layers), r=32, lora_alpha=64"
    assert repr(hotlora.HotLoraConfig(plan=plan)) == f"HotLoraConfig({short})"
    config = hotlora.HotLoraConfig(plan=plan, lora_dropout=0.05, train_router=False, rank_pattern={"a": 1})
    assert repr(config) == f"HotLoraConfig({short}, lora_dropout=0.05, rank_pattern={{'a': 1}}, train_router=False)"
    many = hotlora.HotLoraConfig(plan=plan, rank_pattern={str(i): 1 for i in range(100)})
    assert repr(many) == f"HotLoraConfig({short}, rank_pattern=<100 entries>)"


def test_a_config_on_a_model():
    model = hotlora.load_model("nano")
    counts = torch.ones(6, 32, dtype=torch.int64)
    plan = hotlora.select_experts(hotlora.RoutingProfile(tuple(range(6)), counts, counts.double(), 48, 4))
    adapted = peft.get_peft_model(model, hotlora.HotLoraConfig(plan=plan, r=4))
    assert len(repr(adapted.peft_config["default"])) < 250


def sweep(folder: Path) -> None:
    for condition, scores in {"all": (0.5, 0.6), "hot<b>": (0.4, 0.6)}.items():
        for seed, score in enumerate(scores):
            evaluation = {"t": {"metric": "exact_match", "accuracy": score, "n": 10, "correct": 10 * score}}
            record = new_record(
                name=condition, condition=condition, seed=seed, model={"name": "nano", "fingerprint": ""},
                data={"name": "t", "hash": "", "train": 1, "test": 10}, config={}, training={"loss_last": 1.0},
                evaluation=evaluation, sweep={"name": "s", "condition": condition},
            )  # fmt: skip
            write_record(folder / f"{condition[:3]}-{seed}", record | {"status": "done"})


def test_a_comparison(tmp_path: Path):
    sweep(tmp_path)
    found = compare_runs(tmp_path)
    assert repr(found) == "Comparison(score against all: t (2 conditions))"
    page = found._repr_html_()
    root = ElementTree.fromstring(page)
    cells = [cell.text for cell in root.iter("td")]
    assert "hot<b>" in cells and "50.00 ± 14.14" in cells and "<b>" not in page.replace("<b>s, t", "")
    assert len(list(root.iter("tr"))) == 3 and 'style="color' not in page
    assert hotlora.compare_runs is compare_runs


def test_two_runs():
    task = PairedTask("t", "exact_match", 10, 50.0, 40.0, 10.0, None, None, ("a & b",))
    found = PairedRuns("runs/a", "runs/<b>", (task,), ())
    assert repr(found) == "PairedRuns(runs/a − runs/<b>: t +10.00 points, cannot tell)"
    page = found._repr_html_()
    assert "A: runs/a, B: runs/&lt;b&gt;" in page and '<td style="text-align: right">50.00</td>' in page
    assert "a &amp; b" in page
