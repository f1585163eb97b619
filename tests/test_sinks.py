"""Attention with sinks by torch's fused kernels: what eager attention is, without its arrays of scores."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import hotlora
from hotlora.cost.activations import SavedBytes
from hotlora.cost.estimate import step_of
from hotlora.hf.sinks import FAMILIES, NAME, attention_with_sinks, default_attention

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "sliding_window": 5, "num_experts_per_tok": 2, "num_local_experts": 8, "num_experts": 8,
    "intermediate_size": 32, "moe_intermediate_size": 32, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
LENGTH = 17
families = pytest.mark.parametrize("family", [family for family in FAMILIES if family in CONFIG_MAPPING_NAMES])


def made(family: str, attention: str, dtype: torch.dtype = torch.float32):
    config = AutoConfig.for_model(family, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # families begin with 0, or next to it
                torch.nn.init.normal_(parameter, std=2)
    return model.eval()


def batch(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if kind == "packed":
        return {"input_ids": ids, "position_ids": torch.tensor([[*range(9), *range(8)]] * 2)}
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if kind == "padded right":
        mask[1, -5:] = 0
    if kind == "padded left":
        mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@families
@pytest.mark.parametrize("kind", ["whole", "padded right", "padded left", "packed"])
def test_it_is_eager_attention_forward_and_in_every_gradient(family, kind):
    given = batch(kind)
    weight = given.get("attention_mask", torch.ones(2, LENGTH))[..., None].float()
    found = []
    for attention in ("eager", NAME):
        model = made(family, attention)
        logits = model(**given).logits * weight
        (logits.sin() * torch.linspace(-1, 1, 128)).sum().backward()
        found.append((logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (eager, eagers), (ours, gradients) = found
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == eagers.keys() and sum("sinks" in name for name in gradients) >= 2
    for name, gradient in gradients.items():
        scale = eagers[name].abs().max()
        assert scale > 0 or "expert" in name, f"{name} has no gradient"
        torch.testing.assert_close(gradient, eagers[name], rtol=1e-4, atol=float(1e-4 * scale), msg=name)


@families
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_what_eager_attention_generates(family, cache):
    told = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    given = batch("padded left")
    eager, ours = (
        made(family, attention).generate(**given, **told, cache_implementation=cache) for attention in ("eager", NAME)
    )
    assert torch.equal(eager.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(eager.logits), rtol=1e-4, atol=1e-4)


@families
def test_in_bfloat16_it_is_no_further_from_the_truth(family):
    """Which is eager attention in float32, of the same weights."""
    given = batch("padded right")
    of_16_bits = {attention: made(family, attention, torch.bfloat16) for attention in ("eager", NAME)}
    truth = made(family, "eager")
    truth.load_state_dict({name: t.float() for name, t in of_16_bits["eager"].state_dict().items()})
    with torch.no_grad():
        expected = truth(**given).logits
        eager, ours = ((of_16_bits[a](**given).logits.float() - expected).abs().mean() for a in ("eager", NAME))
    assert 0 < ours < 1.3 * eager


def test_it_keeps_no_scores():
    heads, length = 8, 1024
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    q, k, v = (torch.randn(1, n, length, 64, requires_grad=True) for n in (heads, heads // 4, heads // 4))
    sinks = torch.randn(heads)
    for mask in (None, torch.ones(1, 1, length, length, dtype=torch.bool).tril()):
        with SavedBytes(module, q, k, v) as saved:
            out, _ = attention_with_sinks(module, q, k, v, mask, scaling=0.125, s_aux=sinks)
        assert out.shape == (1, length, heads, 64)
        assert saved.total < heads * length * length * 4 and out.requires_grad


@pytest.mark.parametrize("length", [15, 16, 17])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_are_as_wide_as_kernels_want_them(length, dtype, monkeypatch):
    """torch's kernels on a GPU copy a mask whose rows are no multiple of 16 numbers, once more in each layer."""
    module, given = torch.nn.Module(), []
    monkeypatch.setattr(
        "hotlora.hf.sinks.sdpa_attention_forward",
        lambda *args, **_: (given.append(args[4]), sdpa_attention_forward(*args))[1],
    )
    q, k, v = (torch.randn(2, 3, length, 8) for _ in range(3))
    sinks, mask = torch.randn(3), torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    expected = torch.cat([scores, sinks.view(1, 3, 1, 1).expand(2, 3, length, 1)], -1).softmax(-1)[..., :-1] @ v
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    found, _ = attention_with_sinks(module, q, k, v, mask, s_aux=sinks)
    torch.testing.assert_close(found.transpose(1, 2), expected)
    assert given[0].shape[-1] % 16 == 0 and given[0].stride(-2) % 16 == 0


def test_it_is_what_is_loaded(tmp_path):
    made("gpt_oss", "eager").save_pretrained(tmp_path)
    for asked, taken in ((None, NAME), ("eager", "eager"), (NAME, NAME)):
        model = hotlora.load_model(tmp_path, device="cpu", attn_implementation=asked)
        assert model.config._attn_implementation == taken
    assert "hotlora" not in model.config.to_json_string()
    assert hotlora.load_model("nano", device="cpu").config._attn_implementation == "sdpa"
    assert default_attention(model.config) == NAME


def test_the_estimate_knows_it(tmp_path):
    """And what was asked for instead."""
    made("gpt_oss", "eager").config.save_pretrained(tmp_path)
    size = {"batch_size": 1, "max_length": 512, "r": 2, "device": "cuda", "dtype": "bfloat16"}
    kinds = (None, NAME, "eager", "flash_attention_2", "flex_attention")
    kept = {kind: step_of(tmp_path, attn_implementation=kind, **size).rest for kind in kinds}
    scores = SIZES["num_attention_heads"] * 512 * 512 * 2
    assert kept[None] == kept[NAME] < kept["eager"] - 3 * scores
    assert kept["flash_attention_2"] == kept["flex_attention"] < kept[NAME]
