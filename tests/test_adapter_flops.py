"""What an adapter costs by a model's config: HELLoRA's later text (arXiv 2605.18795), and DeepSeek-MoE-16B."""

from pathlib import Path

import pytest
from zoo import zoo_model

from hotlora.adapter.count import parameters_from_config
from hotlora.base.errors import FileError, HotLoraError
from hotlora.cost.adapter import adapter_flops
from hotlora.cost.estimate import estimate
from hotlora.cost.flops import attention_adapter_flops, expert_adapter_flops
from hotlora.hf.models import model_from_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "benchmarks" / "configs"
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
EXPERT, ATTENTION, ROUTER = 3 * 32 * (2048 + 1408), 4 * 32 * (2048 + 2048), 32 * (2048 + 64)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "glm4_moe", "gpt_oss"])
def test_a_weight_of_a_factor_takes_two_for_each_token_it_sees(family, tmp_path):
    model = zoo_model(family)
    model.config.save_pretrained(tmp_path)
    counts = parameters_from_config(tmp_path, experts_per_layer=3, r=4)
    found = adapter_flops(tmp_path, counts, experts_per_layer=3, coverage=0.7)
    layers = dict.fromkeys(range(8), 0.7)
    assert found["experts"] == pytest.approx(expert_adapter_flops(model, 4, layers))
    assert found["attention"] == attention_adapter_flops(model, 4)
    assert found["router"] == 2 * counts["router"] and found["shared"] == 2 * counts["shared"]
    assert found["per_token"] == sum(found[part] for part in ("attention", "router", "shared", "experts"))


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"train_a": False}, {"share_a": True}, {"train_router": False}])
def test_the_estimate_has_the_same_number(family, options, tmp_path):
    """A frozen or shared A saves no product."""
    zoo_model(family).config.save_pretrained(tmp_path)
    plain = {name: value for name, value in options.items() if name == "train_router"}
    counts = parameters_from_config(tmp_path, experts_per_layer=3, r=4, **plain)
    found = adapter_flops(tmp_path, counts, experts_per_layer=3, coverage=0.7)["per_token"]
    step = estimate(tmp_path, batch_size=1, max_length=16, experts_per_layer=3, coverage=0.7, r=4, **options)
    assert step["flops"]["adapter_per_token"] == pytest.approx(found)


def test_deepseek_moe_16b_is_counted_from_its_own_config():
    """Its code is remote and is not run; 16.4 billion weights, the first of 28 layers dense."""
    file = CONFIGS / "deepseek-moe-16b"
    every, hot = (parameters_from_config(file, experts_per_layer=k, r=32) for k in (None, "top_k"))
    assert every["total"] - every["trainable"] == 16_375_728_128
    beside = 28 * ATTENTION + 27 * (ROUTER + 3 * 32 * (2048 + 2 * 1408))
    assert every["trainable"] == beside + 27 * 64 * EXPERT == 602_421_248
    assert hot["trainable"] == beside + 27 * 6 * EXPERT == 82_860_032
    for number in ("602.4M", "82.9M", "3.548%", "0.503%", "13.8%"):
        assert number in PAGE
    assert f"{100 * hot['trainable'] / every['trainable']:.1f}%" == "13.8%"
    twelve = parameters_from_config(file, experts_per_layer=12, r=32)
    assert f"{100 * twelve['percent'] / every['percent']:.1f}%" == "23.3%" and "23.3%" in PAGE


def flops(name, k, coverage=None):
    file = CONFIGS / name
    return adapter_flops(
        file, parameters_from_config(file, experts_per_layer=k, r=32), experts_per_layer=k, coverage=coverage
    )["per_token"]


def test_what_hellora_saves_of_the_adapters_flops():
    """38.7% fewer on OLMoE is what a coverage of 51.6% gives."""
    every = flops("olmoe-1b-7b", None)
    fewer = {coverage: 1 - flops("olmoe-1b-7b", "top_k", coverage) / every for coverage in (0.516, 0.3926, 0.4838)}
    assert [f"{value:.1%}" for value in fewer.values()] == ["38.7%", "48.6%", "41.3%"]
    for number in ("38.7%", "51.6%", "94.4", "48.6%", "41.3%"):
        assert number in PAGE
    every = flops("deepseek-moe-16b", None)
    assert f"{every / 1e6:.1f}" == "165.7" and "165.7" in PAGE
    hot = [flops("deepseek-moe-16b", "top_k", coverage) for coverage in (0.0, None, 1.0)]
    assert [f"{value / 1e6:.1f}" for value in hot] == ["58.2", "91.9", "165.7"] and "91.9" in PAGE


def test_a_coverage_is_a_share(tmp_path):
    file = CONFIGS / "olmoe-1b-7b"
    counts = {"attention": 0, "router": 0, "shared": 0, "experts": 0}
    with pytest.raises(HotLoraError, match=r"coverage is 1\.5: it is a share, from 0 to 1"):
        adapter_flops(file, counts, coverage=1.5)


@pytest.mark.parametrize("text", ['{"model_type": "deepseek"}', '{"model_type": ["deepseek"]}', "[1]", "{"])
def test_a_config_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileError, match=r"config\.json"):
        model_from_config(tmp_path)
