"""What is foreseen of runs on packed checkpoints, and of a warm-up: as they really load and train."""

import dataclasses

import pytest
from packed_checkpoints import write_fp8, write_mxfp4
from runs import run_options
from typer.testing import CliRunner

from hotlora.base.errors import HotLoraError
from hotlora.cli.main import app
from hotlora.cost import preflight as module
from hotlora.cost.fit import fit
from hotlora.cost.preflight import preflight
from hotlora.runs.checks import check_run

SMALL = {"batch_size": 4, "max_length": 64, "r": 8, "device": "cpu"}
WIDE = {"hidden_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Checkpoints whose experts are most of what a step takes."""
    folder = tmp_path_factory.mktemp("packed")
    return {
        "MXFP4": write_mxfp4(folder / "a", **WIDE, intermediate_size=1024),
        "FP8": write_fp8(folder / "b", **WIDE, moe_intermediate_size=1024),
    }


def options_of(model, **given):
    return run_options(str(model), "nano-math", **{**SMALL, **given})


def needed(model, **given):
    return preflight(options_of(model, **given), free=10**12).needed


def dense_bytes(model):
    return needed(model, quantize=0) - needed(model)


@pytest.mark.parametrize("name", ["MXFP4", "FP8"])
def test_quantize_is_never_advised_for_a_packed_checkpoint(packed, name):
    model = packed[name]
    for given in ({}, {"quantize": 0}):
        for share in (0.3, 0.6, 0.9):
            free = round(share * needed(model, **given))
            told = str(preflight(options_of(model, **given), free=free))
            assert not {"--quantize 4", "--quantize 8"} & {part[:12] for part in told.replace("; ", ". ").split(". ")}
            try:
                told = " ".join(fit(options_of(model, **given, fit=f"{free / 1e6}MB"), given, device="cpu").lines)
            except HotLoraError as error:
                told = str(error)
            assert "--quantize 4" not in told and "--quantize 8" not in told


@pytest.mark.filterwarnings("ignore:bitsandbytes has quantized nn.Linear only")
def test_nor_for_one_that_others_quantized(tmp_path):
    import json

    from tiny import tiny_model

    tiny_model("olmoe", hidden_size=128, intermediate_size=512, num_experts=16).save_pretrained(tmp_path)
    assert "--quantize" in str(preflight(options_of(tmp_path), free=round(0.6 * needed(tmp_path))))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = str(preflight(options_of(tmp_path), free=round(0.6 * needed(tmp_path))))
    assert "it may not fit" in told and "--quantize" not in told


@pytest.mark.parametrize("name", ["MXFP4", "FP8"])
def test_a_packed_checkpoint_that_is_made_dense_is_counted_dense(packed, name, monkeypatch):
    model = packed[name]
    more = dense_bytes(model)
    assert more > 0.3 * needed(model)
    monkeypatch.setattr(module, "num_processes", lambda: 2)
    assert needed(model, quantize=0) - needed(model) == more
    assert needed(model, expert_parallel=2) == needed(model, expert_parallel=2, quantize=0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert needed(model) == needed(model, quantize=0)


def test_an_adapter_to_merge_makes_it_dense(packed, tmp_path):
    (tmp_path / "earlier").mkdir()
    model = packed["MXFP4"]
    below = dataclasses.replace(options_of(model), on_top_of=(str(tmp_path / "earlier"),))
    assert preflight(below, free=10**12).needed == needed(model, quantize=0)


def test_it_is_said_before_a_packed_checkpoint_is_spread(packed, caplog):
    from transformers import AutoConfig

    from hotlora.hf.models import _quantization

    config = AutoConfig.from_pretrained(packed["FP8"])
    _quantization(config, None, False, is_spread=True)
    assert "the experts, in fp8 in the checkpoint, are made dense" in caplog.text


@pytest.mark.parametrize("given", [{"use_dora": True}, {"method": "esft"}])
def test_what_needs_dense_experts_is_refused_before_loading(packed, given):
    with pytest.raises(HotLoraError, match=r"MXFP4.*--quantize 0"):
        check_run(options_of(packed["MXFP4"], **given))
    check_run(options_of(packed["MXFP4"], **given, quantize=0))
    with pytest.raises(HotLoraError, match="leave out --quantize"):
        check_run(options_of("nano", **given, quantize=4))


def test_offload_and_dense_experts_are_refused_before_loading(packed):
    with pytest.raises(HotLoraError, match="leave out one of offload and dequantize"):
        check_run(options_of(packed["MXFP4"], quantize=0, offload="all"))


def test_a_warm_up_is_counted():
    """It trains all experts' adapters."""
    hot, every = needed("nano", fraction=0.25), needed("nano", rule="all")
    assert needed("nano", fraction=0.25, warmup="lora") == max(hot, every) > min(hot, every)
    wide = {"fraction": 0.25, "r": 64}
    hot, every = needed("nano", **wide), needed("nano", rule="all", r=64)
    assert hot < every == needed("nano", **wide, warmup="lora")
    room, left = every - 10**6, {"offload", "quantize"}
    assert not fit(options_of("nano", **wide, fit=f"{room / 0.9e6}MB"), left).chosen
    found = fit(options_of("nano", **wide, fit=f"{room / 0.9e6}MB", warmup="lora"), left)
    assert found.chosen and found.memory["total"] <= room


def test_a_run_after_a_warm_up_may_be_the_larger():
    """With few bits and the hot experts kept, of which a warm-up knows nothing."""
    pytest.importorskip("bitsandbytes")
    kept = {"fraction": 0.9, "quantize": 4, "keep_hot": True, "r": 1}
    assert needed("nano", **kept, warmup="lora") == max(
        needed("nano", **kept), needed("nano", rule="all", quantize=4, r=1)
    )


@pytest.mark.parametrize("name", ["MXFP4", "FP8"])
def test_params_refuses_what_train_refuses(packed, name):
    for flags in (["--quantize", "4"], ["--quantize", "8", "--fit", "24GB"], ["--quantize", "4", "--estimate"]):
        told = str(CliRunner().invoke(app, ["params", str(packed[name]), *flags]).exception)
        with pytest.raises(HotLoraError) as error:
            check_run(options_of(packed[name], quantize=int(flags[1])))
        assert told == str(error.value) and f"its experts are stored in {name} already" in told
    for flags in (["--quantize", "0"], ["--offload", "all", "--quantize-linear", "4"]):
        result = CliRunner().invoke(app, ["params", str(packed[name]), "--estimate", *flags])
        assert result.exit_code == 0, result.exception
