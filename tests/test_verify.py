"""`hotlora verify`: what an engine applies of an exported adapter. The engines are plain transformers and plain PEFT;
the broken exports are broken on disk."""

import importlib
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from readers import read_vllm
from safetensors.torch import load_file, save_file
from tiny import fill, tiny_model, tiny_plan
from zoo import zoo_model

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.experts import HotLoraExperts
from hotlora.adapter.formats.export import export_adapter
from hotlora.base.errors import FileError, HotLoraError, PlanError
from hotlora.engines import call as call_module
from hotlora.engines.call import check_engine
from hotlora.engines.expected import Effects, at_scale, effects, kinds_of, left_out, log_probs, tokens_asked
from hotlora.engines.runner import Answer
from hotlora.engines.texts import chosen, given_texts, random_texts, routes_of, uses_of
from hotlora.engines.verdict import judge
from hotlora.hf.moe_layers import moe_layers
from hotlora.runs.export import export_saved

EXPERTS = (1, 3, 6)
PARTS = [(layer, expert) for layer in (0, 1) for expert in EXPERTS]
GROUPS = [0, 1, "attention", "router"]


def adapted(base=None, **options):
    base = tiny_model("olmoe") if base is None else base
    model = get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, lora_alpha=8, **options))
    fill(model, 1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """base/, adapter/ of it, and peft/ and merged/, which were exported from that."""
    where = tmp_path_factory.mktemp("verify")
    tiny_model("olmoe").save_pretrained(where / "base")
    model = adapted(hotlora.load_model(where / "base", device="cpu"))
    model.peft_config["default"].base_model_name_or_path = str(where / "base")
    model.save_pretrained(where / "adapter")
    for format in ("peft", "merged"):
        export_adapter(model, where / format, format=format)
    return where


@pytest.fixture
def here(monkeypatch):
    """Runner files run in this process, which spares ten seconds of imports each."""
    monkeypatch.syspath_prepend(Path(call_module.__file__).parent)

    def ask(name, request, python=None):
        runner = importlib.import_module(call_module.engine_named(name).runner.removesuffix(".py"))
        answer = runner.probe(request)
        return torch.tensor(answer.base).double(), torch.tensor(answer.adapted).double(), answer

    monkeypatch.setattr("hotlora.engines.verify.ask", ask)


def verified(folder, export=None, **options):
    return hotlora.verify_export(
        export or folder / "peft", folder / "adapter", **{"engine": "peft", "device": "cpu", **options}
    )


def statuses(found):
    return {part.part: part.status for part in found.verdict.parts}


# Exports that are whole


@pytest.mark.parametrize(("engine", "format"), [("peft", "peft"), ("transformers", "merged")])
def test_a_whole_export_is_applied(folder, engine, format):
    found = verified(folder, folder / format, engine=engine)
    assert found.is_applied and found.engine == engine and found.versions["transformers"]
    assert found.verdict.base_max < 1e-4 and found.verdict.difference < 1e-4 < 0.01 < found.verdict.effect
    assert statuses(found) == dict.fromkeys([*PARTS, *GROUPS], "applied")


# Exports that are broken on disk


def broken(folder, tmp_path, change):
    """A copy of the plain PEFT adapter with other tensors."""
    out = tmp_path / "broken"
    shutil.copytree(folder / "peft", out)
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def experts_of(tensors, layer):
    """(gate_up's A `[E, 2R, D]`, its B `[2F, 2R, E]`, down's A `[E, R, F]`, its B `[D, R, E]`): views."""
    at = f"layers.{layer}.mlp.experts."
    gate_up, down = (
        [next(t for key, t in tensors.items() if re.search(re.escape(at) + pattern + side, key)) for side in "AB"]
        for pattern in (r"base_layer\.lora_", r"lora_")
    )
    if gate_up[1].shape[0] == 32 and gate_up[0].shape[1] != 32:
        gate_up, down = down, gate_up
    views = []
    for A, B in (gate_up, down):
        views += [A.unflatten(0, (8, -1)), B.unflatten(1, (-1, 8))]
    return views


def zero_expert(tensors, layer, expert):
    _, B_gate_up, _, B_down = experts_of(tensors, layer)
    assert B_gate_up[..., expert].any() and B_down[..., expert].any()
    B_gate_up[..., expert] = 0
    B_down[..., expert] = 0


@pytest.mark.usefixtures("here")
def test_one_expert_without_its_factors_is_named(folder, tmp_path):
    found = verified(folder, broken(folder, tmp_path, lambda tensors: zero_expert(tensors, 1, 3)))
    assert found.verdict.applied == "partly" and not found.is_applied
    assert statuses(found) == {**dict.fromkeys([*PARTS, *GROUPS], "applied"), (1, 3): "missing"}
    assert found.verdict.unexplained < 1e-4 < found.verdict.difference


@pytest.mark.usefixtures("here")
def test_a_layer_without_its_factors_is_named(folder, tmp_path):
    def change(tensors):
        for expert in EXPERTS:
            zero_expert(tensors, 0, expert)

    found = verified(folder, broken(folder, tmp_path, change))
    assert found.verdict.applied == "partly"
    assert Counter(statuses(found).values()) == {"missing": 4, "applied": 6} and statuses(found)[0] == "missing"
    assert all(statuses(found)[0, expert] == "missing" for expert in EXPERTS)


@pytest.mark.usefixtures("here")
def test_gate_and_up_in_each_others_place_are_not_passed(folder, tmp_path):
    def change(tensors):
        for layer in (0, 1):
            _, B, _, _ = experts_of(tensors, layer)
            B.copy_(B.roll(16, 0))

    found = verified(folder, broken(folder, tmp_path, change))
    assert found.verdict.applied == "partly" and found.verdict.unexplained > 1e-3
    assert "applied" not in {statuses(found)[part] for part in PARTS}
    assert statuses(found)["attention"] == "applied"


@pytest.mark.usefixtures("here")
def test_half_the_scale_is_told_as_such(folder, tmp_path):
    out = tmp_path / "half"
    shutil.copytree(folder / "peft", out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["lora_alpha"] /= 2
    config["alpha_pattern"] = {name: alpha / 2 for name, alpha in config["alpha_pattern"].items()}
    (out / "adapter_config.json").write_text(json.dumps(config))
    found = verified(folder, out)
    assert found.verdict.applied == "partly" and found.verdict.scale == pytest.approx(0.5)
    assert set(statuses(found).values()) == {"in part"}


@pytest.mark.usefixtures("here")
def test_an_engine_that_ignores_the_adapter_is_told(folder):
    """The base itself in the merged checkpoint's place."""
    found = verified(folder, folder / "base", engine="transformers")
    assert found.verdict.applied == "no" and abs(found.verdict.share) < 1e-3
    assert set(statuses(found).values()) == {"missing"}
    assert found.verdict.difference == pytest.approx(found.verdict.effect, rel=1e-3)


@pytest.mark.usefixtures("here")
def test_another_base_says_nothing_of_the_adapter(folder, tmp_path):
    other = tiny_model("olmoe", seed=5)
    other.save_pretrained(tmp_path / "other")
    found = verified(folder, engine_base=tmp_path / "other")
    assert found.verdict.applied == "base differs" and not found.is_applied


@pytest.mark.usefixtures("here")
def test_the_command_shows_a_table_and_fails_where_a_part_is_missing(folder, tmp_path, call):
    export = broken(folder, tmp_path, lambda tensors: zero_expert(tensors, 1, 3))
    words = ["verify", export, "--adapter", folder / "adapter", "--engine", "peft", "--device", "cpu"]
    code, out, _ = call(*words)
    assert code == 1 and "experts missing" in out and "1 of 6: layer 1: 3" in out and "applied: partly" in out
    code, out, _ = call(*words, "--json")
    data = json.loads(out)
    assert code == 1 and data["is_applied"] is False
    assert [part["part"] for part in data["verdict"]["parts"] if part["status"] == "missing"] == [[1, 3]]


@pytest.mark.usefixtures("here")
def test_several_missing_experts_are_one_line(folder, tmp_path, call):
    def change(tensors):
        for layer, expert in ((0, 1), (1, 3), (1, 6)):
            zero_expert(tensors, layer, expert)

    export = broken(folder, tmp_path, change)
    code, out, _ = call("verify", export, "--adapter", folder / "adapter", "--engine", "peft", "--device", "cpu")
    assert code == 1
    (line,) = (line for line in out.splitlines() if line.startswith("experts missing"))
    assert line.split(maxsplit=2)[2].strip() == "3 of 6: layer 0: 1; layer 1: 3, 6"
    assert "applied: partly" in out.splitlines()[-1]


@pytest.fixture
def served(folder, tmp_path, monkeypatch):
    """base/ and adapter/ of an export with the router merged, and an engine that applies adapters as vLLM does."""
    model = hotlora.load_adapter(hotlora.load_model(folder / "base", device="cpu"), folder / "adapter")
    out = export_adapter(model, tmp_path / "served", format="vllm", merge_router=True)

    def ask(name, request, python=None):
        base = hotlora.load_model(request.base, device="cpu", dtype="float32")
        texts, tokens = torch.tensor(request.texts), torch.tensor(request.tokens)
        found = [log_probs(m, texts, tokens) for m in (base, read_vllm(request.export, base))]
        return *found, Answer([], [], "float32", "cpu")

    monkeypatch.setattr("hotlora.engines.verify.ask", ask)
    monkeypatch.setattr("hotlora.engines.verify.check_engine", lambda *_: {})
    return out


def test_an_export_with_a_merged_router_is_its_base_and_its_adapter(folder, served):
    """The router's update is in both the base and the sum, so nothing is said of it by itself."""
    found = verified(folder, served, engine="vllm")
    assert found.is_applied and found.verdict.base_max < 1e-4
    assert statuses(found) == dict.fromkeys([*PARTS, *(g for g in GROUPS if g != "router")], "applied")


def test_an_adapter_without_the_base_that_belongs_to_it_is_half_an_export(folder, served, tmp_path):
    with pytest.raises(FileError) as caught:
        verified(folder, served / "adapter", engine="vllm")
    assert str(caught.value) == f"{served / 'adapter'} is half an export, whose base lies beside it: give {served}."
    # A whole one may be called so, and its base may be there.
    tiny_model("olmoe").save_pretrained(tmp_path / "mine" / "base")
    model = hotlora.load_adapter(hotlora.load_model(tmp_path / "mine" / "base", device="cpu"), folder / "adapter")
    whole = export_adapter(model, tmp_path / "mine" / "adapter", format="vllm", drop_router=True)
    assert verified(folder, whole, engine="vllm").is_applied


@pytest.mark.usefixtures("here")
def test_in_half_precision_the_whole_is_told_and_experts_that_cannot_be_are_counted(folder, call):
    words = ["verify", folder / "peft", "--adapter", folder / "adapter", "--engine", "peft", "--device", "cpu"]
    code, out, _ = call(*words, "--dtype", "bfloat16", "--json")
    data = json.loads(out)
    assert code == 0 and data["dtype"] == "bfloat16" and 1e-3 < data["verdict"]["base_mean"] < 0.1
    found = {str(part["part"]): part["status"] for part in data["verdict"]["parts"]}
    assert set(found.values()) <= {"applied", "cannot be told"} and found["attention"] == "applied"
    untold = sum(found[str([layer, expert])] == "cannot be told" for layer, expert in PARTS)
    assert untold
    code, out, _ = call(*words, "--dtype", "bfloat16")
    assert code == 0 and f"applied: yes, as a whole; of {untold} experts alone it cannot be told" in out


# What is refused, before a model is loaded


def refused(folder, monkeypatch, **options):
    """The message of the error."""
    monkeypatch.setattr("hotlora.engines.verify.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(HotLoraError) as caught:
        verified(folder, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_engine_that_does_not_exist_or_is_not_installed(folder, monkeypatch, tmp_path):
    assert "engine 'tgi' does not exist: choose one of" in str(refused(folder, monkeypatch, engine="tgi"))
    python = tmp_path / "python"
    told = str(refused(folder, monkeypatch, python=python))
    assert f"{python} cannot be run (No such file or directory): give --python" in told
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "")
    told = str(refused(folder, monkeypatch, python=python))
    assert "the engine peft needs peft and transformers and torch" in told and "pip install peft" in told
    python.write_text("#!/bin/sh\necho nothing known >&2\n")
    assert "is no Python of 3.10 or newer: nothing known" in str(refused(folder, monkeypatch, python=python))


@pytest.mark.parametrize("format", ["peft", "vllm"])
def test_an_export_of_another_adapter(folder, monkeypatch, tmp_path, format):
    """Of the same base and plan: what it says is not of the adapter that is asked for."""
    saved, to = folder / "adapter", tmp_path / "out"
    export_saved(str(folder / "base"), saved, to, format=format, drop_router=format == "vllm", device="cpu")
    model = adapted(hotlora.load_model(folder / "base", device="cpu"))
    fill(model, 2)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(tmp_path / "other")
    monkeypatch.setattr("hotlora.engines.verify.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    engine = "peft" if format == "peft" else "vllm"
    with pytest.raises(FileError, match=f"out was exported from another adapter than {tmp_path / 'other'}"):
        hotlora.verify_export(tmp_path / "out", tmp_path / "other", engine=engine, device="cpu")


def test_half_an_export(folder, monkeypatch, tmp_path):
    for name, change in {
        "no weights": lambda out: (out / "adapter_model.safetensors").unlink(),
        "cut short": lambda out: (out / "adapter_model.safetensors").write_bytes(b"12345678"),
        "no config": lambda out: (out / "adapter_config.json").unlink(),
        "no base": lambda out: shutil.copytree(folder / "peft", out / "adapter") and (out / "base").mkdir(),
    }.items():
        out = tmp_path / name
        shutil.copytree(folder / "peft", out)
        change(out)
        error = refused(folder, monkeypatch, export=out)
        assert isinstance(error, FileError) and "export again" in str(error), name
    assert "export it first" in str(refused(folder, monkeypatch, export=folder / "adapter"))
    assert "is not a folder" in str(refused(folder, monkeypatch, export=tmp_path / "nowhere"))


def test_an_export_of_another_kind(folder, monkeypatch):
    told = str(refused(folder, monkeypatch, export=folder / "merged"))
    assert "the engine peft loads what is exported with --format peft, and" in told and "was with merged:" in told


def test_an_adapter_or_an_export_for_another_base(folder, monkeypatch, tmp_path):
    tiny_model("olmoe", num_experts=6).save_pretrained(tmp_path / "other")
    error = refused(folder, monkeypatch, model=str(tmp_path / "other"))
    assert isinstance(error, PlanError) and "the plan was made for" in str(error)
    for name, options in {"layers": {"num_hidden_layers": 3}, "width": {"hidden_size": 40}}.items():
        model = adapted(tiny_model("olmoe", **options))
        out = export_adapter(model, tmp_path / name, format="peft")
        error = refused(folder, monkeypatch, export=out)
        assert isinstance(error, FileError) and "is for another base than" in str(error), name


def test_the_command_tells_another_base_in_one_line(folder, tmp_path, call, capsys):
    tiny_model("olmoe", num_experts=6).save_pretrained(tmp_path / "other")
    wide = export_adapter(adapted(tiny_model("olmoe", hidden_size=40)), tmp_path / "wide", format="peft")
    capsys.readouterr()
    words = ["verify", folder / "peft", "--adapter", folder / "adapter", "--engine", "peft", "--device", "cpu"]
    code, out, err = call(*words, "--model", tmp_path / "other")
    assert code == 1 and not out and len(err.splitlines()) == 1 and "the plan was made for olmoe-" in err
    code, out, err = call("verify", wide, *words[2:])
    assert code == 1 and not out and len(err.splitlines()) == 1 and "is for another base than" in err


def test_an_engine_that_fails_is_told_with_its_last_words(folder, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
[ $# = 1 ] && exec {sys.executable} "$@"
echo "a line before" >&2; echo "KeyError: 'experts'" >&2; exit 3
""")
    python.chmod(0o755)
    with pytest.raises(HotLoraError, match=r"the engine peft could not load or run .*: KeyError: 'experts'$"):
        verified(folder, python=python)


# In our own model


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4_text"])
def test_an_expert_left_out_of_a_row_is_as_if_it_had_no_factors(family):
    model = adapted(zoo_model(family))
    texts = random_texts(model, "nowhere")[:3, :12]
    routes = routes_of(model, texts)
    layers = [layer for layer in moe_layers(model) if (routes[layer.layer] == 3).any()]
    assert layers
    rows = [(layer.layer, 3) for layer in layers] + [(layers[0].layer, None)]
    tokens = tokens_asked(model, texts[[0] * len(rows)])
    with left_out(model, rows, 12):
        found = log_probs(model, texts[[0] * len(rows)], tokens)
    whole = log_probs(model, texts[:1], tokens[:1])
    for n, (layer, expert) in enumerate(rows):
        experts = model.get_submodule(next(its.experts for its in moe_layers(model) if its.layer == layer))
        assert isinstance(experts, HotLoraExperts)
        places = slice(None) if expert is None else EXPERTS.index(expert)
        kept = [experts.lora_B_gate_up["default"].data.clone(), experts.lora_B_down["default"].data.clone()]
        for factor in (experts.lora_B_gate_up, experts.lora_B_down):
            factor["default"].data[places] = 0
        wanted = log_probs(model, texts[:1], tokens[:1])[0]
        for factor, values in zip((experts.lora_B_gate_up, experts.lora_B_down), kept, strict=True):
            factor["default"].data.copy_(values)
        assert (found[n] - wanted).abs().max() < 2e-5
        if expert is None:
            assert (wanted - whole[0]).abs().max() > 1e-3
    assert torch.equal(log_probs(model, texts[:1], tokens[:1]), whole)


def test_few_texts_are_chosen_and_reach_all_experts():
    model = adapted()
    texts = random_texts(model, "nowhere")
    assert texts.shape == (128, 32) and texts.min() > 2 and texts.max() < 128
    uses = uses_of(routes_of(model, texts), PARTS)
    picked = chosen(uses, 2)
    assert 2 <= len(picked) <= 4 and (uses[picked].sum(0) > 0).all()
    rare = torch.zeros(5, 3, dtype=torch.int64)
    rare[4, 1] = 1  # expert 1 by one text, expert 0 by none
    rare[1, 2] = 9
    assert chosen(rare, 1) == [1, 4] and len(chosen(rare, 3)) == 3


def test_rows_become_texts_of_one_length():
    assert given_texts([[1] * 20, [2] * 50]).shape == (2, 32)
    with pytest.raises(HotLoraError, match="the data has 3 tokens"):
        given_texts([[1, 2, 3]])


def simulated(noise, seed=0):
    """Base, whole and effects of 20 experts in 4 texts, and an engine's noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 31, 12)

    def drawn(size):
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    base, effect = drawn(1.0), drawn(0.3)
    experts = {(0, e): dict(enumerate(drawn(0.02 if e else 1e-4))) for e in range(20)}
    experts[1, 0] = {}
    groups = {0: drawn(0.1), "experts": drawn(0.1), "attention": drawn(0.2)}
    return base, base + effect, Effects(experts, groups, {}), drawn(noise), drawn(noise)


def test_what_is_below_the_noise_cannot_be_told_and_what_no_text_reaches_neither():
    base, whole, its, noise, more = simulated(0.01)
    verdict = judge(base, whole, base + noise, whole + more, its, dtype="bfloat16")
    found = {part.part: part.status for part in verdict.parts}
    assert verdict.applied == "yes"
    assert found[0, 0] == "cannot be told" and found[1, 0] == "not reached"
    assert [found[0, e] for e in range(1, 20)] == ["applied"] * 19


def test_an_expert_that_fell_otherwise_at_one_position_is_no_missing_part():
    """Where the base shows that the engine rounds, whatever dtype it names: llama.cpp's cache is in float16."""
    base, whole, its, noise, more = simulated(4e-4)
    more[2, 5] += 0.3
    verdict = judge(base, whole, base + noise, whole + more, its, dtype="float32")
    assert verdict.applied == "yes" and verdict.difference > 10 * verdict.base_mean
    assert not any(part.status in ("missing", "in part") for part in verdict.parts)


def test_a_missing_expert_is_found_in_noise_and_no_other_is_blamed():
    base, whole, its, noise, more = simulated(0.01)
    gone = torch.stack([its.experts[0, 7][text] for text in range(4)])
    verdict = judge(base, whole, base + noise, whole + gone + more, its, dtype="bfloat16")
    assert verdict.applied == "partly"
    assert [part.part for part in verdict.parts if part.status == "missing"] == [(0, 7)]
    assert not any(part.status == "in part" for part in verdict.parts)


def test_an_effect_below_the_noise_is_not_passed():
    base, _, its, noise, more = simulated(0.05)
    tiny = {part: {t: change / 1e3 for t, change in texts.items()} for part, texts in its.experts.items()}
    its = Effects(tiny, {name: change / 1e3 for name, change in its.groups.items()}, {})
    whole = base + 1e-4
    verdict = judge(base, whole, base + noise, base + more, its, dtype="bfloat16")
    assert verdict.applied == "cannot be told"
    assert not any(part.status == "applied" for part in verdict.parts)


def of_part(its, layer, expert):
    return torch.stack([its.experts[layer, expert][text] for text in range(4)])


def test_what_no_part_explains_is_not_passed_of_a_weak_adapter_either():
    """As after a few steps: what is wrong is a tenth of the effect, and far above the rounding."""
    base, whole, its, noise, more = simulated(1e-7)
    whole = base + (whole - base) / 1000
    wrong = torch.randn(base.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 3e-5
    verdict = judge(base, whole, base + noise, whole + wrong + more, its, dtype="float32")
    assert verdict.applied == "partly" and verdict.unexplained > 2e-5
    assert judge(base, whole, base + noise, whole + more, its, dtype="float32").applied == "yes"


def test_a_scale_that_explains_little_blames_no_part():
    base, whole, its, noise, more = simulated(1e-6)
    effect = whole - base
    its = Effects(its.experts, its.groups, {0.5: -effect / 2, 2.0: effect})
    wrong = torch.randn(base.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 0.1
    verdict = judge(base, whole, base + noise, whole + wrong + 0.1 * effect + more, its, dtype="float32")
    assert verdict.applied == "partly" and verdict.scale is None
    assert not any(part.status in ("missing", "in part") for part in verdict.parts)
    half = judge(base, whole, base + noise, whole - 0.4 * effect + more, its, dtype="float32")
    assert half.applied == "partly" and half.share == pytest.approx(0.6, abs=0.01)


def test_the_only_expert_of_a_layer_that_is_applied_is_named():
    base, whole, its, noise, more = simulated(1e-6)
    verdict = judge(base, whole, base + noise, whole + its.groups[0] - of_part(its, 0, 7) + more, its, dtype="float32")
    found = {part.part: part for part in verdict.parts}
    assert found[0, 7].status == "applied" and found[0, 7].share == pytest.approx(1, abs=0.05)
    assert {found[0, e].status for e in range(1, 20) if e != 7} == {"missing"}


def test_numbers_that_an_engine_does_not_give_are_left_out():
    base, whole, its, noise, more = simulated(1e-5)
    noise[:, :, 3:] = float("nan")
    gone = torch.stack([its.experts[0, 7][text] for text in range(4)])
    verdict = judge(base, whole, base + noise, whole + gone + more, its, dtype="float32")
    assert verdict.compared == 4 * 31 * 3
    assert [part.part for part in verdict.parts if part.status == "missing"] == [(0, 7)]


def test_kinds_and_their_scale():
    model = adapted(zoo_model("qwen2_moe"))
    kinds = kinds_of(model)
    assert list(kinds) == ["experts", "attention", "router", "shared experts"]
    texts = random_texts(model, "nowhere")[:2, :9]
    tokens = tokens_asked(model, texts)
    whole = log_probs(model, texts, tokens)
    everything = [module for modules in kinds.values() for module in modules]
    with at_scale(everything, 0), model.disable_adapter():
        base = log_probs(model, texts, tokens)
    with at_scale(everything, 0):
        assert torch.allclose(log_probs(model, texts, tokens), base, atol=1e-5)
    assert torch.equal(log_probs(model, texts, tokens), whole) and not torch.allclose(whole, base, atol=1e-3)
    layers = sorted(layer.layer for layer in moe_layers(model))
    parts = [(layer, 1) for layer in layers]
    its = effects(model, texts, tokens, whole, uses_of(routes_of(model, texts), parts), parts, kinds)
    assert set(its.groups) == {*layers, *kinds} and set(its.scaled) == {0.25, 0.5, 2.0}


def test_left_out_is_the_base_with_dora_too():
    """Whose magnitudes act where the low-rank update is 0."""
    model = adapted(use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    texts = random_texts(model, "nowhere")[:2, :9]
    tokens = tokens_asked(model, texts)
    whole, trained = log_probs(model, texts, tokens), [p.requires_grad for p in model.parameters()]
    with at_scale([module for modules in kinds_of(model).values() for module in modules], 0):
        left = log_probs(model, texts, tokens)
    assert [p.requires_grad for p in model.parameters()] == trained
    with model.disable_adapter():
        assert torch.allclose(left, log_probs(model, texts, tokens), atol=1e-5)
    assert torch.equal(log_probs(model, texts, tokens), whole) and not torch.allclose(left, whole, atol=1e-3)


def test_the_engines_versions_are_told_without_importing_it():
    assert check_engine("peft")["peft"]


@pytest.mark.slow
def test_our_own_part_takes_less_than_five_forwards_of_a_text_for_each_expert(tmp_path, monkeypatch):
    """In tokens, for OLMoE's 16 layers of 64 experts, a quarter of them adapted."""
    base = tiny_model("olmoe", num_hidden_layers=16, num_experts=64, num_experts_per_tok=8, vocab_size=512)
    base.save_pretrained(tmp_path / "base")
    plan = tiny_plan(base, {layer: list(range(0, 64, 4)) for layer in range(16)})
    model = get_peft_model(base, HotLoraConfig(plan=plan, r=4, lora_alpha=8))
    fill(model, 1)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    export_adapter(model, tmp_path / "peft", format="peft")
    tokens = []
    forward = type(base).forward

    def counted(self, *args, **kwargs):
        tokens.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(base), "forward", counted)
    found = verified(tmp_path)
    assert found.is_applied and sum(part.status == "applied" for part in found.verdict.parts) >= 256
    assert sum(tokens) < 5 * 256 * 32
