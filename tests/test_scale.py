"""The formulas of docs/scale.md: against the estimate on one GPU, the makers' numbers, and sums made by hand."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from hotlora.adapter.count import parameters_from_config
from hotlora.base.errors import HotLoraError
from hotlora.cost.cluster import (
    H100,
    H200,
    LAYOUTS,
    Machine,
    Work,
    expert_groups,
    imbalance,
    memory,
    seconds,
    smallest,
    traffic,
    work,
)
from hotlora.cost.estimate import estimate

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "benchmarks" / "configs"
GPUS = (1, 2, 4, 8, 16, 32, 64)
# Round numbers: 4 experts of 100 bytes in each of 2 layers, 200 bytes besides.
HAND = Work(
    tokens=10, num_experts=4, top_k=2, moe_layers=2, row=8, experts=800, dense=200, largest_layer=450, largest_dense=50,
    head=40, trainable=100, activations=1000, expert_row=30, live_layers=1, workspace=500, passes=3,
    expert_flops=4000.0, other_flops=1000.0,
)  # fmt: skip
UNIT = Machine("hand", 1e4, 1000.0, 100.0, 10.0, 1.0, {"torch": 0.5}, link_share=0.5, memory_share=1.0)


@pytest.fixture(scope="module")
def nano():
    options = {"batch_size": 2, "max_length": 128, "r": 8}
    return {fraction: work("nano", fraction=fraction, **options) for fraction in (0.25, None)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantize", [None, 4])
def test_on_one_gpu_it_is_the_estimate(checkpointing, quantize):
    options = {"batch_size": 2, "max_length": 128, "fraction": 0.25, "r": 8, "quantize": quantize, "device": "cpu"}
    found = estimate("nano", gradient_checkpointing=checkpointing, **options)
    one = work("nano", gradient_checkpointing=checkpointing, **options)
    for layout in LAYOUTS:
        got = memory(one, 1, layout)
        assert got.pop("gathered") == 0
        assert got == pytest.approx(found["memory"])
        assert sum(traffic(one, 1, layout).values()) == 0
    assert one.weights == found["memory"]["weights"]
    assert one.flops == pytest.approx(found["flops"]["step"])
    # What checkpointing computes again: all layers' forward, and not the head's, which is after them.
    without = estimate("nano", **options)["flops"]
    extra = sum(without["forward_per_token"].values()) - without["forward_per_token"]["head"]
    again = (extra + without["adapter_per_token"]) * one.tokens
    assert one.flops - without["step"] == pytest.approx(checkpointing * again)


def test_trained_parameters_are_those_that_are_counted(nano):
    for fraction, one in nano.items():
        assert one.trainable == parameters_from_config("nano", fraction=fraction, r=8)["trainable"]


@pytest.mark.parametrize(
    ("folder", "billions", "layers"),
    [("mixtral-8x7b", 46.7, 32), ("qwen3-30b-a3b", 30.5, 48), ("gpt-oss-120b", 116.8, 36), ("deepseek-v3", 671.0, 58)],
)
def test_the_models_are_as_large_as_their_makers_say(folder, billions, layers):
    """Also the experts' part: 3 projections of width x expert width."""
    counts = parameters_from_config(CONFIGS / folder, fraction=0.25, train_attention=False, train_router=False)
    config = json.loads((CONFIGS / folder / "config.json").read_text())
    assert round((counts["total"] - counts["trainable"]) / 1e9, 1) == billions
    experts = config.get("num_local_experts") or config.get("num_experts") or config["n_routed_experts"]
    width, inner = config["hidden_size"], config.get("moe_intermediate_size") or config["intermediate_size"]
    assert counts["experts"] == layers * experts // 4 * 3 * 32 * (width + inner)


def test_memory_by_hand():
    two = memory(HAND, 2, "ddp")
    assert two == {
        "weights": 1000, "gathered": 0, "staging": 0, "adapter": 400, "gradients": 800, "optimizer": 800,
        "activations": 1000, "workspace": 500, "total": 4500, "host": 0, "disk": 0,
    }  # fmt: skip
    fsdp = memory(HAND, 2, "fsdp")
    assert (fsdp["weights"], fsdp["gathered"], fsdp["gradients"]) == (500, 2 * 450 + 40, 400)
    sharded = memory(HAND, 4, "sharded")
    assert (sharded["adapter"], sharded["gradients"], sharded["optimizer"]) == (100, 100, 200)
    # Loads are even at CV 0: each GPU gets as many rows as it sends, and keeps them as they come and go.
    ep = memory(HAND, 2, "ep", cv=0)
    assert (ep["weights"], ep["gathered"], ep["adapter"]) == (500, 2 * 50 + 40, 400)
    assert ep["activations"] == 1000 + 10 * 2 * 2 * 8
    # 16 GPUs: 4 in a node have an expert each, and 4 have the same one.
    assert memory(HAND, 16, "ep", cv=0)["gathered"] == 2 * 50 + 40 + 2 * 400 / 4


def test_traffic_by_hand():
    reduce = {2: 2 * 0.5 * 400, 4: 2 * 0.75 * 400}
    assert traffic(HAND, 2, "ddp") == {"gather": 0, "exchange": 0, "reduce": reduce[2]}
    assert traffic(HAND, 4, "fsdp") == {"gather": 0.75 * (2 * 1000 - 40), "exchange": 0, "reduce": reduce[4]}
    sharded = traffic(HAND, 4, "sharded")
    assert sharded == {"gather": 0.75 * (2 * 1000 - 40 + 2 * 400), "exchange": 0, "reduce": reduce[4] / 2}
    # 10 tokens x 2 experts x 8 bytes, there and back, 3 passes, 2 layers; half of it stays.
    ep = traffic(HAND, 2, "ep")
    assert ep == {"gather": 0.5 * (2 * 200 - 40), "exchange": 0.5 * 10 * 2 * 8 * 2 * 3 * 2, "reduce": reduce[2]}
    assert traffic(HAND, 8, "ep")["gather"] == 7 / 8 * (2 * 200 - 40) + 2 * 800 / 4 / 2


def test_seconds_by_hand():
    ddp = seconds(HAND, UNIT, 2, "ddp")
    # 5000 FLOP at 500/s take 10 s; three reads of 1000 bytes at 100/s take 30.
    assert ddp == {
        "compute": 30, "gather": 0, "exchange": 0, "reduce": 400 / 10 / 0.5, "optimizer": 28, "step": 80 + 28,
    }  # fmt: skip
    fast = dataclasses.replace(UNIT, bandwidth=1e9)
    assert seconds(HAND, fast, 1, "ddp")["step"] == pytest.approx(10, rel=1e-4)
    # Two nodes: each takes in half of 2 x 1000 - 40 through 8 ports of 1 byte/s; inside, 10 bytes/s a GPU.
    gather = seconds(HAND, fast, 16, "fsdp")["gather"]
    assert gather == pytest.approx(max(15 / 16 * 1960 / 10, 0.5 * 1960 / 8) / 0.5)
    # Two GPUs of a node: half of 1920 bytes at 10 bytes/s.
    ep = seconds(HAND, fast, 2, "ep", cv=0)
    assert ep["exchange"] == pytest.approx(960 / 10 / 0.5) and ep["compute"] == pytest.approx(10)
    assert ep["step"] == pytest.approx(max(10, ep["gather"] + ep["reduce"]) + ep["exchange"] + ep["optimizer"])
    uneven = seconds(HAND, fast, 2, "ep", cv=1)
    assert uneven["compute"] == pytest.approx((1000 + 4000 * imbalance(4, 2, 1.0)) / 500)


def test_tokens_between_nodes_take_the_gpus_own_port():
    wide = dataclasses.replace(HAND, num_experts=16)
    found = seconds(wide, UNIT, 16, "ep-wide", cv=0)["exchange"]
    assert found == pytest.approx(1920 * max(7 / 16 / 10, 8 / 16 / 1) / 0.5)
    assert expert_groups(16, 16, "ep") == (8, 2) and expert_groups(16, 16, "ep-wide") == (16, 1)
    assert expert_groups(8, 64, "ep-wide") == (8, 8) and expert_groups(60, 8, "ep") == (4, 2)


def test_imbalance():
    assert imbalance(8, 1) == 1 and imbalance(64, 8, 0.0) == pytest.approx(1)
    assert 1 < imbalance(64, 8, 0.5) < imbalance(64, 8, 1.0) < imbalance(64, 64, 1.0) < 64
    assert imbalance(256, 8) < imbalance(8, 8)  # more experts a GPU even out
    with pytest.raises(HotLoraError, match="parts is 3"):
        imbalance(8, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_gpus_and_fewer_experts(layout, nano):
    hot, every = nano[0.25], nano[None]
    for many in GPUS:
        assert memory(hot, many, layout)["total"] < memory(every, many, layout)["total"]
        assert seconds(hot, H100, many, layout)["step"] <= seconds(every, H100, many, layout)["step"]
        assert traffic(hot, many, layout)["reduce"] <= traffic(every, many, layout)["reduce"]
    for kind in ("weights", "optimizer"):
        sizes = [memory(hot, many, layout)[kind] for many in GPUS]
        assert sizes == sorted(sizes, reverse=True)
    sent = [sum(traffic(hot, many, layout).values()) for many in (1, 2, 4, 8)]
    assert sent == sorted(sent) and sent[0] == 0


def test_smallest():
    one = dataclasses.replace(HAND, experts=int(100e9), largest_layer=int(1e9))
    assert smallest(one, H100, "ddp", GPUS) is None and smallest(one, H200, "ddp", GPUS) == 1
    assert smallest(one, H100, "fsdp", GPUS) == 2


def test_the_time_model_foresees_the_steps_that_were_measured():
    """Floor, hot and all on an H200: within 3%, the error that docs/scale.md states."""
    record = json.loads((ROOT / "benchmarks" / "gpu" / "h200.json").read_text(encoding="utf-8"))
    rows = [row for row in record["contenders"] if row["kernels"] is not None]
    assert {row["kernels"] for row in rows} == set(H200.compute_shares) and H200.is_measured
    for row in rows:
        one = dataclasses.replace(
            HAND, other_flops=row["flops"], expert_flops=0.0, trainable=0, tokens=record["settings"]["tokens"]
        )
        found = seconds(one, H200, 1, "ddp", kernels=row["kernels"])["step"]
        assert 1000 * found == pytest.approx(row["milliseconds"]["step"], rel=0.03), row["name"]


def test_the_gpus_tables_are_those_of_their_record(script):
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert importlib.import_module("gpu").gpu_tables() in page


def test_what_was_not_measured_on_a_card_says_so(script):
    assert not H100.is_measured
    line = next(line for line in script.machines_table().splitlines() if "H100" in line)
    assert "assumed" in line and "measured" not in line


def test_kernels_that_do_not_exist():
    with pytest.raises(HotLoraError, match="kernels 'cutlass' do not exist: choose one of frozen, torch, triton"):
        seconds(HAND, H200, 1, "ddp", kernels="cutlass")


@pytest.mark.parametrize(("gpus", "layout", "message"), [(0, "ddp", "gpus is 0"), (2, "tp", "layout 'tp'")])
def test_errors(gpus, layout, message):
    for formula in (memory, traffic):
        with pytest.raises(HotLoraError, match=message):
            formula(HAND, gpus, layout)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("scale")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_the_formulas_are_what_processes_sent():
    """`python scripts/scale.py --measure`: gradients to the byte, weights but for a norm, tokens by their routing."""
    runs = json.loads((ROOT / "benchmarks" / "traffic" / "nano.json").read_text())["runs"]
    assert {run["layout"] for run in runs} == {"ddp", "fsdp", "ep"}
    for run in runs:
        wanted = traffic(Work(**run["work"]), run["processes"], run["layout"])
        for kind, close in (("reduce", 1e-9), ("gather", 1e-3), ("exchange", 0.02)):
            assert wanted[kind] == pytest.approx(run["sent"].get(kind, 0.0), rel=close), (run["layout"], kind)


def test_the_page_has_a_place_for_each_table_and_they_are_filled(script, nano):
    """With nano in the place of the four models: what is written is between the marks."""
    found = {"nano": {"all": nano[None], "hot": nano[0.25]}}
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    new = script.page(text, found)
    assert "### nano" in new and "### Mixtral-8x7B" not in new
    end = importlib.import_module("marks").END
    assert new.count(end) == text.count(end) == 11
    assert script.page(new, found) == new
    # What needs no model must be what is on the page.
    for name in ("settings", "machines", "memory", "gpu", "time", "traffic"):
        mark = script.MARK.format(name)
        assert text.split(mark)[1].split(end)[0] == new.split(mark)[1].split(end)[0], name


@pytest.mark.slow
def test_the_page_is_up_to_date(script):
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text, script.works()) == text
