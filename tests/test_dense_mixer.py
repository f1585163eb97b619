"""DenseMixer: the forward is as without it, and the router's gradient is that of all experts, densely, by autograd."""

import json
from contextlib import nullcontext

import pytest
import torch
import transformers
from peft import get_peft_model
from test_adapter import PLANNED
from test_factors import adapted, experts_of
from tiny import FAMILIES, fill, tiny_batch, tiny_model, tiny_plan
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import families, zoo_config, zoo_model

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.base.errors import HotLoraError, ModelError
from hotlora.hf.moe_layers import moe_layers, unwrap
from hotlora.hf.routers import check_softmax_routers
from hotlora.routing.plan import ExpertPlan
from hotlora.runs.checks import check_run
from hotlora.runs.options import RunOptions
from hotlora.training.dense_mixer import dense_mixer
from hotlora.training.gradient_checkpointing import checkpoint_kwargs

IDS = tiny_batch()["input_ids"]
KINDS = [(family, {}) for family in FAMILIES] + [
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": True}),
]
SOFTMAX = {
    "aria", "aria_text", "cohere2_moe", "deepseek_ocr2", "deepseek_v2", "flex_olmo", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "jamba", "minimax", "mistral4",
    "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe_thinker", "qwen3_vl_moe", "unlimited_ocr",
}  # fmt: skip
OTHERS = {
    "afmoe", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "ernie4_5_moe", "gemma4_text",
    "glm4_moe", "inkling_text", "kimi_linear", "lfm2_moe", "minimax_m2", "nemotron_h", "phimoe", "solar_open", "zaya",
}  # fmt: skip


class InDouble(TorchFunctionMode):
    """Routers take their softmax in float32 whatever the model's dtype; here in float64, for exact comparisons."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0]
        if func in (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax):
            kwargs.pop("dtype", None)
        return func(*args, **kwargs)


def training(model, **config):
    return adapted(model, **config).train()


def run(model, batch=None):
    """Logits, and the gradient of everything that trains."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    output = model(**(batch or {"input_ids": IDS})).logits
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((output * probe.to(output.dtype)).sum(), list(trained.values()))
    return {"logits": output.detach(), **dict(zip(trained, gradients, strict=True))}


def is_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


# The authors' formulas


def expert_by_hand(layer, expert, x):
    """One expert's output of all tokens, with its adapter."""
    W_gate, W_up = layer.base_layer.gate_up_proj[expert].chunk(2)
    W_down = layer.base_layer.down_proj[expert]
    if expert in PLANNED:
        pairs = layer.factor_pairs("default")
        gate, up, down = (pairs[expert, name] for name in ("gate", "up", "down"))
        scaling = layer.scaling["default"]
        W_gate, W_up, W_down = (
            W + scaling * B @ A for W, (A, B) in zip((W_gate, W_up, W_down), (gate, up, down), strict=True)
        )
    return (torch.nn.functional.silu(x @ W_gate.T) * (x @ W_up.T)) @ W_down.T


def dense_block(block, hidden):
    """A routed block as densemixer 1.0.1 computes it: all experts on all tokens, in autograd's hands."""
    x = hidden.reshape(-1, hidden.shape[-1])
    logits, _, chosen = block.gate(x)
    weights = logits.softmax(-1)
    mask = torch.zeros_like(weights).scatter(1, chosen, 1.0)
    if getattr(unwrap(block.gate), "norm_topk_prob", True):  # mixtral always does, and has no such attribute
        ratio = (weights * mask).sum(-1, keepdim=True)
        weights = weights * (1 - mask) / ratio.detach() + weights * mask / ratio
    sparse = dense = torch.zeros_like(x)
    for expert in range(weights.shape[1]):
        y, is_here = expert_by_hand(block.experts, expert, x), mask[:, expert : expert + 1]
        y.register_hook(lambda grad, is_here=is_here: grad * is_here)
        dense = dense + y * weights[:, expert : expert + 1]
        sparse = sparse + y * weights[:, expert : expert + 1] * is_here
    output = sparse.detach() + dense - dense.detach()
    if hasattr(block, "shared_expert"):
        output = output + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return output.reshape(hidden.shape)


@pytest.mark.parametrize(("family", "sizes"), KINDS, ids=str)
@pytest.mark.parametrize("config", [{}, {"share_a": True, "r": 2}], ids=str)
def test_every_gradient_is_the_authors(family, sizes, config):
    """Of a whole model in float64: attention, shared experts and adapters below see what comes through the router."""
    model = training(tiny_model(family, **sizes).double(), **config)
    with InDouble():
        without = run(model)
        with dense_mixer(model):
            ours = run(model)
        for layer in model.get_base_model().model.layers:
            layer.mlp.forward = lambda hidden, block=layer.mlp: dense_block(block, hidden)
        is_close(ours, run(model), 1e-10)
    assert torch.equal(ours["logits"], without["logits"])
    routers = [name for name in ours if ".gate." in name]
    assert len(routers) == 4
    for name in routers:
        assert (ours[name] - without[name]).norm() > 1e-3 * without[name].norm()


@pytest.mark.parametrize(("family", "sizes"), KINDS, ids=str)
def test_the_last_layers_other_gradients_are_as_without(family, sizes):
    """Nothing trained lies after the last layer's experts; those of layers below get more through the routers above."""
    model = training(tiny_model(family, num_hidden_layers=1, **sizes), train_attention=False)
    without = run(model)
    with dense_mixer(model):
        ours = run(model)
    for name in ours:
        assert torch.equal(ours[name], without[name]) is (".gate.lora" not in name), name


@pytest.mark.parametrize("normed", [False, True])
def test_one_layers_logits_get_the_gradient_written_out(normed):
    """dL/dπ_i = u_i / s for i not chosen, and u_i / s - Σ u_j π_j / s² (normalized) or u_i of the chosen."""
    model = training(tiny_model("olmoe", norm_topk_prob=normed, num_hidden_layers=1).double())
    block, caught = model.get_base_model().model.layers[0].mlp, {}
    block.gate.register_forward_hook(lambda module, args, output: caught.update(logits=output[0], chosen=output[2]))
    hidden = torch.randn(1, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with InDouble(), dense_mixer(model):
        output = block(hidden)
        g = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        (found,) = torch.autograd.grad((output * g).sum(), caught["logits"])
    x, g, pi = hidden[0], g[0], caught["logits"].detach().softmax(-1)
    u = torch.stack([(expert_by_hand(block.experts, e, x).detach() * g).sum(-1) for e in range(8)], dim=1)
    mask = torch.zeros_like(pi).scatter(1, caught["chosen"], 1.0)
    s = (pi * mask).sum(1, keepdim=True) if normed else torch.ones(len(x), 1, dtype=torch.float64)
    of_pi = u / s - (mask * (mask * u * pi).sum(1, keepdim=True) / s**2 if normed else 0)
    expected = pi * (of_pi - (of_pi * pi).sum(1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_with_all_experts_chosen_it_is_plain_training():
    model = training(tiny_model(num_experts_per_tok=8))
    without = run(model)
    with dense_mixer(model):
        ours = run(model)
    assert all(torch.equal(ours[name], without[name]) for name in without)


# Where it works


def test_families_are_told_apart_by_what_their_routers_do():
    """Found by running each router alone, from shapes without weights."""
    found = set()
    for family in families():
        try:
            with torch.device("meta"):
                model = getattr(transformers, families()[family])._from_config(zoo_config(family))
            check_softmax_routers(model, "dense_mixer")
            found.add(family)
        except ModelError as error:
            assert "leave dense_mixer out" in str(error)
    assert SOFTMAX & families().keys() <= found and not OTHERS & found


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoeshared", "jamba", "qwen3_next", "aria_text"])
def test_other_layouts_get_what_is_written_out(family):
    """Of the last scores: what the rest adds is softmax's gradient of Σ over the rest of π_i <dL/dy, E_i> / s."""
    model = zoo_model(family, dtype=torch.float64)
    plan = {"version": 1, "num_experts": 8, "experts": {str(layer.layer): [1, 3] for layer in moe_layers(model)}}
    model = get_peft_model(model, HotLoraConfig(plan=plan, r=4))
    fill(model, 0, scale=0.05)
    model.train()
    layer = moe_layers(model)[-1]
    router, experts = model.get_submodule(layer.router), model.get_submodule(layer.experts)
    caught = {}
    router.register_forward_hook(lambda module, args, output: caught.update(logits=output[0]))
    experts.register_forward_hook(lambda module, args, y: caught.update(args=args, y=y) if y.requires_grad else None)
    gradients = []
    for mixed in (False, True):
        with InDouble(), dense_mixer(model) if mixed else nullcontext():
            output = model(input_ids=IDS).logits
            g = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
            of_scores, dy = torch.autograd.grad((output * g).sum(), [caught["logits"], caught["y"]])
            gradients.append(of_scores)
    (hidden, index, weights), softmax = caught["args"], caught["logits"].detach().softmax(-1)
    with torch.no_grad(), InDouble():
        one = hidden.new_ones(len(hidden), 1)
        outputs = [experts.eval()(hidden, torch.full_like(index[:, :1], expert), one) for expert in range(8)]
        mask = torch.zeros_like(softmax).scatter(1, index, 1.0)
        scale = weights.sum(1, keepdim=True) / (softmax * mask).sum(1, keepdim=True)
        rest = torch.stack([(y * dy).sum(-1) for y in outputs], dim=1) * scale * (1 - mask)
        expected = softmax * (rest - (rest * softmax).sum(1, keepdim=True))
    assert expected.norm() > 1e-3 * gradients[0].norm()
    assert (gradients[1] - gradients[0] - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("family", sorted(SOFTMAX & families().keys()))
def test_in_every_such_family_only_the_gradient_changes(family):
    model = zoo_model(family)
    plan = {"version": 1, "num_experts": 8, "experts": {str(layer.layer): [1, 3] for layer in moe_layers(model)}}
    model = get_peft_model(model, HotLoraConfig(plan=plan, r=4))
    fill(model, 0, scale=0.05)
    model.train()
    torch.manual_seed(0)
    without = run(model)
    with dense_mixer(model):
        torch.manual_seed(0)
        ours = run(model)
    assert torch.equal(ours["logits"], without["logits"])
    routers = [f"{layer.router}.lora" for layer in moe_layers(model)]
    changes = [(ours[n] - without[n]).norm() / without[n].norm() for n in ours if n.startswith(tuple(routers))]
    assert len(changes) == 2 * len(routers) and min(changes) > 1e-2 and all(g.isfinite().all() for g in ours.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_with_gradient_checkpointing(family):
    model = training(tiny_model(family))
    with dense_mixer(model):
        plain = run(model)
        model.get_base_model().gradient_checkpointing_enable(checkpoint_kwargs())
        is_close(run(model), plain, 1e-5)


def test_dropout_and_torchs_random_numbers_are_as_without_it():
    model = training(tiny_model(num_hidden_layers=1, attention_dropout=0.2), lora_dropout=0.3, train_attention=False)
    found = []
    for context in (nullcontext, lambda: dense_mixer(model)):
        torch.manual_seed(0)
        with context():
            found.append([run(model), run(model), torch.rand(3)])
        assert experts_of(model)[0].training
    assert torch.equal(found[0][2], found[1][2])
    for without, ours in zip(found[0][:2], found[1][:2], strict=True):
        for name in ours:
            assert torch.equal(ours[name], without[name]) is (".gate.lora" not in name), name


def test_evaluation_computes_nothing_more():
    model, calls = training(tiny_model()), []
    experts_of(model)[0].register_forward_hook(lambda *_: calls.append(1))
    with dense_mixer(model):
        run(model)
        assert len(calls) == 1 + (8 - 2) // 2  # K of the rest at a time
        model.eval()
        run(model)
        model.train()
        with torch.no_grad():
            model(input_ids=IDS)
    run(model)
    assert len(calls) == 1 + 3 + 1 + 1 + 1


def test_nothing_as_large_as_all_experts_outputs_is_made():
    model, rows, tokens = training(tiny_model(num_experts=32, num_hidden_layers=1)), [], IDS.numel()

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (32,) and out.numel() % (tokens * 32) == 0:
                rows.append(out.numel() // (tokens * 32))
            return out

    with dense_mixer(model), Rows():
        run(model)
    assert max(rows) == 2  # K, as in the layer itself


@pytest.mark.parametrize("bits", [8, 4])
def test_on_quantized_experts(bits):
    """As with their dequantized weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    base = tiny_model(**sizes)
    hotlora.quantize_experts(base, bits)
    dense = tiny_model(**sizes)
    for layer in moe_layers(base):
        ours, theirs = base.get_submodule(layer.experts), dense.get_submodule(layer.experts)
        for name in ("gate_up_proj", "down_proj"):
            getattr(theirs, name).data.copy_(getattr(ours, name).dequantize())
    found = []
    for model in (training(base), training(dense)):
        with dense_mixer(model):
            found.append(run(model))
    is_close(*found, 1e-4)


def test_in_bfloat16_under_autocast():
    wide, narrow = training(tiny_model()), training(tiny_model().to(torch.bfloat16))
    with dense_mixer(wide), dense_mixer(narrow):
        expected = run(wide)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = run(narrow)
    for name, value in expected.items():
        assert (ours[name].float() - value).norm() <= 0.15 * value.norm(), name


def test_full_fine_tuning_has_it_too():
    model = tiny_model().train()
    without = run(model)
    with dense_mixer(model):
        ours = run(model)
    assert torch.equal(ours["logits"], without["logits"])
    name = "model.layers.1.mlp.gate.weight"
    assert (ours[name] - without[name]).norm() > 1e-3 * without[name].norm()
    assert torch.equal(ours["model.layers.1.mlp.experts.down_proj"], without["model.layers.1.mlp.experts.down_proj"])


# What is refused


def test_other_routers_and_frozen_ones_are_refused():
    plan = tiny_plan(tiny_model())
    model = get_peft_model(tiny_model(), HotLoraConfig(plan=plan, train_router=False))
    with pytest.raises(HotLoraError, match="none of this model trains"), dense_mixer(model):
        pass
    with (
        pytest.raises(ModelError, match=r"this deepseek_v3 model .* leave dense_mixer out"),
        dense_mixer(zoo_model("deepseek_v3")),
    ):
        pass
    for frozen in ({"train_router": False}, {"train_router": False, "train_full_experts": True}):
        with pytest.raises(HotLoraError, match="dense_mixer is a gradient for routers"):
            RunOptions(model="nano", data="nano-math", dense_mixer=True, **frozen)


def test_experts_on_other_processes_are_refused(monkeypatch):
    model = training(tiny_model())
    unwrap(experts_of(model)[1])._is_expert_parallel = True
    with pytest.raises(HotLoraError, match="needs all experts in each process"), dense_mixer(model):
        pass
    monkeypatch.setattr("hotlora.runs.checks.uses_deepspeed", lambda: True)
    with pytest.raises(HotLoraError, match="DenseMixer, re-profiling and growing ranks need all weights"):
        check_run(RunOptions(model="nano", data="nano-math", dense_mixer=True, device="cpu"))


def test_the_hooks_are_gone_afterwards_and_where_training_fails():
    model = training(tiny_model())
    with pytest.raises(KeyError), dense_mixer(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_groups_of_experts_are_refused_where_they_limit_the_choice():
    config = {"n_group": 4, "topk_group": 1, "topk_method": "group_limited_greedy"}
    model = zoo_model("deepseek_v2")
    check_softmax_routers(model, "dense_mixer")
    for name, value in config.items():
        setattr(model.config, name, value)
    limited = type(model)(model.config)
    with pytest.raises(ModelError, match="deepseek_v2"):
        check_softmax_routers(limited, "dense_mixer")


# In a run

WORDS = ("--limit", 8, "--test-limit", 2, "--no-evaluate", "--device", "cpu", "--max-length", 64, "--r", 4)


def test_a_run_is_begun_with_it_and_goes_on_with_it_alone(call, tmp_path):
    words = ["train", "--model", "nano", "--data", "nano-math", "-o", tmp_path / "run", *WORDS, "--max-steps", 2]
    assert call(*words, "--dense-mixer", "--quantize", 8, "--gradient-checkpointing")[0] == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["dense_mixer"] is True
    code, _, err = call(*words, "--quantize", 8, "--gradient-checkpointing")
    assert code == 1 and "--dense-mixer off against on (now against then)" in err
    assert call(*words, "--dense-mixer", "--quantize", 8, "--gradient-checkpointing")[0] == 0


def test_a_family_without_is_told_before_its_weights_are_read(call, tmp_path):
    zoo_model("glm4_moe").config.save_pretrained(tmp_path / "model")
    code, _, err = call(
        "train", "--model", tmp_path / "model", "--data", "nano-math", "-o", tmp_path / "run", "--dense-mixer"
    )
    assert code == 1 and "this glm4_moe model" in err and not (tmp_path / "run").exists()


def test_a_run_differs_from_one_without_and_resumes_exactly(tmp_path):
    base = hotlora.load_model("nano", device="cpu")
    ExpertPlan({layer.layer: (0, 1) for layer in moe_layers(base)}, 32, "first", {}).save(tmp_path / "plan.json")
    common = {"model": "nano", "data": "nano-math", "limit": 8, "test_limit": 2, "evaluate": False, "r": 4,
              "device": "cpu", "max_length": 64, "lr_scheduler": "constant", "batch_size": 2, "lora_dropout": 0.1,
              "plan": tmp_path / "plan.json"}  # fmt: skip
    hotlora.train(**common, output=tmp_path / "without", max_steps=1)
    hotlora.train(**common, output=tmp_path / "once", max_steps=2, dense_mixer=True)
    hotlora.train(**common, output=tmp_path / "twice", max_steps=1, dense_mixer=True)
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("without", "twice", "once")]
    assert adapters[0].read_bytes() != adapters[1].read_bytes()
    hotlora.train(**common, output=tmp_path / "twice", max_steps=2, dense_mixer=True, extend=True)
    assert adapters[1].read_bytes() == adapters[2].read_bytes()
    without, once = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("without", "once"))
    assert json.loads(without[0])["loss"] == json.loads(once[0])["loss"]  # the first step's forward is the same
