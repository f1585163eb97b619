"""`hotlora bench`: what is counted and computed. Times are never tested."""

import json
import multiprocessing
import re
import sys

import psutil
import pytest
import torch
from peft.tuners.lora import Linear, ParamWrapper
from tiny import tiny_batch, tiny_config, tiny_model
from transformers import OlmoeConfig, OlmoeForCausalLM
from zoo import families, zoo_model

from hotlora.adapter.count import parameters_from_config
from hotlora.adapter.experts import HotLoraExperts
from hotlora.base.errors import FileError, HotLoraError, ModelError
from hotlora.base.files import write_json
from hotlora.bench import bench, worker
from hotlora.bench.bench import BenchConfig, run_bench, run_growth
from hotlora.bench.contenders import Contender, RandomModel, adapted, skew_routers, spreads_for, unroll_experts
from hotlora.bench.report import growth_figure, growth_lines, markdown, read_result, speed_tables, summary_table
from hotlora.bench.worker import Worker
from hotlora.cost.activations import SavedBytes
from hotlora.cost.flops import (
    attention_adapter_flops,
    dense_update_flops,
    expert_adapter_flops,
    forward_flops,
    step_flops,
)
from hotlora.hf.moe_layers import moe_layers
from hotlora.routing.plan import ExpertPlan, select_experts
from hotlora.routing.profiler import profile_routing
from hotlora.runs.methods import counted_options

R = 4


@pytest.fixture
def olmoe_file(tmp_path):
    """A tiny OLMoE's folder with config.json: 2 layers, E=8, K=2, D=32, F=16."""
    tiny_config("olmoe").save_pretrained(tmp_path)
    return str(tmp_path)


def all_experts(model):
    layers = moe_layers(model)
    experts = {layer.layer: tuple(range(layer.num_experts)) for layer in layers}
    return ExpertPlan(experts=experts, num_experts=layers[0].num_experts, rule="all", params={})


# --- the contenders compute the same update ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "gpt_oss", "nemotron_h", "aria_text"])
def test_loop_is_the_base_model(family):
    """Biases, transposed and interleaved weights and experts without a gate included."""
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    model = zoo_model(family)
    batch = tiny_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        unroll_experts(model)
        found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_contenders_agree_on_one_update():
    """all, peft and loop, given the same factors, have the same loss and the same gradients of attention's LoRA.

    PEFT has one A for gate and up, so all are given the same A for both.
    """
    plan, generator = all_experts(tiny_model()), torch.Generator().manual_seed(1)
    size = {"A": (8, R, 32), "B_gate": (8, 16, R), "B_up": (8, 16, R), "A_down": (8, R, 16), "B_down": (8, 32, R)}
    values = [{n: torch.randn(s, generator=generator) * 0.3 for n, s in size.items()} for _ in range(2)]
    batch = tiny_batch()
    outcomes = {}
    for kind in ("floor", "all", "peft", "loop"):
        model = adapted(tiny_model(), Contender(kind), plan, R)
        if kind != "floor":
            {"all": set_all, "peft": set_peft, "loop": set_loop}[kind](model, values)
        set_attention(model)
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        gradients = [p.grad for n, p in model.named_parameters() if "self_attn" in n and "lora_B" in n]
        assert len(gradients) == 8
        outcomes[kind] = output.logits, gradients
    assert (outcomes["all"][0] - outcomes["floor"][0]).abs().max() > 0.1
    for kind in ("peft", "loop"):
        torch.testing.assert_close(outcomes[kind][0], outcomes["all"][0], rtol=1e-4, atol=1e-5)
        for found, expected in zip(outcomes[kind][1], outcomes["all"][1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def set_attention(model):
    """PEFT draws A in another order where experts are adapted too."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "self_attn" in name and "lora_A" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def set_all(model, values):
    modules = [m for m in model.modules() if isinstance(m, HotLoraExperts)]
    for module, v in zip(modules, values, strict=True):
        module.lora_A_gate_up["default"].copy_(torch.cat([v["A"], v["A"]], dim=1))
        module.lora_B_gate_up["default"].copy_(torch.cat([v["B_gate"], v["B_up"]], dim=1))
        module.lora_A_down["default"].copy_(v["A_down"])
        module.lora_B_down["default"].copy_(v["B_down"])


@torch.no_grad()
def set_peft(model, values):
    """A is `[E*r, in]`, the expert slowest; B is `[out, r*E]`, the expert fastest."""
    modules = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(modules) == 4
    for module in modules:
        v = values[int(re.search(r"layers\.(\d)", next(n for n, m in model.named_modules() if m is module))[1])]
        if module.parameter_name == "gate_up_proj":
            A, B = v["A"], torch.cat([v["B_gate"], v["B_up"]], dim=1)
        else:
            A, B = v["A_down"], v["B_down"]
        module.lora_A["default"].weight.copy_(A.flatten(0, 1))
        module.lora_B["default"].weight.copy_(B.permute(1, 2, 0).flatten(1))


@torch.no_grad()
def set_loop(model, values):
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and ".experts." in n}
    assert len(linears) == 2 * 8 * 3
    for name, module in linears.items():
        layer, expert, part = re.search(r"layers\.(\d)\.mlp\.experts\.(\d)\.(\w+)_linear", name).groups()
        v = values[int(layer)]
        module.lora_A["default"].weight.copy_(v["A_down" if part == "down" else "A"][int(expert)])
        module.lora_B["default"].weight.copy_(v[f"B_{part}"][int(expert)])


def test_what_each_contender_trains():
    """By hand: attention is 2 layers of q, o [32, 32] and k, v [16, 32]; experts gate, up [16, 32], down [32, 16]."""
    attention = 2 * R * (2 * (32 + 32) + 2 * (32 + 16))
    expert = 3 * R * (32 + 16)
    fused = R * (32 + 32) + R * (16 + 32)  # PEFT: gate and up share A
    trained = {
        "floor": attention,
        "hot": attention + 2 * 2 * expert,
        "all": attention + 2 * 8 * expert,
        "loop": attention + 2 * 8 * expert,
        "peft": attention + 2 * 8 * fused,
    }
    for kind, expected in trained.items():
        model = tiny_model()
        profile = profile_routing(model, [tiny_batch()])
        plan = (
            select_experts(profile, rule=kind, fraction=0.25 if kind == "hot" else None)
            if kind
            in (
                "hot",
                "all",
            )
            else None
        )
        contender = Contender(kind, 0.25 if kind == "hot" else None)
        found = adapted(model, contender, plan, R)
        assert sum(p.numel() for p in found.parameters() if p.requires_grad) == expected, kind


def test_loop_copies_no_weight():
    model = tiny_model()
    fused = {p.untyped_storage().data_ptr() for n, p in model.named_parameters() if "experts" in n}
    unroll_experts(model)
    looped = {p.untyped_storage().data_ptr() for n, p in model.named_parameters() if "experts" in n}
    assert looped == fused and len(fused) == 4


# --- random models ---------------------------------------------------------------------------------------------


def test_routers_are_skewed_to_the_cv():
    config = tiny_config("olmoe", num_experts=32, num_experts_per_tok=4)
    model = RandomModel(config, torch.float32, torch.device("cpu"), seed=0).model
    ids = torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0))
    for cv in (0.9, 1.2):
        skew_routers(model, spreads_for(model, ids, cv, 0), 0)
        assert profile_routing(model, [{"input_ids": ids}]).layer_cv().tolist() == pytest.approx([cv] * 2, rel=0.03)


def test_a_model_wakes_as_it_slept():
    config = tiny_config("olmoe", num_experts=16, intermediate_size=512, hidden_size=128)
    first, second = (RandomModel(config, torch.float32, torch.device("cpu"), seed=s) for s in (0, 0))
    ids = tiny_batch()["input_ids"]
    large = first.model.model.layers[0].mlp.experts.gate_up_proj
    assert large.numel() >= 2**20 and large.std().item() == pytest.approx(0.2, rel=0.01)
    assert (first.model.model.norm.weight == 1).all()
    with torch.no_grad():
        before = first.model(ids).logits
        first.sleep()
        assert large.untyped_storage().nbytes() == 0
        first.wake()
        assert torch.equal(first.model(ids).logits, before)
        assert torch.equal(second.model(ids).logits, before)


# --- what is counted ---------------------------------------------------------------------------------------------


def test_flops_of_olmoe():
    """facts: 2492 MFLOP a token forward at 2048; 5118 a step; the adapters' rows of the same table."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(intermediate_size=1024))
    forward = forward_flops(model, 2048)
    millions = {name: round(value / 1e6, 1) for name, value in forward.items()}
    assert millions == {
        "experts": 1610.6,
        "router": 4.2,
        "attention": 536.9,
        "scores": 134.2,
        "dense": 0.0,
        "head": 206.0,
    }
    attention = attention_adapter_flops(model, 32)
    assert round(sum(forward.values()) / 1e6) == 2492
    assert round(step_flops(forward, 0, 1) / 1e6) == 5118
    assert round(attention / 1e6, 1) == 16.8
    for coverage, expected in ((0.30, 5236), (0.39, 5257), (0.53, 5288), (1.0, 5395)):
        experts = expert_adapter_flops(model, 32, dict.fromkeys(range(16), coverage))
        assert round(step_flops(forward, attention + experts, 1) / 1e6) == expected
    tokens = 10**9  # so many that building W + BA, once a step, is nothing
    peft = step_flops(forward, attention, tokens) + dense_update_flops(model, forward, 32, tokens)
    assert round(peft / tokens / 1e6) == 6779


def test_flops_by_hand():
    """qwen2_moe has shared experts of 24 with a scalar gate; K=2, F=16, D=32, 4 heads of 8, 2 of keys; vocabulary
    128."""
    model = tiny_model("qwen2_moe")
    forward = forward_flops(model, 10)
    assert forward == {
        "experts": 2 * 2 * (2 * 3 * 32 * 16),
        "router": 2 * (2 * 8 * 32),
        "attention": 2 * 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32),
        "scores": 2 * 2 * (32 + 32) * 5,
        "dense": 2 * 2 * (3 * 32 * 24 + 32),
        "head": 2 * 128 * 32,
    }
    adapter = expert_adapter_flops(model, R, {0: 0.5, 1: 1.0})
    assert adapter == 2 * R * 2 * 3 * (32 + 16) * 1.5
    shared_a = expert_adapter_flops(model, R, {0: 0.5, 1: 1.0}, shared_a=True)
    assert shared_a == 2 * R * 2 * (32 + 2 * 16 + 16 + 32) * 1.5
    assert step_flops(forward, adapter, 7) == 7 * (2 * sum(forward.values()) + forward["scores"] + 3 * adapter)


def test_saved_bytes_by_hand():
    """x once though it is kept twice, the hidden layer's output once; no weight."""
    first, second = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 3, bias=False)
    x = torch.randn(5, 6, requires_grad=True)
    with SavedBytes(torch.nn.ModuleList([first, second])) as saved:
        hidden = first(x)
        (second(hidden) * first(x)[:, :3]).sum()
    outputs = 5 * 3 + 5 * 4  # the product keeps both of its factors, and a slice keeps what it was cut from
    assert saved.total == 4 * (x.numel() + hidden.numel() + outputs)


# --- the whole -------------------------------------------------------------------------------------------------


def test_a_worker_counts_and_times(olmoe_file):
    """Every contender, in this process."""
    config = BenchConfig(
        olmoe_file, tokens=64, length=16, r=R, dtype="float32", device="cpu", contenders=("hot", "all")
    )
    common = Worker(config, Contender("floor")).calibrate()
    assert set(common["plans"]) == {"hot 12.5%", "hot 25%", "all"}
    assert common["rate"] > 0
    measured, losses = {}, {}
    for contender in map(Contender, ("floor", "all", "peft", "loop")):
        one = Worker(config, contender)
        measured[contender.name] = one.prepare(common["spreads"], common["plans"].get(contender.name))
        times = one.turn()
        assert times["step"] >= times["forward"] > 0 and times["backward"] > 0 and times["optimizer"] > 0
        losses[contender.name] = one.loss().item()
        assert measured[contender.name]["operations"] > 100
    assert len({round(loss, 2) for loss in losses.values()}) == 1  # B has hardly left 0
    saved = {name: row["saved_bytes_per_token_layer"] for name, row in measured.items()}
    x, gate_up = 32 * 4, 2 * 2 * 16 * 4
    assert x + gate_up <= saved["all"] < saved["peft"]  # which keeps W + BA too


def test_processes(olmoe_file, monkeypatch):
    """Each contender in its own. One that is killed in the last round is told, and does not end the rest."""
    monkeypatch.setitem(sys.modules, "unsloth", None)  # not installed, wherever this runs

    def tell(text):
        told.append(text)
        if text == "round 2 of 2":
            psutil.Process(children[-1]).kill()
        elif not children:
            children.extend(child.pid for child in psutil.Process().children() if child not in before)

    told, children, before = [], [], psutil.Process().children()
    config = BenchConfig(
        olmoe_file, tokens=32, r=R, dtype="bfloat16", device="cpu", contenders=("floor", "hot", "unsloth"),
        fractions=(0.25,), rounds=2,
    )  # fmt: skip
    result = run_bench(config, tell=tell)
    rows = {row["name"]: row for row in result["contenders"]}
    assert told[-2:] == ["round 1 of 2", "round 2 of 2"] and "skewing" in told[1]
    assert {name: row["status"] for name, row in rows.items()} == {
        "floor": "done", "hot 25%": "failed", "unsloth": "missing"
    }  # fmt: skip
    assert "exit code -9" in rows["hot 25%"]["reason"] and rows["unsloth"]["reason"] == "not installed"
    assert len(rows["floor"]["seconds"]["step"]["all"]) == 2 and rows["floor"]["peak_memory_bytes"] > 0
    assert result["matrix_rate"] > 0 and len(result["routing"]["layer_cv"]) == 2
    assert not multiprocessing.active_children()


@pytest.fixture
def in_here(monkeypatch):
    """Contenders in this process, which saves the start of others."""

    class InHere:
        def __init__(self, config, contender):
            self.contender, self.worker = contender, Worker(config, contender)

        def ask(self, what, *args):
            return getattr(self.worker, what)(*args)

        def end(self):
            pass

    monkeypatch.setattr(bench, "_Process", InHere)
    monkeypatch.setattr(worker, "matrix_rate", lambda dtype, device: 1e9)  # which takes a second


def test_result(olmoe_file, tmp_path, in_here):
    config = BenchConfig(
        olmoe_file, tokens=32, r=R, device="cpu", contenders=("hot", "peft", "floor"), fractions=(0.25,), rounds=3
    )
    result = run_bench(config)
    path = tmp_path / "results" / "result.json"
    write_json(path, result)
    assert read_result(path) == json.loads(json.dumps(result))
    assert result["settings"]["length"] == 32 and result["model"]["layers"] == 2
    rows = {row["name"]: row for row in result["contenders"]}
    assert list(rows) == ["hot 25%", "peft", "floor"]
    for row in rows.values():
        step = row["seconds"]["step"]
        assert row["status"] == "done" and len(step["all"]) == 3
        assert step["min"] <= step["q1"] <= step["median"] <= step["q3"]
        assert row["tokens_per_second"] == pytest.approx(32 / step["median"])
        assert row["share_of_rate"] == pytest.approx(row["flops"] / step["median"] / 1e9)
        pairs = zip(step["all"], rows["floor"]["seconds"]["step"]["all"], strict=True)
        assert row["times_floor"]["all"] == pytest.approx([one / floor for one, floor in pairs])
    assert 0.25 <= rows["hot 25%"]["coverage"] <= 1 and rows["hot 25%"]["estimated_memory_bytes"] > 0
    assert rows["peft"]["flops"] > rows["hot 25%"]["flops"] > rows["floor"]["flops"]
    assert "| hot 25% |" in markdown(result) and f"{rows['peft']['operations']:,}" in markdown(result)
    assert f"### result\n\n{markdown(result)}" == speed_tables(path.parent)
    assert summary_table(result).row_count == 3
    assert speed_tables(tmp_path / "none") == "No result is stored yet."


PAPER = ["fft", "lora", "dora", "lori-d", "lori-s", "hellora-pure", "hellori-s", "hellori-s-gate", "sieve"]


def test_the_papers_methods_take_part(olmoe_file, in_here):
    """Each trains as many parameters as `params` counts; LoRI-S, whose mask is drawn here at random, about as many."""
    config = BenchConfig(olmoe_file, tokens=32, r=R, device="cpu", contenders=tuple(PAPER), rounds=1)
    result = run_bench(config)
    rows = {row["name"]: row for row in result["contenders"]}
    assert list(rows) == PAPER and {row["status"] for row in rows.values()} == {"done"}
    for name, row in rows.items():
        method, _, placement = name.rpartition("-") if name.endswith(("pure", "gate")) else (name, "", None)
        counted = parameters_from_config(olmoe_file, r=R, **counted_options(method, placement))["trainable"]
        assert row["trainable"] == pytest.approx(counted, rel=0.15 if method.endswith("-s") else 0)
        assert row["seconds"]["step"]["median"] > 0 and "share_of_rate" not in row
    assert "| hellori-s-gate |" in markdown(result) and summary_table(result).row_count == len(PAPER)
    for wrong in ("esft", "hellora-none"):
        with pytest.raises(HotLoraError, match=f"'{wrong}' does not exist.*or a method: fft, lora"):
            Contender(wrong)


def test_none_can_be_run(olmoe_file, in_here, monkeypatch):
    def fails(self):
        raise bench._Failed("OutOfMemoryError: 80 GB")

    monkeypatch.setattr(Worker, "turn", fails)
    with pytest.raises(HotLoraError, match=r"no contender could be run\. floor: OutOfMemoryError: 80 GB"):
        run_bench(BenchConfig(olmoe_file, tokens=16, r=R, device="cpu", contenders=("floor",), rounds=1))


def test_growth(olmoe_file, in_here):
    config = BenchConfig(olmoe_file, tokens=16, r=R, device="cpu", contenders=("floor",), rounds=1)
    result = run_growth(config, "experts", [2, 8])
    names = [[row["name"] for row in run["contenders"]] for run in result["runs"]]
    assert names == [["floor", "hot 25%"], ["floor", "all"]]
    lines = growth_lines(result)
    found = {name: [point[0] for point in points] for name, points in lines.items()}
    assert found == {"floor": [2, 8], "hotlora": [2, 8]}
    assert growth_figure(result).axes[0].get_xlabel() == "adapted experts of a layer"
    rows = markdown(result).splitlines()
    assert rows[-4].startswith("| adapted experts of a layer | floor | hotlora |") and rows[-2].startswith("| 2 | ")
    layers = run_growth(config, "layers")
    assert [run["model"]["layers"] for run in layers["runs"]] == layers["values"] == [1, 2]
    (tokens,) = run_growth(config, "tokens", [12])["runs"]
    assert (tokens["settings"]["tokens"], tokens["settings"]["length"]) == (12, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 10, "length": 4}, "no multiple of length 4"),
        ({"contenders": ("peft", "megatron")}, "'megatron' does not exist: choose from floor, hot"),
        ({"contenders": ()}, "contenders is empty"),
        ({"fractions": (1.0,)}, "fraction is 1.0"),
        ({"cv": -1.0}, "cv is -1.0"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(HotLoraError, match=message):
        BenchConfig(**change)


def test_errors(tmp_path, olmoe_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)  # not installed, wherever this runs
    with pytest.raises(FileError, match="does not exist"):
        run_bench(BenchConfig(str(tmp_path / "none")))
    with pytest.raises(HotLoraError, match="layers is 3: this model has 2"):
        run_bench(BenchConfig(olmoe_file, layers=3))
    with pytest.raises(HotLoraError, match="dtype is 'int8'"):
        run_bench(BenchConfig(olmoe_file, dtype="int8"))
    with pytest.raises(HotLoraError, match="none of the contenders is here"):
        run_bench(BenchConfig(olmoe_file, contenders=("unsloth",)))
    with pytest.raises(HotLoraError, match="no growth by 'width'"):
        run_growth(BenchConfig(olmoe_file), "width")
    other = tmp_path / "other.json"
    write_json(other, {"version": 1})
    with pytest.raises(FileError, match="not a result of `hotlora bench`"):
        read_result(other)
    tiny_config("olmoe").save_pretrained(tmp_path / "dense")
    data = json.loads((tmp_path / "dense" / "config.json").read_text())
    write_json(tmp_path / "dense" / "config.json", {"model_type": "llama", "vocab_size": data["vocab_size"]})
    with pytest.raises(ModelError, match="no MoE layer"):
        run_bench(BenchConfig(str(tmp_path / "dense")))


def test_packed_experts_are_timed_and_counted_dense(tmp_path):
    """gpt-oss's config says how its checkpoint is stored; random weights have nothing of it."""
    found = {}
    for stored in ({}, {"quantization_config": {"quant_method": "mxfp4"}}):
        config = zoo_model("gpt_oss").config.to_dict() | stored
        (tmp_path / "config.json").write_text(json.dumps(config))
        run = BenchConfig(str(tmp_path), layers=1, tokens=16, length=16, r=R, dtype="bfloat16", device="cpu")
        found[bool(stored)] = bench._estimated_memory(run, 0.25, 1.0)
        made = RandomModel(bench.sized_config(tmp_path, 1), torch.bfloat16, torch.device("cpu"), 0).model
        assert made.get_submodule(moe_layers(made)[0].experts).down_proj.dtype == torch.bfloat16
    assert found[False] == found[True]


@pytest.mark.parametrize("options", [{"contenders": ("floor", "hot", "hot")}, {"fractions": (0.25, 0.25)}])
def test_a_contender_takes_part_once(options):
    with pytest.raises(HotLoraError, match="takes part twice: name each contender, and each fraction, once"):
        BenchConfig(**options)
