"""Routes that are replayed: the experts are those given, in every family, and the live router weighs them."""

import pytest
import torch
from peft import get_peft_model
from test_families import BATCH, BY_TABLE, adapted, every_family, plan_for
from tiny import fill
from torch.overrides import _get_current_function_mode_stack
from zoo import runs_of, zoo_model

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.base.errors import DataError, ModelError
from hotlora.hf.moe_layers import expert_groups, moe_layers
from hotlora.routing.replay import replay_routing
from hotlora.routing.routes import Routes, record_routing
from hotlora.training.gradient_checkpointing import checkpoint_kwargs

NOT_TOP_K = ("phimoe",)
ROWS, LENGTH = BATCH["input_ids"].shape


def run(model, batch=BATCH):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def recorded(model, batch=BATCH):
    with record_routing(model) as found:
        logits = run(model, batch)
    return found.expert_ids(), logits


def others(expert_ids, num_experts):
    """Other distinct experts for each token."""
    shift = torch.arange(expert_ids[..., 0].numel()).view(*expert_ids.shape[:-1], 1) % (num_experts - 1) + 1
    return (expert_ids + shift) % num_experts


@every_family
def test_own_routes_change_nothing_and_others_are_taken(family):
    model = zoo_model(family)
    layers = moe_layers(model)
    if any(runs > 1 for runs in runs_of(family, layers)):
        with pytest.raises(DataError, match="runs each layer once"):
            recorded(model)
        return
    ids, plain = recorded(model)
    if family in NOT_TOP_K:
        with pytest.raises(ModelError, match=r"does not choose by torch\.topk"), replay_routing(model, others(ids, 8)):
            run(model)
        return
    with replay_routing(model, ids):
        assert torch.equal(run(model), plain)
    wanted = others(ids, layers[0].num_experts)
    if family in BY_TABLE:
        wanted[0] = ids[0]
    with replay_routing(model, wanted):
        taken, changed = recorded(model)
    assert torch.equal(taken, wanted) and changed.isfinite().all() and not torch.equal(changed, plain)
    assert torch.equal(run(model), plain)  # nothing is left behind


@every_family
def test_groups_of_the_given_experts_are_open(family):
    """Routers that choose groups first give experts of a closed group the weight 0."""
    if expert_groups(zoo_model(family)) is None:
        pytest.skip("it has no groups")
    model = zoo_model(family)
    for module in model.modules():
        if hasattr(module, "topk_group"):
            module.topk_group = 1
        if hasattr(module, "topk_method"):
            module.topk_method = "group_limited_greedy"
    layers, weights = moe_layers(model), {}
    ids, _ = recorded(model)
    per_group = 8 // expert_groups(model)
    assert (ids // per_group == ids[..., :1] // per_group).all(), "one group for each token"
    wanted = (ids + per_group) % 8
    for layer in layers:
        model.get_submodule(layer.experts).register_forward_pre_hook(
            lambda _, args, kwargs, i=layer.layer: weights.update({i: (*args, *kwargs.values())[2]}), with_kwargs=True
        )
    with replay_routing(model, wanted):
        taken, _ = recorded(model)
    assert torch.equal(taken, wanted)
    assert all((weight != 0).all() for weight in weights.values())


def reweighted(family, logits_TE, index_TK, normalised):
    """What each family's paper says of the weights of given experts, on router logits."""
    if family == "gpt_oss":
        return logits_TE.gather(1, index_TK).softmax(1)
    if family == "deepseek_v3":
        scores = logits_TE.sigmoid().gather(1, index_TK)
        return scores / (scores.sum(1, keepdim=True) + 1e-20)
    scores = logits_TE.softmax(1).gather(1, index_TK)
    return scores / scores.sum(1, keepdim=True) if normalised else scores


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_weights_and_gradients_are_those_of_a_plain_formula(family):
    model, weights = zoo_model(family).requires_grad_(True), {}
    layers = moe_layers(model)
    wanted = others(recorded(model)[0], 8)
    layer, hidden = layers[0], {}
    model.get_submodule(layer.experts).register_forward_pre_hook(
        lambda _, args, kwargs: weights.update(found=(*args, *kwargs.values())[2]), with_kwargs=True
    )
    router = model.get_submodule(layer.router)
    router.register_forward_pre_hook(lambda _, args: hidden.update(found=args[0].detach().flatten(0, -2)))
    with replay_routing(model, wanted):
        model(**BATCH, use_cache=False)
    weight = model.get_parameter(f"{layer.router}.{layer.router_weight}")
    bias = getattr(router, "bias", None)
    logits = torch.nn.functional.linear(hidden["found"].float(), weight.float(), None if bias is None else bias.float())
    scale = getattr(model.config, "routed_scaling_factor", None) or 1.0
    normalised = getattr(model.config, "norm_topk_prob", True)
    plain = reweighted(family, logits, wanted[0].flatten(0, 1), normalised) * scale
    assert torch.allclose(weights["found"].view(plain.shape), plain, atol=1e-6)
    random = torch.randn_like(plain)
    (ours,) = torch.autograd.grad((weights["found"].view(plain.shape) * random).sum(), weight, retain_graph=True)
    (theirs,) = torch.autograd.grad((plain * random).sum(), weight)
    assert theirs.abs().max() > 0 and torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, checkpoint_kwargs()], ids=["torch's", "ours"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gemma4_text"])
def test_gradient_checkpointing_replays_the_same(family, kwargs):
    model = adapted(family)
    wanted = others(recorded(model)[0], 8)
    labels = BATCH["input_ids"]

    def gradients():
        model.zero_grad()
        with replay_routing(model, wanted):
            loss = model(**BATCH, labels=labels, use_cache=False).loss
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    with record_routing(model) as again:
        again_gradients = gradients()
    assert len(plain) == len(again_gradients) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, again_gradients, strict=True))
    runs = again._seen[0]
    assert len(runs) == 2 and torch.equal(runs[0], runs[1])  # forward, and again in the backward


def test_unknown_routes_are_the_routers():
    model = zoo_model("olmoe")
    ids, plain = recorded(model)
    some = others(ids, 8)
    some[:, :, ::2] = -1
    with replay_routing(model, some):
        taken, _ = recorded(model)
    assert torch.equal(taken[:, :, 1::2], some[:, :, 1::2])
    assert torch.equal(taken[0, :, ::2], ids[0, :, ::2])  # later layers see other states
    some[..., 0] = -1  # a part of a token's experts is not enough
    with replay_routing(model, some):
        assert torch.equal(run(model), plain)


def test_routes_are_found_by_tokens_in_any_batch():
    model = zoo_model("olmoe")
    texts = [torch.arange(3, 3 + n) for n in (5, 9, 7)]
    routes, expected = Routes(), {}
    for text in texts:
        ids, _ = recorded(model, {"input_ids": text[None]})
        expected[len(text)] = others(ids, 8)[:, 0, :-1]
        routes.add(text, expected[len(text)].transpose(0, 1).numpy())
    for side in ("left", "right"):
        for order in ([0, 1, 2], [2, 0]):
            rows = [texts[i] for i in order]
            batch = {
                "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side),
                "attention_mask": torch.nn.utils.rnn.pad_sequence(
                    [torch.ones_like(row) for row in rows], batch_first=True, padding_side=side
                ),
            }  # fmt: skip
            with replay_routing(model, routes):
                taken, _ = recorded(model, batch)
            for row, text in enumerate(rows):
                mine = taken[:, row, batch["attention_mask"][row].bool()]
                assert torch.equal(mine[:, :-1], expected[len(text)])
    assert (routes.found, routes.missing) == (10, 0)
    with replay_routing(model, routes):  # unknown texts, and generation, are the router's
        assert torch.equal(run(model), recorded(model)[1])
        prompt = {"input_ids": texts[1][None]}
        generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(**prompt, max_new_tokens=4, do_sample=False))
    assert routes.missing == 2 * ROWS


def test_routes_of_all_decoder_layers():
    """Engines write zeros for a dense layer; here the first one is."""
    model, text = zoo_model("deepseek_v3"), torch.arange(3, 10)
    layers = [layer.layer for layer in moe_layers(model)]
    assert layers == [1, 2]
    ids, _ = recorded(model, {"input_ids": text[None]})
    wanted = others(ids, 8)[:, 0].transpose(0, 1)
    routes = Routes()
    routes.add(text, torch.cat([torch.zeros_like(wanted[:, :1]), wanted], dim=1))
    with replay_routing(model, routes):
        taken, _ = recorded(model, {"input_ids": text[None]})
    assert torch.equal(taken[:, 0].transpose(0, 1), wanted)


def test_generation_is_recorded_as_one_forward_of_its_text_routes():
    model, _ = hotlora.load("nano")
    prompt = torch.tensor([[5, 9, 20, 31], [7, 7, 8, 40]])
    with record_routing(model) as found:
        text = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6
        )
    ids = found.expert_ids()
    whole, _ = recorded(model, {"input_ids": text})
    assert ids.shape[2] == text.shape[1] - 1
    assert torch.equal(ids.sort(-1).values, whole[:, :, :-1].sort(-1).values)


def test_an_adapted_model_replays_inside_trainers_wrappers():
    model = get_peft_model(zoo_model("olmoe"), HotLoraConfig(plan=plan_for(zoo_model("olmoe")), r=4))
    fill(model, 0, scale=0.05)
    model.eval()
    wanted = others(recorded(model)[0], 8)
    with replay_routing(model, wanted), record_routing(model) as found:
        model.get_base_model().forward(**BATCH, use_cache=False)  # as PeftModel itself calls it
    assert torch.equal(found.expert_ids(), wanted)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda ids: ids[:1], r"they must be \[\d layers, rows, positions, 2 experts\]"),
        (lambda ids: ids.float(), "they must be integers"),
        (lambda ids: ids + 7, "the model has experts 0 to 7"),
        (lambda ids: ids - 9, "the model has experts 0 to 7"),
        (lambda ids: ids * 0, "an expert twice"),
        (lambda ids: ids[:, :, :5], r"expert_ids are of \[2, 5\] rows and positions, and the forward has \[2, 24\]"),
    ],
)
def test_wrong_ids_are_one_message(change, said):
    model = zoo_model("olmoe")
    ids, _ = recorded(model)
    with pytest.raises(DataError, match=said), replay_routing(model, change(ids)):
        run(model)


@pytest.mark.parametrize(
    "tokens, experts, said",
    [
        ([1, 2], torch.zeros(3, 2, 2, dtype=torch.int64), "of no more tokens"),
        ([1, 2], torch.zeros(2, 2), "of float32"),
        ([[1, 2]], torch.zeros(1, 2, 2, dtype=torch.int64), r"token_ids are \[1, 2\]"),
    ],
)
def test_wrong_routes_are_one_message(tokens, experts, said):
    with pytest.raises(DataError, match=said):
        Routes().add(tokens, experts)
    model, routes = zoo_model("olmoe"), Routes()
    routes.add([1, 2], torch.tensor([[[0, 1]] * 2]))
    with pytest.raises(DataError, match="have 2 layers of 2 experts"), replay_routing(model, routes):
        run(model, {"input_ids": torch.tensor([[1, 2]])})


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_in_between_does_not_change_what_is_run_again(reentrant):
    """A reference's forward, or an evaluation's, may come between a forward and its backward."""
    model = adapted("olmoe")
    wanted = others(recorded(model)[0], 8)
    routes = Routes()
    for row, (tokens, mask) in enumerate(zip(BATCH["input_ids"], BATCH["attention_mask"].bool(), strict=True)):
        routes.add(tokens[mask], wanted[:, row, mask].transpose(0, 1))

    def gradients(between):
        model.zero_grad()
        with replay_routing(model, routes):
            loss = model(**BATCH, labels=BATCH["input_ids"], use_cache=False).loss
            if between:
                run(model, {"input_ids": BATCH["input_ids"].roll(1, 1)})
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    how = {"use_reentrant": True} if reentrant else checkpoint_kwargs()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.enable_input_require_grads()
    plain = gradients(False)
    assert plain and all(torch.equal(a, b) for a, b in zip(plain, gradients(True), strict=True))


def test_two_forwards_before_their_backward_are_refused_under_checkpointing():
    model = adapted("olmoe")
    ids = recorded(model)[0]
    routes = Routes()
    for shift in (0, 1):
        for row, tokens in enumerate(BATCH["input_ids"]):
            routes.add(tokens.roll(shift), others(ids, 8)[:, row].transpose(0, 1))
    batches = [{"input_ids": BATCH["input_ids"].roll(shift, 1)} for shift in (0, 1)]
    model.train()

    def backward():
        with replay_routing(model, routes):
            sum(model(**batch, use_cache=False).logits.square().mean() for batch in batches).backward()
            model.zero_grad()

    backward()  # nothing is run again
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs())
    model.enable_input_require_grads()
    with pytest.raises(ModelError, match="two forwards before their backward"):
        backward()
    with replay_routing(model, routes):  # one after the other, and one graph twice
        for batch in batches:
            model(**batch, use_cache=False).logits.square().mean().backward()
        loss = model(**batch, use_cache=False).logits.square().mean()
        loss.backward(retain_graph=True)
        loss.backward()


def test_an_interrupt_leaves_no_mode_behind():
    model = zoo_model("olmoe")
    ids, _ = recorded(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    experts = model.get_submodule(moe_layers(model)[0].experts)
    handle = experts.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), replay_routing(model, others(ids, 8)):
        run(model)
    handle.remove()
    assert _get_current_function_mode_stack() == []
    assert torch.equal(recorded(model)[0], ids)


@pytest.mark.parametrize(
    "tokens, experts, said",
    [
        ([1, 2], torch.tensor([[[65539, 1]]]), "65539"),
        ([1.5, 2.0], torch.tensor([[[3, 1]]]), "of float64"),
    ],
)
def test_numbers_that_would_be_changed_are_refused(tokens, experts, said):
    with pytest.raises(DataError, match=said):
        Routes().add(tokens, experts)


def test_packed_texts_are_found_each_by_itself():
    model, routes, given = zoo_model("olmoe"), Routes(), []
    texts = [torch.arange(3, 3 + n) for n in (5, 9, 7)]
    for text in texts[:2]:
        given.append(others(recorded(model, {"input_ids": text[None]})[0], 8))
        routes.add(text, given[-1][:, 0].transpose(0, 1))
    packed = {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(len(text)) for text in texts])[None],
    }
    plain, _ = recorded(model, packed)
    with replay_routing(model, routes):
        taken, _ = recorded(model, packed)
    assert torch.equal(taken, torch.cat([*given, plain[:, :, 14:]], dim=2))
    assert (routes.found, routes.missing) == (2, 1)


def test_routes_that_fit_no_row_are_told(caplog):
    model, routes = zoo_model("olmoe"), Routes()
    routes.add([1, 2], torch.tensor([[[0, 1]] * len(moe_layers(model))]))
    with replay_routing(model, routes):
        run(model)
    assert f"none of {ROWS} texts has routes" in caplog.text
    caplog.clear()
    with replay_routing(model, Routes()):  # nothing was to be found
        run(model)
    assert not caplog.text


def test_the_inner_of_two_replays_wins():
    model = zoo_model("olmoe")
    ids, _ = recorded(model)
    outer, inner = others(ids, 8), others(others(ids, 8), 8)
    with replay_routing(model, outer):
        with replay_routing(model, inner):
            assert torch.equal(recorded(model)[0], inner)
        assert torch.equal(recorded(model)[0], outer)
    assert torch.equal(recorded(model)[0], ids)


def test_what_is_no_expert_ids_is_one_message():
    model = zoo_model("olmoe")
    ids, _ = recorded(model)
    for wrong in (ids.numpy(), None, ids[:, :0]):
        with pytest.raises(DataError, match="they must be"), replay_routing(model, wrong):
            run(model)
    routes = Routes()
    routes.add(BATCH["input_ids"][0], ids[:, 0].transpose(0, 1))
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(DataError, match=r"attention_mask is \[2, 1, 24, 24\]"), replay_routing(model, routes):
        run(model, {"input_ids": BATCH["input_ids"], "attention_mask": mask})
