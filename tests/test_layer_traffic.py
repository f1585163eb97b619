"""What a routed layer does on a GPU, counted: benchmarks/layer_traffic.py."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


traffic = load_script("layer_traffic")
pytest.importorskip("triton", reason="Triton is not installed (pip install triton): its launches cannot be counted")
SIZES = traffic.Sizes()


@pytest.fixture(scope="module")
def counts():
    with mock.patch.dict(os.environ, {"HOTLORA_KERNELS": "fused"}):
        return {name: traffic.measure(SIZES, name).as_dict(SIZES) for name in ("floor", "hot", "all")}


def test_the_floor_is_what_transformers_does(counts):
    """Products read rows and weights once and write rows: two forward, two for gradients, nothing for weights."""
    floor, rows, width = counts["floor"], 8, 2048 * 2
    assert floor["kernels"]["_grouped_mm"] == 4
    products = 2 * (2 * rows * width + 64 * 2048 * width / SIZES.tokens) + 2 * (
        1.5 * rows * width + 32 * 2048 * width / SIZES.tokens
    )
    assert products == 2 * (65536 + 32768) + 2 * 65536
    assert floor["bytes"] > products and 20 <= floor["launches"] <= 40


def test_hot_experts_are_within_the_targets(counts):
    """At most 16 launches and 0.55 of the floor's bytes, and nothing of torch's on arrays of all rows."""
    floor, hot, every = (counts[name] for name in ("floor", "hot", "all"))
    assert hot["launches"] <= 16 and every["launches"] <= 16
    assert hot["bytes"] <= 0.55 * floor["bytes"] and every["bytes"] <= 0.55 * floor["bytes"]
    assert hot["torch_on_rows"] == every["torch_on_rows"] == 0


def test_an_operation_more_is_noticed():
    count = traffic.Count()
    x = torch.ones(SIZES.rows, 16)
    with traffic.TorchOperations(SIZES, count):
        y = x.view(-1, 4).view(x.shape).t().t()  # views launch nothing
        torch.empty(3)
    assert not count.kernels
    with traffic.TorchOperations(SIZES, count):
        y = y * 2
        y += x
        x.index_select(0, torch.arange(SIZES.rows))
        x.expand(3, *x.shape).sum()
    size = x.nbytes
    found = [(k.name, k.read, k.written, k.is_torch_on_rows) for k in count.kernels]
    assert found == [
        ("mul", size, size, True),
        ("add_", 2 * size, size, True),
        ("arange", 0, SIZES.rows * 8, True),
        ("index_select", size + SIZES.rows * 8, size, True),
        ("sum", size, 4, False),
    ]


@pytest.mark.parametrize("products", ["", "torch", "triton", "fused"])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_masks_and_no_scatters_over_rows(monkeypatch, products, capability):
    monkeypatch.setenv("HOTLORA_KERNELS", products)
    if capability == 80 and products == "torch":
        pytest.skip("there torch's loop asks the device, which has no values here")
    kernels = traffic.measure(traffic.Sizes(capability=capability), "hot").as_dict(SIZES)["kernels"]
    assert not {"masked_fill", "masked_fill_", "index_add_", "index_add", "where"} & kernels.keys()
    assert kernels.get("index_copy_", 0) <= 2  # of an expert's slots, not of rows


def test_the_record_is_what_the_command_says_now(counts):
    record = json.loads((ROOT / "benchmarks" / "traffic" / "layer.json").read_text(encoding="utf-8"))
    of = record["environment"]["torch"]
    if Version(torch.__version__) < Version(Version(of).base_version):
        pytest.skip(f"the record is of torch {of}, whose AdamW and sorting take fewer launches than this one's")
    assert {name: record[name] for name in counts} == counts
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for count in counts.values():
        assert f"{count['bytes']:,}" in page


def test_kernels_write_what_the_count_says(monkeypatch):
    """Under Triton's interpreter: of every launch of a layer the arrays that change, and of those for hot experts
    their rows alone."""
    from test_experts import make_experts, make_factors, make_inputs
    from test_kernels import on_device

    from hotlora.hf.experts_view import ExpertsView
    from hotlora.layer import gpu
    from hotlora.layer.function import routed_experts_by
    from hotlora.layer.kernels import launch as launching

    monkeypatch.setenv("HOTLORA_KERNELS", "fused")
    launch, seen = launching.launch, set()

    def watched(kernel, grid, x, blocks, /, **given):
        name = traffic._function(kernel).__name__
        arrays = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
        written = {key for key in arrays if traffic.ROLES[name](key, given)[0][0] == "w"}
        for key in written:
            arrays[key].fill_(float("nan") if arrays[key].is_floating_point() else -7)
        before = {key: value.clone() for key, value in arrays.items() if key not in written}
        launch(kernel, grid, x, blocks, **given)
        for key, value in before.items():
            assert torch.equal(value.nan_to_num(), arrays[key].nan_to_num()), (name, key)
        for key in written:
            value = arrays[key]
            is_made = ~value.isnan() if value.is_floating_point() else value != -7
            if traffic.ROLES[name](key, given)[0][1] == "all":
                assert is_made.all(), (name, key)
            else:
                slots = launching.plain_slots(given["ids"], given["ends"], len(value))
                assert torch.equal(is_made, (slots >= 0)[:, None].expand_as(value)), (name, key)
        seen.add(name)

    monkeypatch.setattr(launching, "launch", watched)
    hidden, index, weights = map(on_device, make_inputs(torch.float32))
    factors, device = on_device(make_factors([1, 3, 6], 8, torch.float32)), hidden.device
    experts = make_experts(torch.float32).to(device)
    output = routed_experts_by(gpu, ExpertsView(experts), hidden, index, weights, [factors])
    torch.autograd.grad(output.sum(), [hidden, weights, *factors.tensors])
    assert seen == set(traffic._WRITTEN)
