"""`estimate` against what a real step keeps."""

import copy
import functools
import gc
import json
import sys
import tempfile
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_config
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head
from zoo import zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.quantize import experts_in, quantize_experts
from hotlora.base.errors import HotLoraError
from hotlora.bench.contenders import BenchConfig, Contender
from hotlora.bench.worker import Worker, _peak_allocated
from hotlora.cost import memory
from hotlora.cost.activations import LiveBytes, SavedBytes, autocast
from hotlora.cost.estimate import coverage_at, estimate, sized_config, step_of
from hotlora.hf import forward
from hotlora.hf.experts_view import ExpertsView
from hotlora.hf.models import load_model
from hotlora.hf.sinks import default_attention
from hotlora.layer import gpu
from hotlora.layer.function import routed_experts_by
from hotlora.layer.updates import LowRank
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile
from hotlora.routing.profiler import profile_routing
from hotlora.training import labelled_loss
from hotlora.training.dense_mixer import dense_mixer as mixed_routers
from hotlora.training.gradient_checkpointing import checkpoint_kwargs
from hotlora.training.labelled_loss import LabelledLoss
from hotlora.training.rank_growth import allocated

BATCH, LENGTH = 4, 64


@pytest.fixture
def write(tmp_path):
    def save(config):
        config.save_pretrained(tmp_path)
        return tmp_path

    return save


def measured(config, dtype, fraction, r, **switches):
    """The adapted model after one AdamW step, and the bytes kept by the forward of a second one."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    ids = torch.randint(3, config.vocab_size, (BATCH, LENGTH))
    profile = profile_routing(base, [{"input_ids": ids}])
    plan = select_experts(profile, rule="hot", fraction=fraction)
    add_fused_lm_head(base)  # which keeps no logits
    model = get_peft_model(base, HotLoraConfig(plan=plan, r=r, **switches)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        with autocast("cpu", dtype), SavedBytes(model) as saved:
            loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        loss.backward()
        optimizer.step()
    return model, optimizer, saved.total, float(profile.coverage(fraction=fraction).mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_a_whole_step(family, dtype, write):
    config = tiny_config(family, hidden_size=128, moe_intermediate_size=64, intermediate_size=64, num_hidden_layers=3)
    model, optimizer, saved, coverage = measured(config, getattr(torch, dtype), 0.5, 8)
    found = estimate(
        write(config), batch_size=BATCH, max_length=LENGTH, fraction=0.5, coverage=coverage, r=8, dtype=dtype
    )
    sizes = found["memory"]
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sizes["weights"] == sum(p.nbytes for p in frozen)
    assert sizes["gradients"] == sum(p.grad.nbytes for p in trained)
    state = (t for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert sizes["optimizer"] == sum(t.nbytes for t in state)
    assert found["trainable"] == sum(p.numel() for p in trained)
    assert sizes["adapter"] == sum(p.nbytes for p in trained)
    assert sizes["activations"] == pytest.approx(saved, rel=0.1)
    beside = sizes["total"] + sizes["host"] + sizes["disk"]
    assert sizes["total"] == sum(sizes.values()) - beside


def test_activations_follow_tokens_and_coverage(write):
    path = write(tiny_config("olmoe"))

    def found(**options):
        options = {"batch_size": 2, "max_length": 32, "fraction": 0.25, "r": 4, **options}
        return estimate(path, **options)["memory"]

    base = found()
    assert found(batch_size=4)["activations"] == pytest.approx(2 * base["activations"], rel=0.02)
    assert found(coverage=1.0)["activations"] >= found(coverage=0.1)["activations"]
    assert found(gradient_checkpointing=True)["activations"] < 0.8 * base["activations"]
    assert found(train_attention=False)["activations"] < base["activations"]
    whole, half, cut = found(), found(dtype="bfloat16"), found(layers=1)
    assert half["weights"] * 2 == whole["weights"] > cut["weights"]
    experts = 2 * 8 * 3 * 32 * 16
    assert whole["weights"] - found(quantize=4)["weights"] == experts * (4 - 0.5 - 2 / 64)
    cold = found(quantize=4, keep_hot=True)["weights"]
    assert whole["weights"] - cold == 0.75 * experts * (4 - 0.5 - 2 / 64)


def test_olmoe(tmp_path):
    """The adapter's state for 16 of OLMoE's experts is 1.36 GB (facts), from the config alone."""
    from transformers import OlmoeConfig

    OlmoeConfig(intermediate_size=1024, dtype="bfloat16").save_pretrained(tmp_path)
    found = estimate(tmp_path, batch_size=8, max_length=2048, experts_per_layer=16, flops_per_second=4e14)
    memory = found["memory"]
    assert found["trainable"] == 84_967_424
    assert memory["weights"] == 2 * 6_919_161_856
    assert 4 * found["trainable"] + memory["gradients"] + memory["optimizer"] == 16 * 84_967_424
    assert found["expert_bytes_per_token_layer"] < 140_000
    assert found["time"]["seconds_per_step"] == pytest.approx(found["flops"]["step"] / 4e14)
    assert found["time"]["tokens_per_second"] == pytest.approx(16384 / found["time"]["seconds_per_step"])


def test_the_device_that_is_asked_for_is_estimated(write):
    """Whether it is here or not: a CPU trains in float32, and its loss has other logits at a time."""
    path = write(tiny_config("olmoe", dtype="bfloat16", vocab_size=2**19))
    options = {"batch_size": 2, "max_length": 32, "fraction": 0.25, "r": 4}
    on_cpu, on_gpu = (estimate(path, device=device, **options) for device in ("cpu", "cuda"))
    assert (on_cpu["dtype"], on_gpu["dtype"]) == ("float32", "bfloat16")
    assert (on_cpu["device"], on_gpu["device"]) == ("cpu", "cuda")
    assert on_cpu["memory"]["weights"] == 2 * on_gpu["memory"]["weights"]
    in_half = estimate(path, device="cpu", dtype="bfloat16", **options)["memory"]
    tile = 64 * 32768 * 2  # logits in bfloat16
    # Gradients come when the tile is gone.
    assert on_gpu["memory"]["workspace"] + on_gpu["memory"]["gradients"] == tile
    assert in_half["workspace"] + in_half["gradients"] == 2**24 * 4 * 3
    assert in_half["activations"] == on_gpu["memory"]["activations"]
    assert estimate(path, **options) == on_gpu


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "gemma4_text", "nemotron_h", "mixtral"])
def test_other_families(family, write):
    found = estimate(write(zoo_model(family).config), batch_size=2, max_length=16, fraction=0.25, r=4)
    beside = {"staging", "host", "disk"}
    assert all((size == 0) == (kind in beside) for kind, size in found["memory"].items())


def test_coverage_at():
    assert coverage_at(1.0) == 1 and coverage_at(0.25, cv=0) == pytest.approx(0.25)
    assert coverage_at(0.25) == pytest.approx(0.563, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": -1}, "max_length is -1"),
        ({"quantize": 3}, "quantize is 3"),
        ({"coverage": 1.5}, "coverage is 1.5"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"layers": 9}, "layers is 9: this model has 2"),
        ({"fraction": 2.0}, "fraction is 2.0"),
        ({"device": "gpu"}, "device is 'gpu': give cuda or cpu"),
    ],
)
def test_errors(change, message, write):
    with pytest.raises(HotLoraError, match=message):
        estimate(write(tiny_config("olmoe")), **{"batch_size": 2, "max_length": 8, **change})


def test_a_cut_config_keeps_its_lists(write):
    config = tiny_config("qwen3_moe", num_hidden_layers=4)
    cut = sized_config(write(config), 2)
    lists = [value for value in vars(cut).values() if isinstance(value, list)]
    assert cut.num_hidden_layers == 2 and all(len(value) != 4 for value in lists)


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_peak_on_a_gpu(fraction, write):
    """The whole peak, as CUDA's allocator saw it, within 15%."""
    from transformers import OlmoeConfig

    from hotlora.bench.contenders import BenchConfig, Contender
    from hotlora.bench.worker import Worker

    path = write(OlmoeConfig(intermediate_size=1024, num_hidden_layers=2, dtype="bfloat16"))
    contender = Contender("hot", fraction) if fraction < 1 else Contender("all")
    config = BenchConfig(str(path), tokens=16384, length=2048, device="cuda", dtype="bfloat16", fractions=(0.25,))
    worker = Worker(config, contender)
    common = worker.calibrate()
    row = worker.prepare(common["spreads"], common["plans"][contender.name])
    found = estimate(
        path, batch_size=8, max_length=2048, fraction=fraction, train_router=False, train_shared=False, device="cuda"
    )
    assert found["memory"]["total"] == pytest.approx(row["peak_memory_bytes"], rel=0.15)


@pytest.mark.parametrize(
    ("kind", "dtype", "layers", "batch"),
    [("hot", "float32", 6, 4), ("all", "float32", 6, 4), ("hot", "bfloat16", 1, 2)],  # small: many CPUs crawl in it
)
def test_the_peak_of_a_step_is_within_10_percent(kind, dtype, layers, batch):
    """nano, sequences of 256 tokens: all that tensors take at the most, weights and loss included."""
    fraction = 0.25 if kind == "hot" else None
    shape = {"layers": layers, "r": 8, "dtype": dtype, "device": "cpu"}
    config = BenchConfig(tokens=256 * batch, length=256, fractions=(0.25,), **shape)
    worker = Worker(config, Contender(kind, fraction))
    common = worker.calibrate()
    peak = worker.prepare(common["spreads"], common["plans"][worker.contender.name])["peak_memory_bytes"]
    coverage = float(RoutingProfile(**_tensors(common["profile"])).coverage(fraction=fraction or 1.0).mean())
    found = estimate(
        "nano", batch_size=batch, max_length=256, fraction=fraction, coverage=coverage,
        train_router=False, train_shared=False, **shape,
    )  # fmt: skip
    assert 0.9 <= found["memory"]["total"] / peak <= 1.1


WIDE = {
    "hidden_size": 1024, "moe_intermediate_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "vocab_size": 128, "num_experts": 8, "num_experts_per_tok": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
LONG = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64, "num_hidden_layers": 8}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (LONG, {"gradient_checkpointing": True}),
        (LONG, {"gradient_checkpointing": True, "dtype": "bfloat16"}),
        (LONG, {"quantize": 4}),
        (LONG, {"quantize": 8, "gradient_checkpointing": True}),
        (LONG, {"r": 64, "gradient_accumulation_steps": 2}),
        (LONG, {"r": 64, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "optim": "sgd"}),
        # Here rows are larger than the loss's logits, and gradients and weights than both.
        (WIDE, {"gradient_checkpointing": True}),
        (WIDE, {"quantize": 4, "gradient_checkpointing": True}),
        (WIDE, {"quantize": 4, "keep_hot": True}),
        (WIDE, {"r": 64}),
        (WIDE, {"r": 64, "optim": "adamw_8bit"}),
        (WIDE, {"quantize": 4, "quantize_linear": 4, "gradient_checkpointing": True}),
        (WIDE, {"quantize_linear": 8}),
        (LONG, {"grow_every": 10}),
        (WIDE, {"train_a": False, "r": 64}),
        (LONG, {"train_a": False}),
        (WIDE, {"dense_mixer": True}),
        (LONG, {"perft": "E", "dtype": "bfloat16"}),
        (WIDE, {"perft": "R", "perft_adapters": 4, "perft_top_k": 2}),
        (LONG, {"perft": "D", "perft_adapters": 2}),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if "hidden_size" not in value else "",
)
def test_what_saves_memory_is_within_10_percent(shape, options, write):
    """The most that tensors take in a step, by torch's CPU allocator."""
    if options.keys() & {"quantize", "quantize_linear"} or "8bit" in options.get("optim", ""):
        pytest.importorskip("bitsandbytes")
    config = tiny_config("olmoe", **shape)
    peak, coverage = measured_peak(config, **options)
    options = {"r": 8, "dtype": "float32", **options}
    options.pop("dense_mixer", None)  # takes time alone
    found = estimate(
        write(config), batch_size=1, max_length=LENGTH, fraction=0.25, coverage=coverage, device="cpu", **options
    )
    assert 0.9 <= found["memory"]["total"] / peak <= 1.1


@pytest.mark.parametrize("dtype,of_router", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize(
    "family,width,expert_width", [("olmoe", 256, 96), ("olmoe", 256, 32), ("olmoe", 128, 256), ("gpt_oss", 256, 96)]
)
def test_rows_of_experts_on_a_gpu(family, width, expert_width, dtype, of_router, write, monkeypatch):
    """What a layer makes in forward or backward beyond what it keeps, with a GPU's products."""
    monkeypatch.setattr(gpu, "BLOCK_BYTES", 2**20)
    config = tiny_config(family) if family == "olmoe" else copy.deepcopy(zoo_model(family).config)
    if family == "gpt_oss":
        config.update({"layer_types": config.layer_types[:1]})
    config.update({
        "hidden_size": width, "moe_intermediate_size": expert_width, "intermediate_size": expert_width,
        "num_hidden_layers": 1, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 8,
    })  # fmt: skip
    compute, of_weights = getattr(torch, dtype), getattr(torch, of_router)
    base = AutoModelForCausalLM.from_config(config, dtype=compute).requires_grad_(False)
    view = ExpertsView(base.model.layers[0].mlp.experts)
    hidden = torch.randn(512, width, dtype=compute, requires_grad=True)
    weights = torch.rand(512, 8, dtype=of_weights, requires_grad=True)
    r, (up, down) = 4, (2 * expert_width, width)
    shapes = ((2, 2 * r, width), (2, up, r), (2, r, expert_width), (2, down, r))
    update = LowRank(torch.arange(2), *(torch.rand(s, dtype=compute).requires_grad_() for s in shapes), scaling=2.0)
    index = torch.arange(8).repeat(512, 1)
    with LiveBytes() as forward:
        output = routed_experts_by(gpu, view, hidden, index, weights, [update])
    made, grad = forward.most - forward.now, torch.ones_like(output)
    with LiveBytes() as backward:
        torch.autograd.grad(output, [hidden, weights, *update.tensors], grad)
    step = step_of(write(config), batch_size=1, max_length=512, fraction=0.25, r=8, dtype=dtype, device="cuda")
    estimated = memory._rows(step, memory.Storage())
    # Torch's thin products copy the gate's half, which ours read where it is.
    copied = 512 * 8 * (expert_width + 8 * r) * compute.itemsize
    assert max(made, backward.most) == pytest.approx(estimated, rel=0.05, abs=copied)
    assert made <= 2 * 512 * 8 * max(width, expert_width) * compute.itemsize + 2**20 + copied


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family,attention", [("gpt_oss", "eager"), ("gpt_oss", None), ("deepseek_v3", None)])
def test_scores_that_attention_makes_are_counted(family, attention, checkpointing, write, monkeypatch):
    """A CPU's fused kernel needs a v of the width of q and k: without one, or where eager attention is asked for, the
    backward pass of one layer makes several tensors of the size of all scores, far more than its experts' rows."""
    monkeypatch.setattr(sys.modules[__name__], "LENGTH", 512)
    config = copy.deepcopy(zoo_model(family).config)
    config.update({"num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 128, "hidden_size": 128})
    config.update({"num_key_value_heads": 16 if family == "deepseek_v3" else 4})
    if family == "gpt_oss":
        config.update({"layer_types": ["full_attention"] * 2})
    options = {"dtype": "bfloat16", "gradient_checkpointing": checkpointing, "attn_implementation": attention}
    peak, coverage = measured_peak(config, **options)
    options |= {"r": 8, "fraction": 0.25, "coverage": coverage, "device": "cpu"}
    found = estimate(write(config), batch_size=1, max_length=512, **options)["memory"]
    assert 0.9 <= found["total"] / peak <= 1.1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_masks_of_windows_and_of_packed_rows_are_counted(family, dtype, checkpointing, write, monkeypatch):
    """gpt-oss has a mask in every second layer, whose window is shorter than the row; the other one has two examples
    in a row."""
    monkeypatch.setattr(sys.modules[__name__], "LENGTH", 1024)
    config = copy.deepcopy(zoo_model(family).config)
    config.update({"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 128})
    config.update({"hidden_size": 128, "head_dim": 16})
    if family == "gpt_oss":
        config.update({"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64})
    packed = family == "qwen3_moe"
    options = {"dtype": dtype, "gradient_checkpointing": checkpointing, "packed": packed}
    peak, coverage = measured_peak(config, **options)
    options |= {"r": 8, "fraction": 0.25, "coverage": coverage, "device": "cpu"}
    rows = {"batch_size": 2, "max_length": 512} if packed else {"batch_size": 1, "max_length": 1024}
    found = estimate(write(config), **rows, **options)["memory"]
    assert 0.9 <= found["total"] / peak <= 1.1


def test_a_packed_batch_is_one_row_with_a_mask(write):
    """But for kernels that know where examples end; and of a batch of one, too, whose row holds several examples."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    config = write(tiny_config("qwen3_moe", **shape))

    def packed(batch, attention=None):
        size = {"batch_size": batch, "max_length": 128, "device": "cuda", "dtype": "bfloat16"}
        return step_of(config, packed=True, attn_implementation=attention, **size)

    one, four = packed(1), packed(4)
    assert one.flattened and (one.length, four.length) == (128, 512)
    assert four.masks >= 512 * 512, "a mask of bools"
    by_flash = packed(4, "flash_attention_2")
    layers, tokens = len(four.layers), 512
    repeated, rotary = 2 * (8 - 2) * 16 * 2 * tokens, 2 * (512 - 128) * 16 * 2
    assert four.rest - by_flash.rest == layers * (2 * tokens * tokens + repeated) + rotary
    assert not by_flash.flattened and by_flash.masks < tokens * tokens
    # All scores, and not the half before each token of an example.
    assert four.forward["scores"] == 2 * (4 * by_flash.forward["scores"]) == 4 * one.forward["scores"]


def test_layers_with_a_window_work_out_all_scores_by_a_mask(write):
    config = copy.deepcopy(zoo_model("gpt_oss").config)
    kinds = ["sliding_attention", "full_attention"]
    config.update({"num_hidden_layers": 2, "layer_types": kinds, "sliding_window": 32})
    path = write(config)

    def scores(attention, length=256):
        size = {"batch_size": 1, "max_length": length, "device": "cuda"}
        return step_of(path, attn_implementation=attention, **size).forward["scores"]

    full = scores(None, 16) * 16 / 2  # a full layer's, of 16 times the tokens
    assert scores(None) == 3 * full, "all 256 keys, and the half of them"
    assert scores("eager") == 4 * full
    assert scores("flash_attention_2") == pytest.approx(full * (1 + 2 * (32 - 2) / 256))


def test_rope_that_goes_by_the_rows_length_is_estimated(tmp_path):
    """As users write it: with what it was in transformers 4."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    options = {"batch_size": 1, "max_length": 128, "fraction": 0.25}
    sizes = []
    for name, given in (("plain", {}), ("dynamic", {"rope_scaling": scaling})):
        tiny_config("qwen3_moe", head_dim=16).save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text())
        rope = config.pop("rope_parameters", {})
        file.write_text(json.dumps(config | {"rope_theta": rope.get("rope_theta", 1e4)} | given))
        sizes.append(estimate(file, **options)["memory"])
    assert sizes[0] == sizes[1]


def test_a_gpus_attention_keeps_no_scores_whatever_the_widths_of_heads(write):
    config = write(copy.deepcopy(zoo_model("deepseek_v3").config))
    kept = {
        (device, length): step_of(config, batch_size=1, max_length=length, device=device, dtype="bfloat16").rest
        for device in ("cpu", "cuda")
        for length in (256, 1024)
    }
    assert kept["cuda", 1024] <= 4 * kept["cuda", 256] and kept["cpu", 1024] > 4.2 * kept["cpu", 256]


def test_attention_beside_experts_that_alone_are_adapted_is_counted(write):
    """Their adapters make all that comes after them need a gradient."""
    options = {"batch_size": 1, "max_length": 64, "device": "cuda", "r": 8}
    config = write(tiny_config("olmoe", num_hidden_layers=4))
    others = dict.fromkeys(("train_attention", "train_router", "train_shared"), False)
    alone, everything = step_of(config, **options, **others), step_of(config, **options)
    assert 0.4 * everything.rest < alone.rest < everything.rest


def test_rows_with_padding_keep_a_mask_and_repeated_keys(write):
    config = write(tiny_config("qwen3_moe", num_attention_heads=8, num_key_value_heads=2, head_dim=16))
    options = {"batch_size": 2, "max_length": 64, "device": "cuda", "dtype": "bfloat16"}
    step = step_of(config, **options, padded=True)
    layers = len(step.blocks)
    assert step.rest_padding == layers * 2 * (2 * 64 * 64 + 2 * (8 - 2) * 64 * 2 * 16)
    assert step_of(config, **options).rest_padding == 0
    storage = memory.Storage()
    found = [memory.memory(one, storage)["activations"] for one in (step, step.of_tokens(64), step.of_tokens(128))]
    assert found[2] == found[0], "of_tokens is of the same rows"
    assert found[0] - 2 * found[1] == pytest.approx(step.rest_padding, abs=2), "one row has none"


def test_cold_experts_are_all_in_ram_while_the_router_is_profiled(write):
    step = step_of(write(tiny_config("olmoe")), batch_size=1, max_length=64, fraction=0.25, device="cuda")
    of_all, of_cold = (memory.memory(step, memory.Storage(offload=offload))["host"] for offload in ("all", "cold"))
    assert of_cold > of_all


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_in_chunks_is_within_10_percent(dtype, write, monkeypatch):
    config = tiny_config("olmoe", vocab_size=16384, hidden_size=32)
    for module in (forward, labelled_loss, memory):
        monkeypatch.setattr(module, "LOGITS", 2**18)
    peak, coverage = measured_peak(config, dtype=dtype)
    options = {"r": 8, "dtype": dtype, "fraction": 0.25, "coverage": coverage}
    found = estimate(write(config), batch_size=1, max_length=LENGTH, device="cpu", **options)["memory"]
    assert 0.9 <= found["total"] / peak <= 1.1
    assert found["workspace"] > 0.25 * peak, "the loss is the highest moment"


def measured_peak(
    config, *, dtype="float32", r=8, quantize=None, keep_hot=False, quantize_linear=None, gradient_checkpointing=False,
    optim="adamw_torch_fused", gradient_accumulation_steps=1, grow_every=None, dense_mixer=False,
    attn_implementation=None, packed=False, **perft,
):  # fmt: skip
    """Bytes, and the share of the routing that the adapted experts got."""
    torch.manual_seed(0)
    attention = attn_implementation or default_attention(config)
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    ids = torch.randint(3, config.vocab_size, (1, LENGTH))
    profile = profile_routing(base, [{"input_ids": ids}])
    plan = select_experts(profile, rule="hot", fraction=0.25)
    if quantize_linear is not None:  # which is done while a model loads
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            stored = experts_in(quantize, None, quantize_linear)
            base = load_model(folder, device="cpu", dtype=dtype, quantization_config=stored)
    elif quantize is not None:
        quantize_experts(base, quantize, plan.experts if keep_hot else None)
    lora = HotLoraConfig(plan=plan, **perft, **(allocated(r, r) if grow_every else {"r": r}))
    model = get_peft_model(base, lora).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(checkpoint_kwargs())
        model.enable_input_require_grads()
    labelled = LabelledLoss(model, range(3, 30))
    inputs = {"input_ids": ids}
    if packed:  # two examples
        inputs["position_ids"] = torch.arange(LENGTH // 2).repeat(2)[None]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(optim)(trained, lr=1e-3)

    def step():
        for _ in range(gradient_accumulation_steps):
            with mixed_routers(model) if dense_mixer else nullcontext():
                with autocast("cpu", getattr(torch, dtype)):
                    loss = labelled(model, inputs, ids)[1] / ids.numel()
                loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    tensors = (*model.parameters(), *model.buffers(), *state, *stored_beside(model))
    resting = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(resting.values()) + _peak_allocated(step), float(profile.coverage(fraction=0.25).mean())


def stored_beside(model):
    """What bitsandbytes' layers hold that is neither parameter nor buffer: scales."""
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
        if (state := getattr(module, "state", None)) is not None and "bitsandbytes" in type(module).__module__:
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))


def optimizer_of(name):
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    return {"adamw_torch_fused": functools.partial(torch.optim.AdamW, fused=True), "sgd": torch.optim.SGD}[name]


def _tensors(values):
    return {name: torch.tensor(v) if isinstance(v, list) and name != "layers" else v for name, v in values.items()}


def test_what_is_freed_meanwhile_does_not_hide_others():
    """An address that is given out again is another storage."""
    weight = torch.nn.Parameter(torch.ones(64, 64))
    model = torch.nn.ParameterList([weight])
    with SavedBytes(model) as saved:
        for _ in range(50):
            (torch.rand(64, 64) @ weight).sum()  # its graph is dropped at once, and its storage freed
    assert saved.total == 50 * 64 * 64 * 4
