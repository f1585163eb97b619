"""Every MoE family of the installed transformers: profiled, adapted, trained, saved, merged, against plain code.

Built from the package itself (zoo.py), so a transformers with a new family fails here until the family works.
"""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from peft import get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny import fill, tiny_batch
from zoo import MEND, NOT_CAUSAL, NUM_EXPERTS, decorated_folders, families, runs_of, zoo_config, zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters, parameters_from_config
from hotlora.adapter.experts import HotLoraExperts
from hotlora.adapter.load import load_adapter
from hotlora.adapter.mask import draw_mask
from hotlora.adapter.raw_weights import HotLoraWeights
from hotlora.hf.experts_view import ExpertsView
from hotlora.hf.moe_layers import attention_modules, fingerprint, moe_layers, skips_tokens, unwrap
from hotlora.routing.plan import select_experts
from hotlora.routing.profiler import profile_routing
from hotlora.training.gradient_checkpointing import checkpoint_kwargs

every_family = pytest.mark.parametrize("family", families())
BATCH = tiny_batch(2, 24)
SKIPS = ("zaya",)
"""families whose router may send a token to no expert"""
NOISY, BY_TABLE = ("phimoe",), ("deepseek_v4",)
"""families whose router is noisy in training, and whose first MoE layer chooses by a table of tokens"""


@cache
def plain(family):
    """For those who only look."""
    return zoo_model(family)


def plan_for(model, wanted=(1, 3, 6)):
    layers = moe_layers(model)
    experts = {str(layer.layer): list(wanted) for layer in layers}
    return {"version": 1, "experts": experts, "num_experts": NUM_EXPERTS, "fingerprint": fingerprint(model)}


def adapted(family, *, dtype=torch.float32, seed=0, randomise=True, plan=None, **config):
    model = zoo_model(family, dtype=dtype)
    model = get_peft_model(model, HotLoraConfig(plan=plan or plan_for(model), **{"r": 4, **config}))
    if randomise:
        fill(model, seed, scale=0.05)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def test_no_family_is_forgotten():
    """Every folder with decorated experts has a class that is tested, or a reason not to."""
    covered = {getattr(transformers, name).__module__.split(".")[2] for name in families().values()}
    assert covered | NOT_CAUSAL.keys() == decorated_folders()
    assert len(families()) > 50 and MEND.keys() <= families().keys()


@every_family
def test_profile_and_zero_B(family):
    """A profile counts what every run of the experts is given, and no padding: tokens x K a run, but for those that
    are sent to none. With B = 0 the logits are the base's, bit for bit."""
    model, layers, given = zoo_model(family), moe_layers(plain(family)), {}
    for layer in layers:
        model.get_submodule(layer.experts).register_forward_pre_hook(
            lambda _, args, kwargs, i=layer.layer: given.setdefault(i, []).append((*args, *kwargs.values())[1:3]),
            with_kwargs=True,
        )
    profile = profile_routing(model, [BATCH])
    assert skips_tokens(model) is (family in SKIPS)
    is_token = BATCH["attention_mask"].flatten().bool()
    assigned = profile.num_tokens * profile.num_experts_per_tok
    assert profile.num_tokens == is_token.sum() < len(is_token)
    runs = [given[layer.layer] for layer in layers]
    assert [len(calls) for calls in runs] == runs_of(family, layers)
    for counts, calls in zip(profile.counts, runs, strict=True):
        ids, weights = (torch.cat([pair[i][is_token] for pair in calls]) for i in (0, 1))
        sent = weights.reshape(ids.shape) != 0
        assert sent.all() or family in SKIPS, "a weight of exactly 0 may mean that a token is sent to no expert"
        assert torch.equal(counts, torch.bincount(ids[sent], minlength=NUM_EXPERTS))
        assert ids.numel() == assigned * len(calls) and sent.any()
    expected = logits(model)
    plan = select_experts(profile, rule="hot", fraction=0.25)
    assert torch.equal(logits(adapted(family, plan=plan.to_dict(), randomise=False)), expected)


@every_family
def test_saliency_against_a_plain_loop(family):
    """Gate weight times the norm of each expert's output, one expert after another, from the inputs that they get in a
    profile without saliency; all else of the profile is that one's, bit for bit."""
    model, given = zoo_model(family), {}
    for layer in moe_layers(model):
        model.get_submodule(layer.experts).register_forward_pre_hook(
            lambda _, args, kwargs, i=layer.layer: given.setdefault(i, []).append((*args, *kwargs.values())[:3]),
            with_kwargs=True,
        )
    plain, calls = profile_routing(model, [BATCH]), given.copy()
    expected = torch.zeros(plain.mass.shape, dtype=torch.float64)
    is_token = BATCH["attention_mask"].flatten().bool()
    for row, layer in enumerate(moe_layers(model)):
        view = ExpertsView(unwrap(model.get_submodule(layer.experts)))
        for hidden, ids, weights in calls[layer.layer]:
            weights = weights.reshape(ids.shape)
            for expert in range(NUM_EXPERTS):
                *ins, (down, down_bias) = view.linears_of(expert)
                x = hidden.reshape(len(ids), -1)
                up = torch.cat([torch.nn.functional.linear(x, *matrix) for matrix in ins], dim=-1)
                y = torch.nn.functional.linear(view.activation(view.join(up)), down, down_bias)
                y = y if view.norm_after is None else view.norm_after(y)
                gate = torch.where(ids == expert, weights, 0).abs().double().sum(dim=1)
                expected[row, expert] += (gate * y.double().norm(dim=1))[is_token].sum()
    found = profile_routing(model, [BATCH], saliency=True)
    assert replace(found, saliency=None).hash == plain.hash and plain.saliency is None
    torch.testing.assert_close(found.saliency, expected, rtol=1e-5, atol=1e-8)


def by_hand(model):
    """The base model's adapted weights, made from the adapter's factors one expert after another."""
    weights = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, HotLoraExperts):
            base, scaling = module.base_layer, module.scaling["default"]
            A_up, B_up, A_down, B_down = (getattr(module, n)["default"] for n in module.adapter_layer_names[:4])
            r = A_down.shape[1]
            up_name = "gate_up_proj" if base.has_gate else "up_proj"
            up, down = list(getattr(base, up_name).unbind()), list(base.down_proj.unbind())
            for n, expert in enumerate(module.expert_ids["default"]):
                if base.has_gate:
                    width = B_up.shape[1] // 2
                    gate = B_up[n, :width] @ A_up[n, :r]
                    other = B_up[n, width:] @ A_up[n, r:]
                    rows = (
                        [gate, other] if base.is_concatenated else [x for p in zip(gate, other, strict=True) for x in p]
                    )
                    delta = torch.cat(rows) if base.is_concatenated else torch.stack(rows)
                else:
                    delta = B_up[n] @ A_up[n]
                delta_down = B_down[n] @ A_down[n]
                if base.is_transposed:
                    delta, delta_down = delta.T, delta_down.T
                up[expert] = up[expert] + scaling * delta
                down[expert] = down[expert] + scaling * delta_down
            weights |= {f"{name}.{up_name}": torch.stack(up), f"{name}.down_proj": torch.stack(down)}
        elif isinstance(module, HotLoraWeights):
            for key, path in module._weights.items():
                A, B = module.lora_A["default"][key], module.lora_B["default"][key]
                base = module.base_layer.get_parameter(path)
                weights[f"{name}.{path}"] = base + module.scaling["default"] * B @ A
        elif isinstance(module, LoraLinear):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            weights[f"{name}.weight"] = module.base_layer.weight + module.scaling["default"] * B @ A
    return weights


@every_family
def test_output_and_every_gradient_equal_plain_code(family):
    """Against transformers' own loop over experts on weights that were added up by hand: attention, router, shared
    experts and experts at once. Exactly the planned experts that got a token have a gradient."""
    model = adapted(family)
    reference = zoo_model(family)
    reference.set_experts_implementation("eager")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    def gradients(output):
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad((output * probe).sum(), list(trained.values()))

    layers, counts = moe_layers(model), {}

    def count(path):
        def hook(module, args, kwargs):
            top_k_index = (*args, *kwargs.values())[1]
            counts[path] = torch.bincount(top_k_index.flatten(), minlength=NUM_EXPERTS).tolist()

        return hook

    hooks = [
        model.get_submodule(layer.experts).register_forward_pre_hook(count(layer.experts), with_kwargs=True)
        for layer in layers
    ]
    ours = model(**BATCH).logits
    for hook in hooks:
        hook.remove()
    theirs = torch.func.functional_call(reference, by_hand(model), (), dict(BATCH)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    for name, mine, plain in zip(trained, gradients(ours), gradients(theirs), strict=True):
        assert (mine - plain).norm() <= 1e-3 * plain.norm() + 1e-6, name
        path = name.partition(".lora_")[0]
        if path in counts:
            for expert, gradient in zip(model.get_submodule(path).expert_ids["default"], mine, strict=True):
                assert bool(gradient.any()) == (counts[path][expert] > 0), (name, expert)
        else:
            assert mine.any(), name


@every_family
def test_what_is_adapted(family):
    """Each MoE layer's experts, router and shared experts, each decoder layer's attention, and nothing else."""
    base = plain(family)
    layers, attention = moe_layers(base), attention_modules(base)
    meant = {path for layer in layers for path in (layer.experts, layer.router, *layer.shared)} | set(attention)
    model = adapted(family)
    assert set(model.base_model.targeted_module_names) == meant
    counts = count_parameters(model)
    parts = [counts[part] for part in ("attention", "router", "shared", "experts")]
    assert sum(parts) == counts["trainable"] and min(counts[p] for p in ("attention", "router", "experts")) > 0
    assert bool(counts["shared"]) == any(layer.shared for layer in layers)
    assert not any("vis" in path or "audio" in path or "expert_gate" in path for path in meant)
    # By their names, which most families share, and without what finds them.
    shared = r".*shared_(experts?|mlp)\.(gate|up|down|input|output)\w*"
    named = re.compile(rf"\.layers\.\d+\.(self_attn\.[qkvo]_proj(\.linear)?|{shared})$")
    linears = {path for path, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {path for path in linears if named.search(path) and not re.search("vis|audio|encoder", path)}
    assert found <= {path.removeprefix("base_model.model.") for path in meant}, found - meant


@every_family
def test_parameters_are_counted_from_the_config_alone(family, tmp_path):
    zoo_config(family).save_pretrained(tmp_path)
    counted, built = parameters_from_config(tmp_path, experts_per_layer=3, r=4), count_parameters(adapted(family))
    for part in ("trainable", "attention", "router", "shared", "experts"):
        assert counted[part] == built[part], part


@every_family
def test_save_load_merge_switch_and_disable(family, tmp_path):
    base = logits(plain(family))
    model = adapted(family)
    first = logits(model)
    assert not torch.equal(first, base)
    model.save_pretrained(tmp_path / "a")
    other = adapted(family, seed=1, plan=plan_for(plain(family), (0, 7)), r=2, train_router=False)
    second = logits(other)
    other.save_pretrained(tmp_path / "b")

    both = load_adapter(zoo_model(family), tmp_path / "a", "a")
    load_adapter(both, tmp_path / "b", "b")
    for name, expected in (("a", first), ("b", second), ("a", first)):
        both.set_adapter(name)
        assert torch.equal(logits(both), expected)
    with both.disable_adapter():
        assert torch.equal(logits(both), base)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), first, rtol=1e-3, atol=1e-4 * first.abs().max().item())


def tie_scores(model):
    """Experts of one parity score the same, whatever the token: K of four or more that tie are chosen."""
    for layer in moe_layers(model):
        router = model.get_submodule(layer.router)
        scored = [router.get_parameter(layer.router_weight).data]
        block = model.get_submodule(layer.router.rpartition(".")[0])
        own = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
        biases = [tensor.data for _, tensor in (*router.named_parameters(), *router.named_buffers(), *own)]
        scored += [tensor.view(-1) for tensor in biases if tensor.numel() == len(scored[0])]
        for tensor in scored:
            tensor[2:NUM_EXPERTS] = tensor[[0, 1] * (NUM_EXPERTS // 2 - 1)]


@every_family
def test_gradient_checkpointing_changes_nothing(family):
    """Where scores tie, too: which of them is chosen is left to topk, twice."""
    gradients, chosen = [], []
    for kwargs in (None, {"use_reentrant": False}, checkpoint_kwargs()):
        model = adapted(family, train_router=False)
        tie_scores(model)
        model.train()
        if kwargs:
            model.gradient_checkpointing_enable(kwargs)
        else:
            for layer in moe_layers(model):
                model.get_submodule(layer.experts).register_forward_pre_hook(
                    lambda _, args, kwargs: chosen.append((*args, *kwargs.values())[1]), with_kwargs=True
                )
        torch.manual_seed(0)
        model(**BATCH, use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    if family not in NOISY:  # which no tie outlives
        of_one_parity = [bool((ids % 2 == ids[:, :1] % 2).all()) for ids in chosen]
        assert all(of_one_parity[family in BY_TABLE :]), "scores do not tie"
    without, *others = gradients
    assert any(grad.any() for grad in without.values() if grad is not None)
    for found in others:
        assert found.keys() == without.keys()
        for name, plain in without.items():
            # inkling's convolutions round otherwise when they run again. Another expert is another gradient by far.
            assert (found[name] - plain).norm() <= 1e-5 * plain.norm(), name


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("kind", ["dora", "frozen A, sparse B", "full experts", "ranks"])
def test_other_ways_to_adapt_train_and_merge(family, kind):
    """What `test_factors` shows exactly on four layouts, on every family: gradients flow, merged equals unmerged."""
    plan, options = plan_for(plain(family)), {}
    if kind == "dora":
        options = {"use_dora": True}
    elif kind == "full experts":
        options = {"train_full_experts": True, "train_attention": False, "train_router": False, "train_shared": False}
    elif kind == "ranks":
        plan["ranks"] = {layer: [2, 4, 4] for layer in plan["experts"]}
    else:
        options = {"train_a": False}
        options["mask"] = draw_mask(adapted(family, plan=plan, **options))
    model = adapted(family, plan=plan, randomise=kind != "full experts", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # fill made them random
                parameter.copy_(parameter.abs() + 0.5)
            elif kind == "full experts" and "lora_" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model(**BATCH).logits.sum().backward()
    has_gradient = any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "experts" in n)
    assert has_gradient or family in SKIPS
    expected = logits(model)
    merged = logits(model.merge_and_unload())
    assert expected.isfinite().all() and (merged - expected).norm() <= 1e-3 * expected.norm()
