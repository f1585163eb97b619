"""Methods, presets and placements by name: what they stand for, what they train, what comes before them."""

import json

import pytest

from hotlora.adapter.count import parameters_from_config
from hotlora.base.errors import HotLoraError
from hotlora.runs.methods import METHODS, PLACEMENTS, PRESETS, counted_options, resolve
from hotlora.training.identity import check_same

OLMOE = {
    "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "vocab_size": 50304,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "placement", "trainable", "percent"),
    [
        ("lora", None, 311_459_840, 4.3075),
        ("hellora", None, 47_218_688, 0.6778),
        ("hellora", "pure", 37_748_736, 0.5426),
        ("hellora", "gate", 38_830_080, 0.5581),
        ("lori-d", None, 138_444_800, 1.9147),
        ("lori-s", None, 13_844_480, 0.1915),
        ("hellori-d", None, 21_004_288, 0.3015),
        ("hellori-s", None, 2_100_429, 0.0302),
        ("hellori-d", "pure", 16_777_216, 0.2412),
        ("hellori-d", "gate", 16_809_984, 0.2416),
        ("sieve", None, 84_967_424, 1.2131),
        ("fft", None, 6_919_161_856, 100.0),
        # Of each expert's projections and of attention's: an output has one magnitude.
        ("dora", None, 311_459_840 + 16 * (64 * (1024 + 1024 + 2048) + 4 * 2048 + 64), 4.3647),
    ],
)
def test_the_papers_counts_from_olmoes_config(tmp_path, method, placement, trainable, percent):
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    options = counted_options(method, placement)
    counts = parameters_from_config(tmp_path, **options)
    assert counts["trainable"] == trainable
    assert round(counts["percent"], 4) == percent


def test_what_depends_on_the_data_is_not_counted():
    with pytest.raises(HotLoraError, match="as many experts as the data's routing says"):
        counted_options("esft", None)


def resolved(method=None, **given):
    return resolve(method, **{"model": "nano", "data": "nano-math", **given})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resolves(name):
    options = resolved(name)
    assert options.condition == name
    assert resolved(name, placement="pure").train_attention is False


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(name):
    options = resolved(preset=name, learning_rate=1e-3)
    assert options.learning_rate == 1e-3
    assert options.condition in METHODS and name.startswith(options.condition)


def test_the_published_hyperparameters():
    hellora = resolved(preset="hellora-code")
    config = hellora
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.0)
    assert (config.learning_rate, config.epochs, config.batch_size) == (2e-3, 2, 128)
    assert (hellora.rule, hellora.experts_per_layer) == ("hot", "top_k")
    assert resolved(preset="fft-safety").learning_rate == 2e-5
    assert resolved(preset="fft-math").batch_size == 256
    lori = resolved(preset="lori-s-math")
    assert (lori.learning_rate, lori.dense_learning_rate, lori.keep) == (5e-4, 5e-5, 0.1)
    assert lori.train_a is False and lori.batch_size == 32
    esft = resolved(preset="esft-gate")
    assert (esft.signal, esft.adam_beta2, esft.weight_decay) == ("mass", 0.95, 0.1)


def test_moe_sieves_protocol():
    """Its PDF's section 5.1, and its released code where that says nothing."""
    sieve = resolved(preset="sieve")
    assert (sieve.rule, sieve.fraction, sieve.signal, sieve.profile_fraction) == ("hot", 0.25, "count", 1.0)
    assert (sieve.r, sieve.lora_alpha, sieve.lora_dropout) == (32, 64, 0.05)
    assert (sieve.learning_rate, sieve.epochs, sieve.weight_decay, sieve.max_grad_norm) == (4e-4, 3, 0.0, 1.0)
    assert (sieve.lr_scheduler, sieve.warmup_length) == ("linear", 0.0)
    assert (sieve.batch_size * sieve.gradient_accumulation_steps, sieve.max_length) == (64, 2048)
    assert sieve.train_on == "all", "the loss is on prompt and answer"


def test_a_run_of_the_older_preset_is_not_gone_on_with(tmp_path):
    """Before, its rate was the user's, and the rest the defaults."""
    older = resolved("sieve", epochs=3, batch_size=64, learning_rate=4e-4).recorded() | {"train_on": None}
    now = resolved(preset="sieve").recorded() | {"train_on": "all"}
    with pytest.raises(HotLoraError, match=r"--lr-scheduler linear against constant_with_warmup.*--train-on all"):
        check_same(older, now, tmp_path)


def test_what_is_given_comes_first():
    assert resolved("sieve", lora_dropout=0.0).lora_dropout == 0.0
    assert resolved("sieve", experts_per_layer=3).fraction is None
    assert resolved("hellora", fraction=0.5).experts_per_layer is None
    assert resolved("hellora", rule="coverage", p=0.5).experts_per_layer is None
    assert resolved("hellora", rule="coverage", p=0.5).rule == "coverage"
    assert resolved(preset="hellora-math", epochs=1).epochs == 1
    assert resolved("lora", placement="gate").condition == "lora-gate"
    assert resolved("hellora", dense_mixer=True, share_a=True).condition == "hellora-share-a-dense-mixer"
    assert resolved(rule="cold").condition is None
    assert resolved(rule="cold").condition_by("cold") == "cold"
    assert resolved(rule="cold", reprofile_every=5).condition_by("cold") == "cold-reprofile"
    assert resolved(train_a=False).condition_by("all") == "all-lora-fa"
    assert PLACEMENTS["full"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qlora"}, r"method 'qlora' does not exist \(did you mean lora\?\): choose one of fft, lora"),
        ({"preset": "hellora-poetry"}, "preset 'hellora-poetry' does not exist"),
        ({"placement": "left"}, "placement 'left' does not exist: choose one of full, gate, pure"),
        ({"preset": "hellora-math", "method": "lora"}, "is for method 'hellora', and method is 'lora'"),
        ({"lora_r": 8}, r"lora_r \(did you mean r\?\): no such option"),
        ({"zzz": 1.0}, r"zzz \(docs/options.md has all\)"),
        ({"learning_rte": 1.0}, r"learning_rte \(did you mean learning_rate\?\): no such option"),
    ],
)
def test_errors(options, message):
    with pytest.raises(HotLoraError, match=message):
        resolved(**options)


def test_the_gate_is_trained_by_every_method():
    """ESFT alone trains nothing beside the experts; placed on the gate it does."""
    for method in METHODS:
        options = resolve(method, placement="gate", model="m", data="d")
        assert options.full or (options.train_router, options.train_attention, options.train_shared) == (
            True,
            False,
            False,
        )
    assert not resolve("esft", placement="gate", model="m", data="d", train_router=False).train_router
    assert not resolve("esft", model="m", data="d").train_router
