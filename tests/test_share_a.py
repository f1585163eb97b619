"""`share_a`: one A of gate and up, and one B of down, for all planned experts of a layer."""

import json

import pytest
import torch
from peft import get_peft_model
from readers import read_gguf, read_mlx, read_sglang, read_sglang_shared, read_vllm
from safetensors import safe_open
from safetensors.torch import load_file
from test_adapter import OLMOE, published, reference_block
from test_engine_formats import needs_gguf
from test_factors import (
    BATCH,
    LAYOUTS,
    adapted,
    by_hand,
    dora_by_hand,
    experts_of,
    logits,
    merges_and_comes_out_again,
    same_after_saving,
)
from test_verify import verified
from tiny import FAMILIES, fill, tiny_batch, tiny_model, tiny_plan
from zoo import zoo_model

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters
from hotlora.adapter.formats.export import export_adapter
from hotlora.adapter.load import load_adapter
from hotlora.adapter.mask import draw_mask
from hotlora.base.errors import HotLoraError, PlanError
from hotlora.engines.call import engine_named
from hotlora.engines.exported import read_export

OUTER = ("lora_A_gate_up", "lora_B_down")
INNER = ("lora_B_gate_up", "lora_A_down")


def shared(model=None, **options):
    return adapted(model, share_a=True, **options)


def gradients(model, output):
    """Of a sum over random numbers, by parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (output * probe.to(output.dtype)).sum()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


# What is computed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_output_and_every_gradient_equal_the_loop(family, dtype, tolerance):
    model = shared(tiny_model(family).to(dtype))
    batch = {"input_ids": tiny_batch()["input_ids"]}
    output = model(**batch).logits
    ours = {"logits": output, **gradients(model, output)}
    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = lambda hidden, block=layer.mlp: reference_block(block, hidden)
    output = model(**batch).logits
    for name, reference in {"logits": output, **gradients(model, output)}.items():
        assert (ours[name] - reference).norm() <= tolerance * reference.norm(), name
        assert reference.norm() > 0, name


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", LAYOUTS)
def test_every_layout_equals_plain_code_with_every_gradient(family, use_dora):
    model = shared(zoo_model(family), use_dora=use_dora)
    plain = zoo_model(family)
    plain.set_experts_implementation("eager")
    weights = dora_by_hand(model) if use_dora else by_hand(model)
    theirs = torch.func.functional_call(plain, weights, (), dict(BATCH)).logits
    ours = model(**BATCH).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    expected = gradients(model, theirs)
    for name, mine in gradients(model, ours).items():
        assert (mine - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-5, name


def unshared(model, **options):
    """An adapter of the same values, with an A and a B for each expert."""
    other = adapted(tiny_model(), randomise=False, **options)
    values = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(values[name].expand_as(parameter))
    return other


OPTIONS = [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"use_rslora": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernels", ["", "gpu"])
def test_it_is_the_unshared_adapter_with_equal_factors(options, kernels, monkeypatch):
    """Bit for bit, dropout's masks too; its gradient is the sum of the experts'."""
    if kernels:  # a GPU's products, which torch makes here
        from hotlora.layer import function

        monkeypatch.setattr(function, "cpu", function.gpu)
    model = shared(**options)
    other = unshared(model, **options)
    found = []
    for each in (model, other):
        each.train()
        torch.manual_seed(0)
        output = each(**BATCH).logits
        found.append((output, gradients(each, output)))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        its = found[1][1][name]
        if gradient.shape != its.shape:
            assert any(part in name for part in OUTER) and gradient.shape[0] == 1 and its.shape[0] == 3
            its = its.sum(0, keepdim=True)
        torch.testing.assert_close(gradient, its, rtol=1e-4, atol=1e-6)


def test_nothing_is_held_for_each_expert():
    for layer in experts_of(shared()):
        for name in OUTER:
            assert len(getattr(layer, name)["default"]) == 1
        for name in INNER:
            assert len(getattr(layer, name)["default"]) == 3
        A_gate_up, _, _, B_down = layer._tensors_of("default", layer._groups["default"][0])
        assert A_gate_up.stride(0) == B_down.stride(0) == 0


def test_it_starts_as_the_base_bit_for_bit():
    assert torch.equal(logits(shared(randomise=False)), logits(tiny_model()))


# What goes with it


def test_merged_and_unmerged():
    merges_and_comes_out_again(shared())
    merges_and_comes_out_again(shared(use_dora=True))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"train_a": False, "a_seed": 3}], ids=str)
def test_saved_and_loaded(options, tmp_path):
    model = shared(**options)
    same_after_saving(model, tmp_path, tiny_model)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["share_a"] is True
    sizes = {
        tensor.shape for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "B_down" in name
    }
    assert sizes == {(1, 32, 4)}


def test_an_adapter_of_before_has_none(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    del saved["share_a"]
    file.write_text(json.dumps(saved))
    assert load_adapter(tiny_model(), tmp_path).peft_config["default"].share_a is False


def test_ranks_that_differ_within_a_layer_are_refused():
    with pytest.raises(PlanError, match=r"one rank for all experts of a layer, .* layer 0 the ranks \[2, 4, 8\]"):
        shared(ranks={"0": [2, 4, 8], "1": [4, 4, 4]})
    model = shared(ranks={"0": [2, 2, 2], "1": [8, 8, 8]})  # between layers they may
    assert logits(model).isfinite().all()
    with pytest.raises(PlanError, match="leave out share_a"):
        HotLoraConfig(plan=tiny_plan(tiny_model()), share_a=True, train_full_experts=True)


def test_counts():
    """OLMoE-1B-7B at rank 32, 16 experts a layer: 2 R D + 3 N R F + R D a layer."""
    model = published("olmoe", **OLMOE)
    plan = tiny_plan(model, {layer: list(range(16)) for layer in range(16)})
    with torch.device("meta"):
        counts = count_parameters(get_peft_model(model, HotLoraConfig(plan=plan, r=32, share_a=True)))
    assert counts["experts"] == 16 * 32 * (3 * 2048 + 3 * 16 * 1024)


def test_params_counts_it_and_its_flops_are_the_same(call, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    found = {}
    for words in ((), ("--share-a",)):
        code, out, _ = call("params", tmp_path, "--experts-per-layer", 3, "--r", 4, *words, "--estimate", "--json")
        assert code == 0
        found[words] = json.loads(out)
    plain, ours = found.values()
    assert plain["experts"] - ours["experts"] == 2 * (3 - 1) * 3 * 4 * 32  # layers, experts but one, factors, R, D
    assert ours["estimate"]["trainable"] == ours["trainable"] < plain["trainable"]
    assert ours["adapter_flops"] == plain["adapter_flops"]


def test_a_run_is_begun_with_it_and_goes_on_with_it_alone(call, tmp_path):
    words = ["train", "--model", "nano", "--data", "nano-math", "-o", tmp_path / "run", "--limit", 32, "--max-steps", 1]
    words += ["--no-evaluate", "--device", "cpu", "--max-length", 64, "--r", 4]
    assert call(*words, "--share-a")[0] == 0
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["share_a"] is True and record["config"]["share_a"] is True
    code, _, err = call(*words)
    assert code == 1 and "--share-a off against on (now against then)" in err
    assert call(*words, "--share-a")[0] == 0
    code, out, _ = call("export", tmp_path / "run", "-o", tmp_path / "out", "-f", "sglang-shared", "--drop-router")
    assert code == 0 and "The adapter's file has" in out and "(--max-loras-per-batch), whatever it has" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--max-loras-per-batch 2 --experts-shared-outer-loras \\" in card and out.splitlines()[-1] in card


def test_adapters_are_combined_as_ones_that_share_nothing():
    """Exactly, with plans that differ: an expert that one leaves out gets the other's part."""
    model = shared()
    plan = tiny_plan(tiny_model(), {0: [0, 1], 1: [6, 7]})
    model.add_adapter("other", HotLoraConfig(plan=plan, r=2, lora_alpha=6, share_a=True))
    fill(model, 1, "other", scale=0.05)
    expected = {}
    for layer in experts_of(model):
        total = {}
        for name, weight in (("default", 0.5), ("other", 2.0)):
            up, down = layer.get_delta_weight(name)
            for n, expert in enumerate(layer.expert_ids[name]):
                was = total.get(expert, (0, 0))
                total[expert] = was[0] + weight * up[n], was[1] + weight * down[n]
        expected[layer] = total
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="cat")
    assert model.peft_config["both"].share_a is False
    for layer, total in expected.items():
        up, down = layer.get_delta_weight("both")
        assert layer.expert_ids["both"] == tuple(sorted(total))
        for n, expert in enumerate(layer.expert_ids["both"]):
            torch.testing.assert_close(up[n], total[expert][0])
            torch.testing.assert_close(down[n], total[expert][1])


def test_a_mask_is_drawn_and_trained_on():
    model = shared(train_a=False, randomise=False)
    fill(model, 0, scale=0.05)
    mask = draw_mask(model, keep=0.25)
    sparse = shared(train_a=False, mask=mask, randomise=False)
    assert {tuple(shape) for name, shape in mask.shapes.items() if "B_down" in name} == {(1, 32, 4)}
    with torch.no_grad():
        for parameter in sparse.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.1)
    assert (logits(sparse) - logits(tiny_model())).norm() > 0
    with pytest.raises(HotLoraError, match="draw the mask from an adapter with the same plan and rank"):
        adapted(train_a=False, mask=mask)


# Exported

READERS = [
    ("vllm", read_vllm), ("sglang", read_sglang), ("sglang-shared", read_sglang_shared), ("mlx", read_mlx),
    pytest.param("gguf", read_gguf, marks=needs_gguf),
]  # fmt: skip


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "qwen2_moe"])
@pytest.mark.parametrize(("format", "read"), READERS)
def test_every_format_is_the_adapted_model(family, format, read, tmp_path):
    if family == "nemotron_h" and format in ("mlx", "gguf"):
        pytest.skip("no family of the format")
    model = shared(zoo_model(family), train_router=False)
    export_adapter(model, tmp_path / "out", format=format)
    found = logits(read(tmp_path / "out", zoo_model(family)))
    assert (found - logits(model)).norm() <= 1e-5 * logits(model).norm()
    assert (found - logits(zoo_model(family))).norm() > 1e-3 * found.norm()


def test_the_shared_form_has_each_shared_factor_once(tmp_path):
    """And nothing of cold experts. Numbered keys come first in the file, by which SGLang 0.5.23 goes: of a projection's
    numbered tensors it takes A and B for numbered, unless one that is shared comes after them."""
    model = shared(tiny_model("qwen3_moe"), train_router=False, train_attention=False)
    export_adapter(model, tmp_path / "out", format="sglang-shared")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    at = "base_model.model.model.layers.0.mlp.experts."
    layer = {key.removeprefix(at): shape for key, shape in shapes.items() if key.startswith(at)}
    own = {f"{expert}.{name}": shape for expert in (1, 3, 6) for name, shape in {
        "down_proj.lora_A.weight": (4, 16), "gate_proj.lora_B.weight": (16, 4), "up_proj.lora_B.weight": (16, 4),
    }.items()}  # fmt: skip
    of_all = {
        "down_proj.lora_B.weight": (1, 32, 4), "gate_proj.lora_A.weight": (1, 4, 32),
        "up_proj.lora_A.weight": (1, 4, 32),
    }  # fmt: skip
    assert list(layer.items()) == [*own.items(), *of_all.items()] and len(shapes) == 2 * len(layer)


def test_what_shares_nothing_has_no_shared_form(tmp_path):
    with pytest.raises(HotLoraError, match=r"'sglang-shared' .* share_a .* use format 'sglang'"):
        export_adapter(adapted(train_router=False), tmp_path / "out", format="sglang-shared")
    assert not (tmp_path / "out").exists()


def test_other_scalings_and_ranks_become_one(tmp_path):
    model = shared(zoo_model("qwen2_moe"), train_router=False, use_rslora=True, rank_pattern={"q_proj": 8})
    export_adapter(model, tmp_path / "out", format="sglang-shared")
    found = logits(read_sglang_shared(tmp_path / "out", zoo_model("qwen2_moe")))
    assert (found - logits(model)).norm() <= 1e-5 * logits(model).norm()


def test_verify_knows_the_shared_form(tmp_path):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    model = shared(hotlora.load_model(base, device="cpu"), train_router=False)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    out = export_adapter(model, tmp_path / "out", format="sglang-shared")
    assert read_export(out).kind == "shared-outer" in engine_named("sglang").takes
    with pytest.raises(HotLoraError, match=r"--format vllm or sglang or merged, and .* was with sglang-shared:"):
        verified(tmp_path, out, engine="vllm")


def test_plain_peft_and_merged(tmp_path):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    model = shared(hotlora.load_model(base, device="cpu"))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    for engine, format in (("peft", "peft"), ("transformers", "merged")):
        export_adapter(model, tmp_path / format, format=format)
        assert verified(tmp_path, tmp_path / format, engine=engine).is_applied
