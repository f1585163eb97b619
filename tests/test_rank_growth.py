"""DR-LoRA: ranks that grow, against the paper's own numbers and plain loops; runs that are killed and go on."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from runs import run_training
from safetensors.torch import load_file
from test_run import CONFIG
from test_stages import data, logits, model_folder  # noqa: F401
from tiny import FAMILIES, fill, tiny_batch, tiny_model, tiny_plan
from zoo import zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.load import load_adapter
from hotlora.base.errors import HotLoraError
from hotlora.cli.train import print_run
from hotlora.hf.models import load_model
from hotlora.hf.moe_layers import moe_layers
from hotlora.routing.plan import ExpertPlan
from hotlora.runs.checks import check_run
from hotlora.runs.methods import resolve
from hotlora.training import rank_growth
from hotlora.training.rank_growth import BETA, GAMMA, Growth, RankGrowth, allocated, importance

GROWING = {
    "rule": "all", "grow_every": 1, "train_attention": False, "train_shared": False,
    "config": replace(CONFIG, max_steps=8, save_steps=3, r=4, lora_alpha=8, warmup_ratio=0.25, learning_rate=0.05),
}  # fmt: skip


def test_total_ranks_are_those_of_the_papers_table_10():
    """OLMoE: 16 layers of 128 projections, 38,000 steps; whatever the saliency, the totals are fixed."""
    growth = Growth(r=64, units=128, warmup=1140, steps=38_000, every=200)
    assert (growth.start, growth.most, growth.num_events, growth.quota, growth.step_of_one) == (32, 128, 183, 23, 9)
    generator = torch.Generator().manual_seed(0)
    ranks, totals = [growth.start] * 128, {0: 16 * 128 * 32}
    for step in range(1, 38_001):
        if growth.is_event(step):
            ranks = growth.grown(ranks, torch.rand(128, generator=generator).tolist())
        if step in (6000, 12_000, 18_000, 24_000, 30_000, 37_800):
            totals[step] = 16 * sum(ranks)
    assert totals == {
        0: 65_536, 6000: 74_736, 12_000: 85_776, 18_000: 96_816, 24_000: 107_856, 30_000: 118_896, 37_800: 131_072
    }  # fmt: skip


def test_the_quota_goes_to_the_most_salient_first():
    growth = Growth(r=64, units=128, warmup=1140, steps=38_000, every=200)
    saliency = [0.0] * 128
    saliency[7], saliency[100], saliency[3] = 3.0, 2.0, 1.0
    after = growth.grown([32] * 128, saliency)
    assert (after[7], after[100], after[3]) == (41, 41, 37) and sum(after) == 32 * 128 + 23
    after = growth.grown([32] * 7 + [125] + [32] * 120, saliency)  # three are left of its 128
    assert (after[7], after[100], after[3]) == (128, 41, 41)
    small = Growth(r=4, units=8, warmup=1, steps=8, every=1)
    assert small.step_of_one == 1


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"r": 5}, "must be even"), ({"warmup": 0}, "warmup_ratio"), ({"every": 6}, "Give at most 4")],
)
def test_what_cannot_grow_is_told(changed, told):
    with pytest.raises(HotLoraError, match=told):
        Growth(**{"r": 4, "units": 8, "warmup": 1, "steps": 10, "every": 1, **changed})


def growing(family: str = "olmoe", tmp_path: Path = Path(), **options):
    base = tiny_model(family)
    plan = tiny_plan(base, {0: list(range(8)), 1: list(range(8))})
    own = {"train_attention": False, "train_shared": False, **options}
    model = get_peft_model(base, HotLoraConfig(plan=plan, **allocated(4, 8), **own)).train()
    return model, RankGrowth(model, 4, 1, tmp_path / "ranks.jsonl")


def test_a_training_with_few_events_is_told():
    """By counting: what it says would do does, and one step more between events would not."""
    short = Growth(r=32, units=64, warmup=1, steps=600, every=200)
    ranks = [16] * 64
    for step in range(1, 601):
        ranks = short.grown(ranks, range(64)) if short.is_event(step) else ranks
    assert sum(ranks) == 64 * short.reach < 64 * 32
    assert f"to {short.reach} on average and not to r = 32. For that give grow_every 149" in short.said()
    assert not replace(short, every=149).said() and replace(short, every=150).said()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_and_only_active_ranks_get_gradients(family, tmp_path):
    model, moving = growing(family, tmp_path)
    batch = tiny_batch()
    assert torch.equal(model.eval()(**batch).logits, tiny_model(family)(**batch).logits)
    fill(model, 0)  # as if all had been trained, so that every gradient could be
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for layer in moving.layers.values():
        experts = layer.experts
        parts, B = experts.view.num_parts, experts.lora_B_gate_up["default"].grad
        *gate, up = B.unflatten(1, (parts, -1)).unbind(1)
        assert not any(part.any() for part in gate)
        assert up[..., :2].any() and not up[..., 2:].any()
        down = experts.lora_B_down["default"].grad
        assert down[..., :2].any() and not down[..., 2:].any()
        assert layer.ranks == [2] * 16


def test_frequency_and_importance_are_the_plain_loops(tmp_path):
    """Padding counts nowhere; two batches of a step count as one."""
    model, moving = growing(tmp_path=tmp_path)
    fill(model, 1)
    given = []
    layer = moving.layers[1]
    layer.experts.register_forward_hook(lambda m, args, out: given.append(args[1:]))
    small = tiny_batch(batch=1, length=5, seed=3)
    masks = []
    for batch in (tiny_batch(), small):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        masks.append(batch["attention_mask"].flatten())
    expected, tokens = torch.zeros(8), 0
    for (index, weight), mask in zip(given, masks, strict=True):
        for t in range(len(index)):
            if mask[t]:
                tokens += 1
                for k in range(index.shape[1]):
                    expected[index[t, k]] += weight[t, k].detach()
    moving.warmup, layer.growth = 50, Growth(r=4, units=16, warmup=50, steps=100, every=1)
    found = importance(layer.experts)
    A, B = layer.experts.lora_A_down["default"], layer.experts.lora_B_down["default"]
    loop = torch.zeros(8, 8)
    for n in range(8):
        for r in range(8):
            loop[n, r] = (A.grad[n, r] * A[n, r]).abs().sum() * (B.grad[n, :, r] * B[n, :, r]).abs().sum()
    torch.testing.assert_close(found[8:], loop)
    A, B = layer.experts.lora_A_gate_up["default"], layer.experts.lora_B_gate_up["default"]
    for n in range(8):
        for r in range(8):  # the up projection's follow the gate's
            a, b = (A.grad[n, 8 + r] * A[n, 8 + r]).abs().sum(), (B.grad[n, 16:, r] * B[n, 16:, r]).abs().sum()
            loop[n, r] = a * b
    torch.testing.assert_close(found[:8], loop)
    moving.on_pre_optimizer_step(None, type("State", (), {"global_step": 0})(), None)
    torch.testing.assert_close(layer.frequency_N, (1 - BETA) * expected / tokens)
    torch.testing.assert_close(layer.importance_UR, (1 - BETA) * found)
    assert all(p.grad is None for n, p in model.named_parameters() if "mlp.gate" in n and "lora_" in n)  # warm-up
    mean = layer.importance_UR.sum(1) / 2
    torch.testing.assert_close(
        torch.tensor(moving._saliency(layer)), layer.frequency_N.repeat(2) * mean / 3**GAMMA
    )  # fmt: skip


def test_every_process_goes_on_from_a_save_as_after_a_resume(tmp_path, monkeypatch):
    """Each has seen tokens of its own, and a checkpoint has one frequency for all."""
    moving = [growing(tmp_path=tmp_path)[1] for _ in range(3)]
    for number, one in enumerate(moving[:2], 1):
        one.layers[1].frequency_N[:] = number * torch.arange(8)
    frequencies = [one.layers[1].frequency_N.clone() for one in moving[:2]]
    monkeypatch.setattr(rank_growth, "num_processes", lambda: 2)
    monkeypatch.setattr(rank_growth, "summed", lambda f_N: sum(frequencies) if f_N.any() else f_N)
    arguments = SimpleNamespace(output_dir=str(tmp_path), get_warmup_steps=lambda steps: 1)
    for is_first, one in zip((False, True), moving, strict=False):
        (tmp_path / "checkpoint-4").mkdir(exist_ok=True)
        one.on_save(arguments, SimpleNamespace(global_step=4, max_steps=9, is_world_process_zero=is_first), None)
    moving[2].on_train_begin(arguments, SimpleNamespace(global_step=4, max_steps=9), None)
    for one in moving:
        torch.testing.assert_close(one.layers[1].frequency_N, 1.5 * torch.arange(8))


def test_a_run_grows_to_its_budget_and_is_resumed_to_the_same_end(
    model_folder, data, tmp_path, monkeypatch, capsys,  # noqa: F811
):  # fmt: skip
    calm = run_training(model_folder, data, tmp_path / "calm", **GROWING)
    print_run(calm, tmp_path / "calm")
    last = calm["ranks"][-1]
    told = f"ranks grew {len(calm['ranks'])} times, to {last['smallest']} to {last['largest']} ("
    assert told in capsys.readouterr().out.replace("\n", " ")
    assert [row["step"] for row in calm["ranks"]] and calm["ranks"][-1]["ranks"] == 2 * 16 * 4
    assert calm["ranks"][-1]["largest"] > calm["ranks"][-1]["smallest"]
    # 2 layers of 16 projections at rank 4 on average (32 + 16 wide), and routers at the largest rank
    counts = calm["parameters"]
    assert counts["experts"] == 2 * 16 * 4 * (32 + 16) and counts["router"] == 2 * 8 * (32 + 8)
    assert counts["trainable"] == counts["experts"] + counts["router"]

    class Stopped(Exception):
        pass

    grow = RankGrowth._grow

    def stop_after_3(self, step):
        if step > 4:
            raise Stopped
        grow(self, step)

    def stop(self):
        raise Stopped

    for name, until, (method, dying) in (
        ("killed", 3, ("_grow", stop_after_3)), ("killed after its last step", 8, ("finish", stop)),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(RankGrowth, method, dying)
            with pytest.raises(Stopped):
                run_training(model_folder, data, tmp_path / name, **GROWING)
        record = run_training(model_folder, data, tmp_path / name, **GROWING)
        assert record["training"]["resumed_from"] == until and record["ranks"] == calm["ranks"]
        files = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("calm", name)]
        assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])


def test_the_saved_adapter_has_the_active_ranks_and_is_what_was_trained(model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    seen = {}
    finish = RankGrowth.finish

    def watched(self):
        seen["before"] = logits(self.model)
        seen["ranks"] = {i: layer.ranks for i, layer in self.layers.items()}
        counts = finish(self)
        seen["after"] = logits(self.model)
        return counts

    monkeypatch.setattr(RankGrowth, "finish", watched)
    run_training(model_folder, data, tmp_path / "run", **GROWING)
    assert (seen["before"] - logits(load_model(model_folder))).abs().max() > 0.01
    torch.testing.assert_close(seen["after"], seen["before"], rtol=1e-4, atol=1e-5)
    loaded = load_adapter(load_model(model_folder), tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits(loaded), seen["after"], rtol=1e-5, atol=1e-5)
    plan = ExpertPlan.from_dict(loaded.peft_config["default"].plan)
    for i, ranks in seen["ranks"].items():
        assert plan.ranks[i] == tuple(max(up, down) for up, down in zip(ranks[:8], ranks[8:], strict=True))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), seen["after"], rtol=1e-3, atol=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "ranks.jsonl").read_text().splitlines()]
    assert rows[-1]["ranks"] == sum(sum(ranks) for ranks in seen["ranks"].values())


def test_the_method_is_the_papers():
    options = resolve("dr-lora", model="nano", data="nano-math")
    assert (options.rule, options.grow_every, options.condition) == ("all", 200, "dr-lora")
    assert not options.train_attention and options.train_router and not options.train_shared
    preset = resolve(preset="dr-lora", model="nano", data="nano-math")
    assert (preset.r, preset.lora_alpha, preset.learning_rate, preset.warmup_ratio) == (64, 128, 2e-5, 0.03)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "leave out DoRA"), ({"train_a": False}, "frozen or shared A"),
        ({"share_a": True}, "frozen or shared A"), ({"reprofile_every": 2}, "leave out re-profiling"),
        ({"use_rslora": True}, "leave out rsLoRA"), ({"lr_scheduler": "constant"}, "give constant_with_warmup"),
        ({"perft": "E"}, "leave out PERFT"), ({"eval_steps": 2, "load_best": True}, "leave out load_best"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(options, told):
    with pytest.raises(HotLoraError, match=told):
        resolve("dr-lora", model="nano", data="nano-math", **options)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4", "nemotron_h", "deepseek_v3"])
def test_every_layout_counts_tokens_and_ends_as_it_was_trained(family, tmp_path):
    """Transposed and biased, without a gate, with shared experts; gemma4's decoder is not handed the padding's mask."""
    base = zoo_model(family)
    layers = moe_layers(base)
    number = layers[0].num_experts
    plan = ExpertPlan({layer.layer: tuple(range(number)) for layer in layers}, number, "all", {})
    config = HotLoraConfig(plan=plan, train_attention=False, train_shared=False, **allocated(4, 8))
    model = get_peft_model(base, config).train()
    moving = RankGrowth(model, 4, 1, tmp_path / "ranks.jsonl")
    moving.warmup = 1
    for layer in moving.layers.values():
        layer.growth = Growth(r=4, units=2 * number, warmup=1, steps=6, every=1)
    batch = tiny_batch(vocab_size=60)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(6):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert {int(layer.tokens) for layer in moving.layers.values()} == {16}  # of 18
        moving.on_pre_optimizer_step(None, type("State", (), {"global_step": step})(), None)
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(**batch).logits
    counts = moving.finish()
    torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    widths = sum(next(iter(moving.layers.values())).experts.view.widths)
    assert counts["experts"] == len(layers) * 2 * number * 4 * widths


@pytest.mark.parametrize(
    ("options", "told"), [({"max_steps": 150}, "Give at most 72"), ({"max_steps": 150, "r": 5}, "must be even")]
)
def test_what_cannot_grow_is_told_before_a_model_is_loaded(options, told):
    with pytest.raises(HotLoraError, match=told):
        check_run(resolve("dr-lora", model="nano", data="nano-math", **options))
