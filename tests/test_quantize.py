"""Experts in 4 and 8 bits: the same numbers as their dequantized weights give, without ever keeping those."""

import copy
import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import peft
import pytest
import torch
from runs import run_evaluation, run_training
from tiny import tiny_batch, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner
from zoo import families, zoo_model

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters
from hotlora.adapter.load import load_adapter
from hotlora.adapter.quantize import ExpertsQuantization, QuantizedExperts, quantize_experts
from hotlora.adapter.quantized import bitsandbytes_functional
from hotlora.adapter.stored import expert_bytes, quantized_bits, quantized_parameters, warn_if_experts_unquantized
from hotlora.base.errors import FileError, HotLoraError, ModelError, PlanError
from hotlora.cli.main import app
from hotlora.evaluation.score import response_loss
from hotlora.hf.experts_view import FrozenWeight
from hotlora.hf.models import load_model
from hotlora.hf.moe_layers import moe_layers
from hotlora.layer import cpu, gpu
from hotlora.routing.plan import ExpertPlan
from hotlora.runs.checks import check_run
from hotlora.runs.evaluation import run_harness
from hotlora.runs.methods import resolve
from hotlora.runs.options import EvalOptions
from hotlora.runs.sweep import Condition, Sweep, sweep_jobs
from hotlora.tasks import Example
from hotlora.tasks.tokens import tokenize
from hotlora.training.config import TrainConfig

# One of each layout: the usual one; transposed; transposed, interleaved, with biases; no gate; a norm after.
LAYOUTS = sorted({"olmoe", "aria_text", "gpt_oss", "nemotron_h", "muse_spark"} & families().keys())
# Of normal weights; a block of 64 has 0.092 and 0.006.
WEIGHT_ERROR = {4: 0.10, 8: 0.0065}

bits_4_8 = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(autouse=True)
def _needs_bitsandbytes(request):
    if "without_bitsandbytes" not in request.node.name:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install hotlora[quantize]")


def random_weight(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.02


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def experts_of(model) -> list:
    return [model.get_submodule(layer.experts) for layer in moe_layers(model)]


@bits_4_8
@pytest.mark.parametrize("shape", [(4, 64, 128), (3, 16, 8), (3, 10, 7), (2, 1, 3)])
def test_every_weight_comes_back(bits, shape):
    """Also where an expert is no whole number of blocks, and where a row is shorter than a block: there the
    kernel of bitsandbytes for the CPU gives wrong numbers, unless it is asked the way that we do."""
    weight = random_weight(*shape)
    holder = QuantizedExperts.from_weight(weight, bits)
    dense = holder.dequantize()
    assert dense.shape == weight.shape == holder.shape
    half = (0.16 if bits == 4 else 0.5 / 127) + 2**-9  # of the widest gap; and half of a bfloat16 scale's last bit
    step = weight.flatten(1).abs().amax(1) * half
    assert ((dense - weight).flatten(1).abs().amax(1) <= step * 1.001).all()
    if weight.numel() > 1000:
        assert relative(dense, weight) < WEIGHT_ERROR[bits]


@bits_4_8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_weights_there_are_stay_finite(bits, dtype):
    weight = torch.full((1, 8, 8), torch.finfo(dtype).max, dtype=dtype)
    dense = QuantizedExperts.from_weight(weight, bits).dequantize()
    assert dense.isfinite().all() and relative(dense, weight) < 0.01


@bits_4_8
def test_single_experts(bits):
    holder = QuantizedExperts.from_weight(random_weight(6, 24, 16), bits)
    dense = holder.dequantize()
    assert torch.equal(holder.expert(4), dense[4]) and torch.equal(holder.expert(0), dense[0])
    alone = QuantizedExperts.from_weight(random_weight(6, 24, 16)[2:3], bits)
    assert torch.equal(alone.expert(0), dense[2])  # an expert's numbers do not depend on its neighbours


@pytest.mark.parametrize(("bits", "bytes_each"), [(4, 0.53125), (8, 1.03125)])
def test_bytes(bits, bytes_each):
    holder = QuantizedExperts.from_weight(random_weight(4, 64, 128), bits)
    assert holder.nbytes == bytes_each * holder.numel() and holder.numel() == 4 * 64 * 128
    assert not list(holder.parameters())


@bits_4_8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype_changes_what_comes_out_and_not_what_is_kept(bits, dtype):
    holder = QuantizedExperts.from_weight(random_weight(4, 32, 16), bits)
    exact = holder.dequantize()
    stored = {name: tensor.clone() for name, tensor in holder.state_dict().items() if name != "kept"}
    holder.to(dtype)
    assert holder.dtype == holder.dequantize().dtype == dtype
    assert torch.equal(holder.dequantize(), exact.to(dtype))
    assert all(torch.equal(holder.state_dict()[name], tensor) for name, tensor in stored.items())
    assert torch.equal(holder.float().dequantize(), exact)


def test_quantized_from_half_precision():
    weight = random_weight(4, 32, 16, dtype=torch.bfloat16)
    holder = QuantizedExperts.from_weight(weight, 8)
    assert holder.dtype == torch.bfloat16 and relative(holder.dequantize(), weight) < 0.008


# Rows of five experts: some without any, one alone, none at all.
SIZES = [(3, 0, 4, 1, 0), (0, 0, 0, 0, 6), (0, 0, 0, 0, 0)]


def rows_of(products, sizes, num_elsewhere=0):
    """The sorted rows of a layer with so many for each expert, and on other processes."""
    experts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    index_T1 = torch.cat([experts, torch.full((num_elsewhere,), len(sizes))]).unsqueeze(1)
    (rows,) = products.Rows.blocks(len(sizes), index_T1, 1, True)
    return rows, experts


@bits_4_8
@pytest.mark.parametrize("keep", [(), (2, 4)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("products", [cpu, gpu])
def test_a_product_is_a_loop_over_dequantized_experts(products, bits, keep, sizes, tail, transposed):
    """And with the weights transposed, which makes the input's gradient."""
    shape = (5, 16, 24) if transposed else (5, 24, 16)
    holder = QuantizedExperts.from_weight(random_weight(*shape), bits, keep)
    weight, dense = FrozenWeight(holder, transposed), holder.dequantize()
    weights_EOI = dense.transpose(1, 2) if transposed else dense
    rows, experts = rows_of(products, sizes, tail)
    for its, weights in ((weight, weights_EOI), (weight.T, weights_EOI.transpose(1, 2))):
        x = random_weight(sum(sizes) + tail, weights.shape[2], seed=1)
        x[sum(sizes) :] = torch.nan  # rows of experts on other devices may hold anything
        got = rows.product(x, its)
        assert got.shape == (len(x), weights.shape[1]) and not got[sum(sizes) :].any()
        for s, expert in enumerate(experts):
            torch.testing.assert_close(got[s], weights[expert] @ x[s], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_half_precision(dtype):
    holder = QuantizedExperts.from_weight(random_weight(2, 24, 16, dtype=dtype), 4)
    x, dense = random_weight(6, 16, dtype=dtype, seed=1), holder.dequantize().double()
    y = rows_of(cpu, (2, 4))[0].product(x, FrozenWeight(holder, False))
    exact = torch.cat([x[:2].double() @ dense[0].T, x[2:].double() @ dense[1].T])
    assert y.dtype == dtype and relative(y, exact) < 0.01


def test_a_cpu_makes_one_expert_dense_at_a_time_and_none_without_rows(monkeypatch):
    shape, made, alive = (4, 96, 80), [], []
    holder = QuantizedExperts.from_weight(random_weight(*shape), 4)
    expert = holder.expert

    def watched(number: int) -> Tensor:
        alive.append(sum(reference() is not None for reference in made))
        weight = expert(number)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(holder, "expert", watched)
    rows_of(cpu, (2, 0, 4, 1))[0].product(random_weight(7, 80), FrozenWeight(holder, False))
    assert alive == [0, 0, 0]


def test_no_dense_weight_outlives_the_layers_forward_or_backward():
    """Nor is one kept for backward: a layer keeps what it keeps in bfloat16."""
    model = zoo_model("olmoe")
    quantize_experts(model, 4)
    (layer, *_) = moe_layers(model)
    experts = model.get_submodule(layer.experts)
    width = experts.down_proj.shape[1]
    shapes = {holder.shape[1:] for holder in experts.children() if isinstance(holder, QuantizedExperts)}
    shapes |= {torch.Size(shape[::-1]) for shape in shapes}
    saved: list[Tensor] = []
    x = random_weight(8, width, seed=1).requires_grad_()

    def dense_ones() -> list[Tensor]:
        alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        return [t for t in (*saved, *alive) if t.is_floating_point() and t.shape[-2:] in shapes and t.ndim < 4]

    before = len(dense_ones())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = experts(x, torch.arange(8).remainder(4).view(8, 1), torch.ones(8, 1))
    assert len(dense_ones()) == before
    y.sum().backward()
    assert x.grad is not None and len(dense_ones()) == before


@pytest.mark.parametrize("family", LAYOUTS)
@bits_4_8
def test_a_quantized_model_computes_with_its_dequantized_weights(family, bits):
    model = zoo_model(family)
    dense = copy.deepcopy(model)
    before = expert_bytes(model)
    assert quantized_bits(model) is None
    assert quantize_experts(model, bits) is model
    assert quantized_bits(model) == bits
    assert expert_bytes(model) == pytest.approx(before * (bits / 8 + 1 / 32) / 4)
    total = sum(p.numel() for p in dense.parameters())
    assert sum(p.numel() for p in model.parameters()) + quantized_parameters(model) == total
    for plain, quantized in zip(experts_of(dense), experts_of(model), strict=True):
        names = {name for name, _ in quantized.named_children()} & {"gate_up_proj", "up_proj", "down_proj"}
        assert len(names) == 2
        for name in names:
            weight, holder = getattr(plain, name), getattr(quantized, name)
            assert (holder.shape, holder.dtype, holder.device) == (weight.shape, weight.dtype, weight.device)
            weight.data = holder.dequantize()
    batch = tiny_batch(vocab_size=100)
    with torch.no_grad():
        got, expected = model(**batch).logits, dense(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_state_dict_and_copies():
    model = quantize_experts(tiny_model(), 4)
    other = quantize_experts(tiny_model(seed=1), 4)
    other.load_state_dict(model.state_dict())
    batch = tiny_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(other(**batch).logits, expected)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
        assert model.to(torch.bfloat16)(**batch).logits.dtype == torch.bfloat16
        assert relative(model(**batch).logits, expected) < 0.1


@bits_4_8
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_quantized_while_loading(tmp_path, family, bits):
    """The same model as quantized afterwards, from a checkpoint that holds experts one by one."""
    tiny_model(family).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", quantization_config=ExpertsQuantization(bits))
    expected = quantize_experts(load_model(tmp_path, device="cpu"), bits)
    assert quantized_bits(model) == bits and not model.training
    state, want = model.state_dict(), expected.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)
    batch = tiny_batch()
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    assert getattr(model.config, "quantization_config", None) is None


def test_loading_makes_no_projection_dense(tmp_path, monkeypatch):
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path)
    shapes = {(8, 32, 32), (8, 32, 16)}
    gc.collect()
    before = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    most = 0
    quantize = QuantizedExperts.from_weight.__func__

    def watch(cls, weight, bits, keep):
        nonlocal most
        known = {id(t) for t in before}
        alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and id(t) not in known]
        dense = [t for t in alive if tuple(t.shape) in shapes and t.is_floating_point() and t.device.type == "cpu"]
        most = max(most, len({t.data_ptr() for t in dense}))
        assert len(weight) == 8 and weight[3].shape in {shape[1:] for shape in shapes}
        return quantize(cls, weight, bits, keep)

    monkeypatch.setattr(QuantizedExperts, "from_weight", classmethod(watch))
    load_model(tmp_path, device="cpu", quantization_config=ExpertsQuantization(4))
    assert most == 0


@bits_4_8
@pytest.mark.parametrize("keep", [(2,), (0, 3, 5), (0, 1, 2, 3, 4)])
def test_kept_experts_are_bitwise_what_they_were(bits, keep):
    weight = random_weight(6, 24, 16)
    holder, whole = QuantizedExperts.from_weight(weight, bits, keep), QuantizedExperts.from_weight(weight, bits)
    for expert in range(6):
        wanted = weight[expert] if expert in keep else whole.expert(expert)
        assert torch.equal(holder.expert(expert), wanted) and torch.equal(holder.dequantize()[expert], wanted)
    # By formula: 16 or 32 bits of what is kept, and what is quantized as without it.
    assert holder.nbytes == len(keep) * 24 * 16 * 4 + (6 - len(keep)) * 24 * 16 * (bits / 8 + 1 / 32)
    assert holder.numel() == weight.numel() and holder.to(torch.bfloat16).dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("family", LAYOUTS)
def test_only_cold_experts_are_quantized(family):
    """A token whose experts are all kept computes as without quantization; memory is that of the formula."""
    model = zoo_model(family)
    dense, before = copy.deepcopy(model), expert_bytes(model)
    layers = moe_layers(model)
    keep = {layer.layer: tuple(range(layer.num_experts // 2)) for layer in layers}
    quantize_experts(model, 4, keep)
    biases = sum(p.nbytes for e in experts_of(dense) for n, p in e.named_parameters(recurse=False) if "bias" in n)
    assert biases >= 0 and expert_bytes(model) == pytest.approx(before * (0.5 + 0.5 * (4 / 8 + 1 / 32) / 4))
    for layer, plain, quantized in zip(layers, experts_of(dense), experts_of(model), strict=True):
        for name, holder in quantized.named_children():
            if isinstance(holder, QuantizedExperts):
                half, weight = layer.num_experts // 2, getattr(plain, name)
                assert torch.equal(holder.dequantize()[:half], weight[:half])
                assert 0 < relative(holder.dequantize()[half:], weight[half:]) < 0.2
        width = plain.down_proj.shape[2 if plain.is_transposed else 1]
        x = random_weight(7, width, seed=3)
        hot, mixed = torch.zeros(7, 2, dtype=torch.int64), torch.arange(14).view(7, 2) % layer.num_experts
        weights = torch.full((7, 2), 0.5)
        with torch.no_grad():
            torch.testing.assert_close(quantized(x, hot, weights), plain(x, hot, weights), rtol=1e-5, atol=1e-6)
            assert relative(quantized(x, mixed, weights), plain(x, mixed, weights)) > 1e-3


def test_a_layer_that_is_kept_in_whole_stays_as_it_was():
    model = tiny_model()
    layers = moe_layers(model)
    quantize_experts(model, 8, {layers[0].layer: tuple(range(layers[0].num_experts))})
    first, second = experts_of(model)
    assert isinstance(first.down_proj, Tensor) and isinstance(second.down_proj, QuantizedExperts)
    assert model(**tiny_batch()).logits.isfinite().all()


@pytest.mark.parametrize("keep", [{9: (0,)}, {0: (99,)}, {0: (-1,)}])
def test_kept_experts_that_are_not_there(keep):
    model = tiny_model()
    with pytest.raises(PlanError, match="keep names"):
        quantize_experts(model, 4, keep)
    assert quantized_bits(model) is None


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_cold_experts_quantized_while_loading(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path)
    keep = {0: (1, 2), 1: (0,)}
    model = load_model(tmp_path, device="cpu", quantization_config=ExpertsQuantization(4, keep))
    expected = quantize_experts(load_model(tmp_path, device="cpu"), 4, keep)
    state, want = model.state_dict(), expected.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)
    assert torch.equal(model(**tiny_batch()).logits, expected(**tiny_batch()).logits)


def test_a_run_with_only_cold_experts_quantized(tmp_path):
    """What is scored is the adapter on a base whose chosen experts are as in the checkpoint."""
    tiny_model(vocab_size=259, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i} and {i % 7}", "completion": f" make {i + i % 7}"} for i in range(24)]
    for name, some in (("train", rows[:16]), ("test", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    config = TrainConfig(max_steps=3, batch_size=4, r=4, lora_alpha=8, max_length=64, learning_rate=3e-3)
    files = {"model": str(tmp_path / "model"), "data": str(tmp_path / "train.jsonl"), "config": config, "device": "cpu"}
    run = tmp_path / "run"
    options = {"fraction": 0.5, "test_data": str(tmp_path / "test.jsonl"), "quantize": 4, "keep_hot": True}
    record = run_training(**files, output=run, **options)
    assert record["config"]["keep_hot"] is True

    examples = [Example(row["prompt"], row["completion"]) for row in rows[16:]]
    losses = {}
    for name, keep in (("cold", ExpertPlan.load(run / "plan.json").experts), ("all", None)):
        base = load_model(tmp_path / "model", device="cpu", quantization_config=ExpertsQuantization(4, keep))
        adapted = load_adapter(base, run / "adapter")
        losses[name] = response_loss(adapted, byte_tokenizer(), tokenize(examples, byte_tokenizer(), 64))
    assert record["training"]["test_loss"] == pytest.approx(losses["cold"], rel=1e-6)
    assert losses["cold"] != losses["all"]

    # A plan that is given is kept from the start, and the run is the same.
    given = run_training(
        **files,
        output=tmp_path / "given",
        plan=run / "plan.json",
        **{name: value for name, value in options.items() if name != "fraction"},
    )
    assert given["training"]["test_loss"] == record["training"]["test_loss"]
    with pytest.raises(HotLoraError, match="give quantize"):
        run_training(**files, output=tmp_path / "wrong", keep_hot=True)


@pytest.fixture(scope="module")
def trained_on_4_bits(tmp_path_factory) -> Path:
    """A run's folder: nano's adapter on experts alone, with the cold ones in 4 bits."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    config = TrainConfig(
        max_steps=8, batch_size=8, r=4, lora_alpha=8, max_length=128, learning_rate=2e-2,
        train_attention=False, train_router=False,
    )  # fmt: skip
    run_training(
        "nano", "nano-choice", folder, config=config, fraction=0.25, limit=64, test_limit=10, device="cpu", quantize=4,
        keep_hot=True,
    )  # fmt: skip
    return folder


def test_an_adapter_says_what_it_was_trained_on(trained_on_4_bits):
    plan = ExpertPlan.load(trained_on_4_bits / "plan.json").experts
    found = hotlora.base_quantization(trained_on_4_bits / "adapter")
    assert found is not None and (found.bits, found.keep) == (4, plan)
    model = load_adapter(load_model("nano", device="cpu", quantization_config=found), trained_on_4_bits / "adapter")
    assert all(experts.get_base_layer().down_proj.kept_ids == plan[i] for i, experts in enumerate(experts_of(model)))


def test_an_adapter_is_scored_on_what_it_was_trained_on(trained_on_4_bits, tmp_path):
    """As the run itself did; other bases are asked for, and give other numbers."""
    adapter = trained_on_4_bits / "adapter"
    results = {"train": (trained_on_4_bits / "results-nano-choice.jsonl").read_text()}
    for name, options in {
        "own": {}, "said": {"quantize": 4, "keep_hot": True}, "all": {"quantize": 4}, "dense": {"quantize": 0}
    }.items():  # fmt: skip
        record, _ = run_evaluation("nano", "nano-choice", tmp_path / name, adapter=adapter, limit=10, **options)
        results[name] = (tmp_path / name / "results-nano-choice.jsonl").read_text()
        config = record["config"]
        assert config["quantize"] == (None if name == "dense" else 4)
        assert config.get("keep_hot", False) == (name in ("own", "said"))
    assert results["train"] == results["own"] == results["said"]
    assert len({results[name] for name in ("own", "all", "dense")}) == 3


def test_the_command_says_what_an_adapter_is_scored_on(trained_on_4_bits):
    command = ["evaluate", "--model", "nano", "--data", "nano-choice", "--limit", "2", "--device", "cpu"]
    command += ["--adapter", str(trained_on_4_bits / "adapter")]
    told = "experts were stored in 4 bits; those of the adapter are not (--quantize)"
    assert told in CliRunner().invoke(app, command).stdout
    assert "experts were stored" not in CliRunner().invoke(app, [*command, "--quantize", "0"]).stdout
    told = "experts were stored in 8 bits (--quantize)"
    assert told in CliRunner().invoke(app, [*command, "--quantize", "8"]).stdout


@pytest.mark.parametrize(
    ("options", "bits", "keeps"),
    [
        ({}, 4, True), ({"quantize": 8}, 8, False), ({"quantize": 8, "keep_hot": True}, 8, True),
        ({"quantize": 0}, None, False),
    ],
)  # fmt: skip
def test_a_sweep_scores_an_adapter_on_what_it_was_trained_on(trained_on_4_bits, tmp_path, options, bits, keeps):
    """Whatever the sweep says of others; the condition itself may say otherwise."""
    sweep = Sweep(
        "s", "nano", "nano-choice",
        [
            Condition("base", train=False),
            Condition("cold", {"quantize": 4, "keep_hot": True}),
            Condition("elsewhere", {"data": "nano-math", **options}, scores="cold"),
        ],
        options={"quantize": 8, "test_limit": 1, "device": "cpu"},
    )  # fmt: skip
    jobs = {job.name: job for job in sweep_jobs(sweep, tmp_path)}
    assert jobs["base"].arguments["options"].quantize == 8
    shutil.copytree(trained_on_4_bits, jobs["cold"].folder)
    job = jobs["elsewhere"]
    config = job.function(**job.arguments)["config"]
    assert config["quantize"] == bits and config.get("keep_hot", False) == keeps


def test_lm_eval_scores_an_adapter_on_what_it_was_trained_on(trained_on_4_bits, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval: pip install hotlora[eval]")
    ending = {"activity_label": "Kite", "ctx_a": "A man folds a kite.", "ctx_b": "he", "label": "0"}
    row = ending | {"endings": ["flies it.", "eats it.", "paints it red.", "sleeps."]}
    (tmp_path / "hellaswag_val.jsonl").write_text((json.dumps(row) + "\n") * 3)
    task, likelihoods = f"hellaswag:{tmp_path}", {}
    for name, options in {"own": {}, "said": {"quantize": 4, "keep_hot": True}, "dense": {"quantize": 0}}.items():
        record = run_harness(
            EvalOptions(model="nano", adapter=trained_on_4_bits / "adapter", **options),
            [task],
            tmp_path / name,
            num_fewshot=0,
        )
        assert record["config"]["quantize"] == (None if name == "dense" else 4)
        likelihoods[name] = (tmp_path / name / "results-hellaswag.jsonl").read_text()
    assert likelihoods["own"] == likelihoods["said"] != likelihoods["dense"]


def test_what_is_saved_of_the_base(tmp_path):
    """That of the training: an adapter which is only loaded stays as it was, and a combined one has what all have."""
    keep = {0: (0, 2), 1: (0, 1, 2, 3)}  # all of layer 1: nothing of it is quantized
    adapted(quantize_experts(tiny_model(), 4, keep)).save_pretrained(tmp_path / "cold")
    found = hotlora.base_quantization(tmp_path / "cold")
    assert found is not None and (found.bits, found.keep) == (4, keep)
    adapted(quantize_experts(tiny_model(), 8)).save_pretrained(tmp_path / "all")
    found = hotlora.base_quantization(tmp_path / "all")
    assert found is not None and (found.bits, found.keep) == (8, {})
    load_adapter(quantize_experts(tiny_model(), 8), tmp_path / "cold").save_pretrained(tmp_path / "again")
    assert hotlora.base_quantization(tmp_path / "again").keep == keep
    adapted(tiny_model()).save_pretrained(tmp_path / "dense")
    assert hotlora.base_quantization(tmp_path / "dense") is None

    for other, bits in (("again", 4), ("dense", None)):
        model = load_adapter(load_adapter(tiny_model(), tmp_path / "cold", "a"), tmp_path / other, "b")
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
        model.save_pretrained(tmp_path / f"with-{other}", selected_adapters=["c"])
        found = hotlora.base_quantization(tmp_path / f"with-{other}" / "c")
        assert (found and found.bits) == bits


@pytest.mark.parametrize(
    "saved", [4, {"bits": 4}, {"bits": 3, "keep": {}}, {"bits": 4, "keep": {"x": [1]}}, {"bits": 4, "keep": {"0": 1}}]
)
def test_a_base_that_cannot_be_read(tmp_path, saved):
    adapted(tiny_model()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_quantization": saved}))
    for read in (hotlora.base_quantization, lambda path: load_adapter(tiny_model(), path)):
        with pytest.raises(FileError, match=r"base_quantization is .*must be null, or have bits of 4 or 8"):
            read(tmp_path)


def test_nano_loads_quantized():
    model = load_model("nano", device="cpu", quantization_config=ExpertsQuantization(4))
    assert quantized_bits(model) == 4


def adapted(model, **options):
    config = HotLoraConfig(plan=tiny_plan(model), r=4, lora_alpha=8, **options)
    return peft.get_peft_model(model, config)


def test_an_adapter_trains_on_a_quantized_base():
    model = quantize_experts(tiny_model(), 4)
    batch = tiny_batch()
    expected = model(**batch).logits
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    model = adapted(model)
    assert torch.equal(model(**batch).logits, expected)  # B = 0

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients_are_those_on_the_dequantized_base(family):
    quantized = quantize_experts(zoo_model(family), 8)
    dense = zoo_model(family)
    for plain, holders in zip(experts_of(dense), experts_of(quantized), strict=True):
        for name, holder in holders.named_children():
            if isinstance(holder, QuantizedExperts):
                getattr(plain, name).data = holder.dequantize()
    batch = tiny_batch(vocab_size=100)
    gradients = []
    for base in (quantized, dense):
        torch.manual_seed(0)
        model = adapted(base, init_lora_weights=False)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    got, expected = gradients
    largest = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_gradient_checkpointing():
    batch = tiny_batch()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(quantize_experts(tiny_model(), 4), init_lora_weights=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_adapter_moves_between_bases(tmp_path):
    base = tiny_model()
    adapted(base, init_lora_weights=False).save_pretrained(tmp_path)
    batch = tiny_batch()
    expected = load_adapter(tiny_model(), tmp_path)(**batch).logits
    got = load_adapter(quantize_experts(tiny_model(), 8), tmp_path)(**batch).logits
    assert 0 < relative(got, expected) < 0.1


def test_a_model_can_be_quantized_under_its_adapter():
    torch.manual_seed(0)
    after = quantize_experts(adapted(tiny_model(), init_lora_weights=False), 4)
    torch.manual_seed(0)
    before = adapted(quantize_experts(tiny_model(), 4), init_lora_weights=False)
    batch = tiny_batch()
    assert torch.equal(after(**batch).logits, before(**batch).logits)


def test_parameters_are_counted_as_if_they_were_dense():
    expected = count_parameters(adapted(tiny_model()))
    assert count_parameters(adapted(quantize_experts(tiny_model(), 4))) == expected


def test_merging_is_refused_and_nothing_is_half_merged():
    model = adapted(quantize_experts(tiny_model(), 4), init_lora_weights=False)
    batch = tiny_batch()
    expected = model(**batch).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HotLoraError, match=r"experts of 4 bits.*load_adapter, and merge there"):
            merge()
        assert torch.equal(model(**batch).logits, expected)


def test_saving_the_base_is_refused_and_the_adapter_is_saved(tmp_path):
    model = quantize_experts(tiny_model(), 4)
    with pytest.raises(HotLoraError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    adapted(model).save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < expert_bytes(tiny_model())


@pytest.mark.parametrize("bits", [2, 16, "4", None, True])
def test_bits_out_of_range(bits):
    with pytest.raises(HotLoraError, match="must be 4 or 8"):
        quantize_experts(tiny_model(), bits)
    with pytest.raises(HotLoraError, match="must be 4 or 8"):
        ExpertsQuantization(bits)


def test_models_that_cannot_be_quantized():
    model = quantize_experts(tiny_model(), 8)
    with pytest.raises(ModelError, match="quantized to 8 bits already"):
        quantize_experts(model, 4)
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1, vocab_size=16
        )
    )
    with pytest.raises(ModelError, match="no MoE layer"):
        quantize_experts(dense)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_model().config)
    with pytest.raises(ModelError, match="meta device"):
        quantize_experts(empty)
    with pytest.raises(ModelError, match=r"float64.*bfloat16"):
        quantize_experts(tiny_model().double())
    merged = adapted(tiny_model())
    merged.merge_adapter()
    with pytest.raises(ModelError, match="unmerge_adapter"):
        quantize_experts(merged)


def test_without_bitsandbytes(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    bitsandbytes_functional.cache_clear()
    model = tiny_model()
    with pytest.raises(HotLoraError, match=r"pip install hotlora\[quantize\]"):
        quantize_experts(model)
    assert quantized_bits(model) is None
    with pytest.raises(HotLoraError, match=r"pip install hotlora\[quantize\]"):
        load_model("nano", device="cpu", quantization_config=ExpertsQuantization(4))


@pytest.fixture
def loaded_in_4_bits(tmp_path: Path):
    """What a user of bitsandbytes has: attention in 4 bits, experts as they were."""
    # Rows of less than a block are too short for bitsandbytes' own Linear.
    tiny_model(hidden_size=64).to(torch.bfloat16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)


def test_experts_that_bitsandbytes_left_alone(loaded_in_4_bits, recwarn):
    model = loaded_in_4_bits
    message = r"bitsandbytes has quantized nn.Linear only.*bfloat16, 0\.10 MB of .*quantize_experts\(model\)"
    with pytest.warns(UserWarning, match=message):
        warn_if_experts_unquantized(model)
    with pytest.warns(UserWarning, match=message):
        adapted(model).unload()
    quantize_experts(model, 4)
    recwarn.clear()
    warn_if_experts_unquantized(model)
    model = adapted(model).train()
    warn_if_experts_unquantized(tiny_model())
    assert not [w for w in recwarn if "nn.Linear only" in str(w.message)]
    batch = tiny_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_quantizing_needs_no_other_import():
    """The implementation of experts that a quantized model runs on comes with `quantize_experts` itself."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import hotlora\nfrom tiny import tiny_batch, tiny_model\n"
        "model = hotlora.quantize_experts(tiny_model(hidden_size=64, intermediate_size=64), 4)\n"
        "assert model(**tiny_batch()).logits.isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], check=True, capture_output=True)


@pytest.mark.parametrize("keep", [(), (0, 3, 4)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_gpus_product_makes_a_block_of_experts_dense_at_a_time(monkeypatch, keep, transposed, sizes):
    """Of `gpu.BLOCK_BYTES`: here two experts; one where it is larger."""
    holder = QuantizedExperts.from_weight(random_weight(5, 24, 16), 4, keep)
    weight, whole = FrozenWeight(holder, transposed), holder.dequantize()
    x = random_weight(sum(sizes) + 2, 24 if transposed else 16, seed=1)
    rows, experts = rows_of(gpu, sizes, 2)
    made: list[int] = []
    some, chosen = holder.some, holder.chosen
    monkeypatch.setattr(holder, "some", lambda a, b: made.append(b - a) or some(a, b))
    monkeypatch.setattr(holder, "chosen", lambda ids: made.append(len(ids)) or chosen(ids))
    monkeypatch.setattr(holder, "dequantize", None)
    for bound, most in ((2 * 24 * 16 * 4, 2), (1, 1)):
        made.clear()
        monkeypatch.setattr(gpu, "BLOCK_BYTES", bound)
        got = rows.product(x, weight)
        assert max(made, default=0) <= most and (sizes != SIZES[0] or max(made) == most)
        assert not got[sum(sizes) :].any()
        for s, expert in enumerate(experts):
            torch.testing.assert_close(got[s], x[s] @ (whole[expert] if transposed else whole[expert].T))
    for a, b in ((0, 5), (1, 3), (2, 5), (0, 1)):
        assert torch.equal(some(a, b), whole[a:b])
    for ids in ((4, 0), (1, 2, 2), (3,)):
        assert torch.equal(chosen(torch.tensor(ids)), whole[list(ids)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, r"DoRA \(--dora\) needs weights that are not quantized.*leave out --quantize"),
        ({"train_full_experts": True}, r"full experts \(--method esft\) needs weights that are not quantized"),
        ({"dtype": "float64"}, "quantize goes with float32, bfloat16 or float16"),
        ({"rule": "all", "keep_hot": True}, "keep_hot leaves all experts as they are with rule all"),
        ({"method": "lora", "keep_hot": True}, "keep_hot leaves all experts as they are with rule all"),
    ],
)
def test_what_quantized_experts_do_not_take_is_told_before_loading(options, said):
    with pytest.raises(HotLoraError, match=said):
        check_run(resolve(**{"model": "nano", "data": "nano-math", "quantize": 4, **options}))
