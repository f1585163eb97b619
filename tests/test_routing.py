"""Profiles from routers whose choices are known by hand, and metrics worked by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats as scipy_stats
from tiny import FAMILIES, tiny_batch, tiny_model

from hotlora.base.errors import DataError, FileError, ModelError, PlanError
from hotlora.hf.moe_layers import fingerprint, moe_layers, unwrap
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile, experts_kept, jaccard
from hotlora.routing.profiler import profile_examples, profile_routing

E, K, PAD = 8, 2, 0


def fix_router(model):
    """Sends token id t to experts t % 8 and (t + 1 + layer) % 8, with weights 0.75 and 0.25.

    Only the router's output is replaced: the blocks and their experts run as they are.
    """
    seen = {}

    def remember(module, args, kwargs):
        seen["ids"] = (args[0] if args else kwargs["input_ids"]).flatten()

    model.get_decoder().register_forward_pre_hook(remember, with_kwargs=True)

    def forward(layer):
        def route(hidden, *_, **__):
            ids = seen["ids"]
            index = torch.stack([ids % E, (ids + 1 + layer) % E], dim=1)
            weights = torch.tensor([0.75, 0.25]).expand(len(ids), 2)
            return torch.zeros(len(ids), E), weights, index

        return route

    for layer in moe_layers(model):
        model.get_submodule(layer.router).forward = forward(layer.layer)


def batch(*rows, side="right"):
    """Rows of token ids, padded to one length."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = length - len(row)
        left, right = (gap, 0) if side == "left" else (0, gap)
        ids.append([PAD] * left + list(row) + [PAD] * right)
        mask.append([0] * left + [1] * len(row) + [0] * right)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


ROWS = [[8, 9, 10], [8, 17], [11, 11, 11, 15]]  # ids mod 8: 0 1 2 | 0 1 | 3 3 3 7
# first choice: t % 8; second: (t + 1) % 8 in layer 0, (t + 2) % 8 in layer 1
FIRST = [2, 2, 1, 3, 0, 0, 0, 1]
SECOND = [[1, 2, 2, 1, 3, 0, 0, 0], [0, 1, 2, 2, 1, 3, 0, 0]]
COUNTS = torch.tensor([[a + b for a, b in zip(FIRST, second, strict=True)] for second in SECOND])
MASS = torch.tensor([[0.75 * a + 0.25 * b for a, b in zip(FIRST, s, strict=True)] for s in SECOND]).double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_counts_and_mass_known_by_hand(family, side):
    model = tiny_model(family)
    fix_router(model)
    profile = profile_routing(model, [batch(*ROWS, side=side)])
    assert profile.layers == (0, 1)
    assert profile.num_tokens == 9 and profile.num_experts_per_tok == K
    assert torch.equal(profile.counts, COUNTS) and torch.equal(profile.mass, MASS)
    assert profile.counts.sum(dim=1).tolist() == [9 * K] * 2
    assert profile.source["fingerprint"] == fingerprint(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_router_is_read_as_applied(family):
    """Counts and mass equal those of the router's own outputs."""
    model = tiny_model(family)
    data = tiny_batch(3, 11)
    outputs = {layer.layer: [] for layer in moe_layers(model)}
    for layer in moe_layers(model):
        router = model.get_submodule(layer.router)
        router.register_forward_hook(lambda module, args, out, into=outputs[layer.layer]: into.append(out))
    profile = profile_routing(model, [data])
    mask = data["attention_mask"].flatten().bool()
    for row, layer in enumerate(profile.layers):
        _, weights, index = outputs[layer][0]
        one_hot = torch.nn.functional.one_hot(index[mask], E)
        assert torch.equal(profile.counts[row], one_hot.sum(dim=(0, 1)))
        expected = (one_hot * weights[mask].double()[..., None]).sum(dim=(0, 1))
        torch.testing.assert_close(profile.mass[row], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_does_not_matter(family):
    model = tiny_model(family)
    rows = [torch.randint(3, 128, (length,)).tolist() for length in (5, 9, 2, 7)]
    whole = profile_routing(model, [batch(*rows)])
    parts = profile_routing(model, [batch(*rows[:1]), batch(*rows[1:])])
    ones = profile_routing(model, ({"input_ids": torch.tensor([row])} for row in rows))  # no mask: all tokens
    assert torch.equal(whole.counts, parts.counts) and torch.equal(whole.counts, ones.counts)
    torch.testing.assert_close(whole.mass, ones.mass, rtol=1e-5, atol=1e-5)
    assert whole.num_tokens == ones.num_tokens == 23


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_example_has_its_own_counts(side):
    """By hand, and padding in none; the rows keep the batches' order."""
    model = tiny_model()
    fix_router(model)
    profile, examples = profile_examples(model, [batch(*ROWS[:2], side=side), batch(*ROWS[2:])])
    assert examples.dtype == torch.int32 and tuple(examples.shape) == (3, 2, E)
    # ids mod 8 of the second row: 0 1; each goes to t and to t + 1 + layer
    assert examples[1].tolist() == [[1, 2, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert torch.equal(examples.sum(dim=0), COUNTS) and torch.equal(profile.counts, COUNTS)
    assert examples.sum(dim=(1, 2)).tolist() == [2 * K * len(row) for row in ROWS]


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_counted_together_are_those_counted_alone(family):
    model = tiny_model(family)
    rows = [torch.randint(3, 128, (length,)).tolist() for length in (5, 9, 2, 7, 1)]
    profile, together = profile_examples(model, [batch(*rows[:3]), batch(*rows[3:])], source={"data": "d"})
    alone = torch.stack([profile_routing(model, [batch(row)]).counts for row in rows])
    assert torch.equal(together.long(), alone)
    assert profile.hash == profile_routing(model, [batch(*rows[:3]), batch(*rows[3:])]).hash
    assert profile.source["data"] == "d"
    with pytest.raises(DataError, match="no token to profile on"):
        profile_examples(model, [])


def test_same_data_same_profile():
    model = tiny_model()
    assert profile_routing(model, [tiny_batch()]).hash == profile_routing(model, [tiny_batch()]).hash
    assert profile_routing(model, [tiny_batch()]).hash != profile_routing(model, [tiny_batch(seed=1)]).hash


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model().to(dtype)
    profile = profile_routing(model, [tiny_batch(), tiny_batch(seed=1)])
    assert profile.counts.sum(dim=1).tolist() == [profile.num_tokens * K] * 2
    assert ((profile.mass > 0) == (profile.counts > 0)).all() and (profile.mass <= profile.counts).all()


def test_gradient_checkpointing_and_training_flags_are_left_as_they_were():
    model = tiny_model()
    expected = profile_routing(model, [tiny_batch()])
    model.gradient_checkpointing_enable()
    model.train()
    model.get_input_embeddings().eval()
    flags = [module.training for module in model.modules()]
    profile = profile_routing(model, [tiny_batch()])
    assert profile.hash == expected.hash
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled() and not any(p.grad is not None for p in model.parameters())


def test_hooks_are_removed_even_after_an_error():
    model = tiny_model()

    def hooks():
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    profile_routing(model, [tiny_batch()])
    assert hooks() == before
    model.train()
    with pytest.raises(IndexError):
        profile_routing(model, [tiny_batch(), {"input_ids": torch.tensor([[10_000]])}])
    assert hooks() == before and model.training and torch.is_grad_enabled()


def test_an_adapted_model_is_profiled_too():
    import peft

    model = tiny_model()
    expected = profile_routing(model, [tiny_batch()])
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    profile = profile_routing(peft.get_peft_model(model, config), [tiny_batch()])
    assert profile.hash == expected.hash
    assert profile.source["fingerprint"] == expected.source["fingerprint"]


def test_a_hotlora_model_is_profiled_too():
    import peft

    from hotlora.adapter.config import HotLoraConfig

    model = tiny_model()
    expected = profile_routing(model, [tiny_batch()])
    plan = select_experts(expected, experts_per_layer=3)
    adapted = peft.get_peft_model(model, HotLoraConfig(plan=plan, r=2))
    assert profile_routing(adapted, [tiny_batch()]).hash == expected.hash


def test_saliency_is_of_the_model_as_it_is_adapted():
    """By PEFT alone and by hotlora, whose layers stand around the experts: as of the merged weights."""
    import peft

    from hotlora.adapter.config import HotLoraConfig

    plain = profile_routing(tiny_model(), [tiny_batch()], saliency=True)
    plan = select_experts(plain, experts_per_layer=3)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for config in (
        peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False),
        HotLoraConfig(plan=plan, r=2, init_lora_weights=False),
    ):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(tiny_model(), config)
        found = profile_routing(adapted, [tiny_batch()], saliency=True)
        assert torch.equal(found.counts, profile_routing(adapted, [tiny_batch()]).counts)
        merged = profile_routing(adapted.merge_and_unload(), [tiny_batch()], saliency=True)
        torch.testing.assert_close(found.saliency, merged.saliency, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found.saliency, plain.saliency, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saliency_in_half_precision(dtype):
    model = tiny_model()
    exact = profile_routing(model, [tiny_batch(4, 20)], saliency=True)
    found = profile_routing(model.to(dtype), [tiny_batch(4, 20)], saliency=True)
    assert found.counts.sum(dim=1).tolist() == [found.num_tokens * K] * 2
    same = (found.counts == exact.counts) & (exact.counts > 0)  # a near-tie of the router may fall otherwise
    assert same.double().mean() > 0.5
    torch.testing.assert_close(found.saliency[same], exact.saliency[same], rtol=0.05, atol=0)


def test_saliency_that_overflows_is_told():
    model = tiny_model()
    for weight in (torch.inf, 1e30):
        with torch.no_grad():
            model.get_submodule(moe_layers(model)[1].experts).down_proj.fill_(weight)
        with pytest.raises(ModelError, match="gate weights or outputs are not finite"):
            profile_routing(model, [tiny_batch()], saliency=True)
        profile_routing(model, [tiny_batch()])  # to which the last layer's outputs are nothing


def test_head_is_not_run():
    model = tiny_model()
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head was run"))
    profile_routing(model, [tiny_batch()])


def packed(*rows, pads=0):
    """The rows' texts one after another in one row, each from position 0, and padding after them."""
    ids = [[token for row in rows for token in row] + [PAD] * pads]
    positions = [[i for row in rows for i in range(len(row))] + [0] * pads]
    mask = [[1] * sum(map(len, rows)) + [0] * pads]
    return {name: torch.tensor(x) for name, x in zip(KEYS, (ids, mask, positions), strict=True)}


KEYS = ("input_ids", "attention_mask", "position_ids")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pads", [0, 3])
def test_packed_texts_are_profiled_as_each_alone(family, pads):
    model = tiny_model(family)
    texts = [torch.randint(3, 128, (length,)).tolist() for length in (7, 12, 5)]
    alone = profile_routing(model, [batch(text) for text in texts])
    together = profile_routing(model, [packed(*texts, pads=pads), packed(texts[0])])
    first = profile_routing(model, [batch(texts[0])])
    assert torch.equal(together.counts - first.counts, alone.counts) and together.num_tokens == 24 + 7
    torch.testing.assert_close(together.mass - first.mass, alone.mass, rtol=1e-5, atol=1e-5)
    # Counted otherwise where the texts see each other: this test could fail.
    in_one = profile_routing(model, [batch([token for text in texts for token in text])])
    assert not torch.equal(in_one.counts, alone.counts)


def test_positions_of_padded_batches_are_passed_on():
    """In a family with absolute positions they matter; here the model is to get what the batch says."""
    model, seen = tiny_model(), []
    model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    inputs = batch(*ROWS, side="left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    profile = profile_routing(model, [inputs])
    assert torch.equal(seen[0]["position_ids"], inputs["position_ids"]) and "attention_mask" in seen[0]
    assert profile.num_tokens == 9


def test_packed_texts_that_the_family_does_not_keep_apart_are_refused():
    from zoo import zoo_model

    model = zoo_model("jamba")
    texts = [list(range(3, 12)), list(range(60, 50, -1))]
    with pytest.raises(ModelError, match=r"jamba model .* see each other.*profile one text a row"):
        profile_routing(model, [packed(*texts)])
    assert profile_routing(model, [packed(texts[0])]).num_tokens == 9


def test_source_and_progress(capsys):
    source = {"data": "gsm8k", "model": "m"}
    profile = profile_routing(tiny_model(), [tiny_batch()], progress=True, source=source)
    assert profile.source["data"] == "gsm8k" and profile.source["model"] == "m"
    printed = capsys.readouterr()
    assert "profiling the router" in printed.err and printed.out == ""


IDS = torch.tensor([[5, 6]])


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "no token to profile on"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros(1, 2)}], "no token to profile on"),
        ([{"input_ids": [[5, 6]]}], "batch 0 has no input_ids tensor"),
        ([{"input_ids": torch.tensor([5, 6])}], "batch 0 has no input_ids tensor"),
        ([{"labels": IDS}], "batch 0 has no input_ids tensor"),
        ([{"input_ids": IDS, "attention_mask": torch.ones(1, 3)}], "batch 0: attention_mask must be"),
        ([{"input_ids": IDS, "attention_mask": [[1, 1]]}], "attention_mask must be .* and is list"),
        ([{"input_ids": IDS, "position_ids": torch.arange(2)}], r"position_ids must be .* \[1, 2\], and is \[2\]"),
        (
            [
                {
                    "input_ids": torch.tensor([[5, 6, 0, 7]]),
                    "attention_mask": torch.tensor([[1, 1, 0, 1]]),
                    "position_ids": torch.tensor([[0, 0, 1, 0]]),
                }
            ],
            "batch 0 has packed texts .* pad at the end",
        ),
    ],
)
def test_batches_that_are_none(batches, says):
    with pytest.raises(DataError, match=says):
        profile_routing(tiny_model(), batches)


def test_a_model_that_overflows_is_told():
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(moe_layers(model)[1].router).weight.fill_(torch.inf)
    with pytest.raises(ModelError, match="gate weights are not finite"):
        profile_routing(model, [tiny_batch()])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_choice_whose_weight_underflows_is_counted(family):
    """A saturated router's softmax gives its second choice a weight of exactly 0, and it is a choice all the same."""
    model = tiny_model(family)
    with torch.no_grad():
        for layer in moe_layers(model):
            model.get_submodule(layer.router).weight.mul_(1000)
    weights = []
    experts = model.get_submodule(moe_layers(model)[0].experts)
    experts.register_forward_pre_hook(lambda module, args: weights.append(args[2]))
    profile, examples = profile_examples(model, [tiny_batch(4, 20)])
    assert (weights[0] == 0).sum() > 10
    assert profile.counts.sum(dim=1).tolist() == [profile.num_tokens * K] * 2
    assert torch.equal(examples.sum(dim=0), profile.counts)


def test_a_token_that_zaya_sends_to_no_expert_is_not_counted():
    """It is handed on as expert 0 with weight 0. Another expert's weight that underflows is counted there, too."""
    from zoo import zoo_model

    model = zoo_model("zaya")
    layers = moe_layers(model)
    for layer in layers:
        router = model.get_submodule(layer.router)
        router.register_forward_hook(chosen_by_hand)
    profile = profile_routing(model, [{"input_ids": torch.arange(3, 15)[None]}])
    # Of every four tokens one is sent to expert 0, two to expert 5 (one with weight 0), one to none.
    assert profile.counts.tolist() == [[3, 0, 0, 0, 0, 6, 0, 0]] * len(layers)
    assert profile.mass.tolist() == [[1.5, 0, 0, 0, 0, 1.5, 0, 0]] * len(layers)


def chosen_by_hand(module, args, out):
    tokens = torch.arange(out[1].numel()) % 4
    weights = torch.where(tokens < 2, 0.5, 0.0).reshape(out[1].shape)
    return out[0], weights, torch.tensor([0, 5, 5, 0])[tokens].reshape(out[2].shape), out[3]


def test_a_model_on_the_meta_device_is_told():
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ModelError, match="meta device"):
        profile_routing(model.to("meta"), [tiny_batch()])


@pytest.mark.parametrize("is_adapted", [False, True])
def test_indices_of_other_ranks_are_dropped(is_adapted):
    """Under expert parallelism a slot that is not here carries the sentinel num_experts."""
    import peft

    from hotlora.adapter.config import HotLoraConfig

    model = tiny_model()
    if is_adapted:
        plan = select_experts(profile_routing(model, [tiny_batch()]))
        model = peft.get_peft_model(model, HotLoraConfig(plan=plan, r=2, train_router=False))
    for layer in moe_layers(model):
        unwrap(model.get_submodule(layer.experts))._is_expert_parallel = True
        router = model.get_submodule(layer.router)
        router.register_forward_hook(lambda module, args, out: (out[0], out[1], torch.where(out[2] < 4, out[2], E)))
    profile = profile_routing(model, [tiny_batch()])
    assert profile.counts[:, 4:].sum() == 0 and 0 < profile.counts.sum() < 2 * profile.num_tokens * K


# --- metrics ---

HAND = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])


def hand_profile(counts=HAND, layers=(0, 1), **kwargs):
    return RoutingProfile(layers, counts, counts.double() / 2, num_tokens=4, num_experts_per_tok=2, **kwargs)


def test_metrics_by_hand():
    profile = hand_profile()
    assert profile.shares().tolist() == [[0.75, 0.25, 0, 0], [0.25] * 4]
    # layer 0: mean 2, variance (16 + 0 + 4 + 4) / 4 = 6
    torch.testing.assert_close(profile.layer_cv(), torch.tensor([math.sqrt(6) / 2, 0.0]).double())
    assert profile.mean_layer_cv() == pytest.approx(math.sqrt(6) / 4)
    # sums 8 4 2 2: mean 4, variance (16 + 0 + 4 + 4) / 4
    assert profile.global_cv() == pytest.approx(math.sqrt(6) / 4)
    # uniform share 1/4, half of it 1/8: two experts of layer 0
    assert profile.cold_share().tolist() == [0.5, 0.0]
    assert profile.coverage(fraction=0.25).tolist() == [0.75, 0.25]
    assert profile.coverage(experts_per_layer=2).tolist() == [1.0, 0.5]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    torch.testing.assert_close(profile.entropy(), torch.tensor([entropy, 1.0]).double())


def test_exactly_half_of_the_uniform_share_is_not_cold():
    counts = torch.tensor([[1, 2, 3, 2], [7, 7, 7, 3]])  # half uniform: 1 and 3
    assert hand_profile(counts).cold_share().tolist() == [0.0, 0.0]


def test_metrics_against_scipy():
    counts = torch.from_numpy(np.random.default_rng(0).integers(1, 1000, (5, 16)))
    profile = hand_profile(counts, layers=tuple(range(5)))
    np.testing.assert_allclose(profile.layer_cv(), scipy_stats.variation(counts.numpy(), axis=1), rtol=1e-12)
    np.testing.assert_allclose(profile.global_cv(), scipy_stats.variation(counts.numpy().sum(0)), rtol=1e-12)
    np.testing.assert_allclose(profile.entropy(), scipy_stats.entropy(counts.numpy(), axis=1) / np.log(16), rtol=1e-12)


def test_a_layer_without_counts_has_no_metrics():
    profile = hand_profile(torch.tensor([[0, 0, 0, 0], [2, 2, 2, 2]]))
    metrics = (profile.layer_cv(), profile.entropy(), profile.cold_share(), profile.coverage(fraction=0.5))
    for metric in metrics:
        assert metric.isnan().tolist() == [True, False]


def test_jaccard_by_hand():
    a, b = {0: [0, 1, 2, 3], 2: [5]}, {0: [2, 3, 4, 5], 2: [5]}
    assert jaccard(a, b) == pytest.approx((2 / 6 + 1) / 2) == jaccard(b, a)
    assert jaccard({0: ()}, {0: ()}) == 1.0
    plan = select_experts(hand_profile(), experts_per_layer=1)
    assert jaccard(plan, plan) == 1.0 and jaccard(plan, {0: [1], 1: [0]}) == 0.5
    with pytest.raises(PlanError, match=r"layers \[0\] and \[1\]"):
        jaccard({0: [1]}, {1: [1]})


def test_experts_kept_needs_one_budget():
    with pytest.raises(PlanError, match="exactly one"):
        experts_kept(8, None, None)


# --- the file ---


def test_save_and_load(tmp_path):
    profile = hand_profile(layers=(3, 7), source={"fingerprint": "olmoe-1", "data": "gsm8k"})
    profile.save(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["profile.safetensors"]
    loaded = RoutingProfile.load(tmp_path / "run")
    assert loaded.hash == profile.hash and loaded.source == profile.source and loaded.layers == (3, 7)
    assert torch.equal(loaded.counts, profile.counts) and torch.equal(loaded.mass, profile.mass)
    profile.save(tmp_path / "mine.safetensors")
    assert RoutingProfile.load(tmp_path / "mine.safetensors").hash == profile.hash
    assert set(load_file(tmp_path / "mine.safetensors")) == {"counts", "mass"}


def test_saliency_is_kept_in_the_file_and_in_the_hash(tmp_path):
    """A file without it, as older ones are, loads as before and has the hash that it had."""
    without = hand_profile()
    profile = replace(without, saliency=HAND / 4)
    assert profile.saliency.dtype == torch.float64 and profile.hash != without.hash
    profile.save(tmp_path / "with.safetensors")
    found = RoutingProfile.load(tmp_path / "with.safetensors")
    assert torch.equal(found.saliency, HAND / 4) and found.hash == profile.hash
    without.save(tmp_path / "without.safetensors")
    assert RoutingProfile.load(tmp_path / "without.safetensors").saliency is None
    assert set(load_file(tmp_path / "without.safetensors")) == {"counts", "mass"}


def test_load_names_a_file_that_is_missing_cut_short_or_foreign(tmp_path):
    path = tmp_path / "profile.safetensors"
    with pytest.raises(FileError, match=r"does not exist.*hotlora profile"):
        RoutingProfile.load(tmp_path)
    hand_profile().save(path)
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"profile\.safetensors is not a whole routing profile.*hotlora"):
            RoutingProfile.load(path)
    path.write_bytes(b'{"json": true}')
    with pytest.raises(FileError, match="not a whole routing profile"):
        RoutingProfile.load(path)
    save_file({"counts": HAND}, path)
    with pytest.raises(FileError, match="not a routing profile"):
        RoutingProfile.load(path)
    save_file({"counts": HAND, "mass": HAND.double()}, path, {"format": "hotlora.profile", "version": "9"})
    with pytest.raises(FileError, match="version '9', this hotlora reads '1'"):
        RoutingProfile.load(path)
    meta = {"format": "hotlora.profile", "version": "1", "json": "{}"}
    save_file({"counts": HAND, "mass": HAND.double()}, path, meta)
    with pytest.raises(FileError, match="not a whole routing profile"):
        RoutingProfile.load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"counts": HAND.double()}, r"counts are torch\.float64: they must be integers"),
        ({"counts": HAND[0], "mass": HAND[0]}, r"\[2 layers, experts\]"),
        ({"layers": (0, 1, 2)}, r"\[3 layers, experts\]"),
        ({"layers": (1, 0)}, "ascending"),
        ({"mass": torch.zeros(2, 5)}, r"mass is \[2, 5\]"),
        ({"counts": HAND - 9}, "counts: layer 0 has -[0-9]+: a count is 0 or more"),
        ({"counts": HAND + 2**62}, "counts: layer 0 adds up to more than 2\\^63"),
        ({"mass": HAND.double() * torch.nan}, "mass: layer 0 has nan: it must be finite"),
        ({"mass": HAND.double() + torch.inf}, "mass: layer 0 has inf: it must be finite"),
        ({"saliency": torch.zeros(2, 5)}, r"saliency is \[2, 5\]: it must be \[2, [0-9]+\], as counts are"),
        ({"saliency": HAND * torch.nan}, "saliency: layer 0 has nan"),
        ({"saliency": HAND.double() - 99}, "saliency: layer 0 has -[0-9]+: it must be finite, and 0 or more"),
        ({"layers": (-1, 0)}, "ascending decoder indices"),
        ({"layers": ("0", "1")}, "ascending decoder indices"),
        ({"num_tokens": -1}, "num_tokens is '-1'"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok is '2'"),
    ],
)
def test_a_profile_refuses_another_form(change, says):
    fields = {"layers": (0, 1), "counts": HAND, "mass": HAND.double(), "num_tokens": 4, "num_experts_per_tok": 2}
    with pytest.raises(DataError, match=says):
        RoutingProfile(**fields | change)


@pytest.mark.parametrize("tensors", [{"counts": HAND - 9, "mass": HAND.double()}, {"counts": HAND, "mass": HAND / 0}])
def test_a_file_of_negative_counts_or_of_mass_that_is_no_number_is_refused(tmp_path, tensors):
    path = tmp_path / "profile.safetensors"
    meta = {"layers": [0, 1], "num_tokens": 4, "num_experts_per_tok": 2, "source": {}}
    save_file(tensors, path, {"format": "hotlora.profile", "version": "1", "json": json.dumps(meta)})
    with pytest.raises(FileError, match=r"profile\.safetensors is not a whole routing profile \((counts|mass): layer"):
        RoutingProfile.load(path)


def test_a_profile_holds_one_form():
    profile = RoutingProfile([0, 1], HAND.int(), HAND.float(), num_tokens=4, num_experts_per_tok=2)
    assert profile.layers == (0, 1)
    assert profile.counts.dtype == torch.int64 and profile.mass.dtype == torch.float64
