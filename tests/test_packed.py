"""Checkpoints in MXFP4 and block FP8: trained on as they are stored, with the numbers of transformers' dequantization."""

import pytest
import torch
from packed_checkpoints import by_hand, made, write_fp8, write_mxfp4
from tiny import tiny_batch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from hotlora.adapter.load import load_model
from hotlora.adapter.packed import PackedExperts
from hotlora.hf.models import fingerprint, moe_layers

WRITERS = {
    "mxfp4": write_mxfp4,
    "fp8-qwen3": write_fp8,
    "fp8-deepseek": lambda folder: write_fp8(folder, "deepseek_v3"),
}
checkpoints = pytest.mark.parametrize("kind", WRITERS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """kind -> its folder."""
    return {kind: write(tmp_path_factory.mktemp("packed") / kind) for kind, write in WRITERS.items()}


def holders(model) -> dict[str, PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def by_transformers(folder, dtype):
    config = (Mxfp4Config if "mxfp4" in folder.name else FineGrainedFP8Config)(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


@checkpoints
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_weights_are_those_that_transformers_makes_dense(written, kind, dtype, tmp_path):
    """Bit for bit, and held in the bytes that the file has."""
    expected = dict(by_transformers(written[kind], dtype).named_parameters())
    model = load_model(written[kind], device="cpu", dtype=dtype)
    found = holders(model)
    layers = moe_layers(model)
    assert len(found) == 2 * len(layers)
    for name, holder in found.items():
        dense = expected.pop(name).to(dtype)  # transformers 5.17 makes MXFP4 bfloat16 in any case
        assert (holder.shape, holder.dtype, holder.device) == (dense.shape, dense.dtype, dense.device)
        assert torch.equal(holder.dequantize(), dense)
        assert torch.equal(holder.expert(3), dense[3]) and torch.equal(holder.some(2, 5), dense[2:5])
        assert holder.numel() == dense.numel() and holder.nbytes < dense.numel() * (0.6 if kind == "mxfp4" else 1.1)
    rest = dict(model.named_parameters())
    assert rest.keys() == expected.keys()
    made(model.config.model_type).save_pretrained(tmp_path)
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_parameters())
    for name, dense in expected.items():  # whose dtype transformers 5.23 leaves as it is in the file
        assert rest[name].dtype == plain[name].dtype and torch.equal(rest[name], dense.to(rest[name].dtype)), name


@checkpoints
def test_a_model_computes_as_its_dense_copy(written, kind):
    model, dense = (load_model(written[kind], device="cpu", dequantize=so) for so in (False, True))
    assert holders(model) and not holders(dense) and not model.training
    assert getattr(model.config, "quantization_config", None) is None
    assert fingerprint(model) == fingerprint(dense) == fingerprint(made(model.config.model_type))
    batch = tiny_batch(vocab_size=259)
    got, expected = model(**batch).logits, dense(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
