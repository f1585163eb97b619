"""Checkpoints in MXFP4 and block FP8: trained on as they are stored, in the numbers of transformers' dequantization."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from packed_checkpoints import by_hand, made, write_fp8, write_large, write_mxfp4
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_plan
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from typer.testing import CliRunner

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters
from hotlora.adapter.load import load_adapter, load_model
from hotlora.adapter.packed import PackedExperts, held_scales, scale_values, whole_blocks
from hotlora.adapter.quantize import ExpertsQuantization, quantize_experts
from hotlora.base.errors import HotLoraError, ModelError
from hotlora.base.records import read_record
from hotlora.cli.main import app
from hotlora.cost.estimate import estimate
from hotlora.hf.moe_layers import fingerprint, moe_layers
from hotlora.runs.checks import check_run
from hotlora.runs.methods import resolve

WRITERS = {
    "mxfp4": write_mxfp4,
    "fp8-qwen3": write_fp8,
    "fp8-deepseek": lambda folder: write_fp8(folder, "deepseek_v3"),
    "fp8-mixtral": lambda folder: write_fp8(folder, "mixtral"),
}
FAMILY = {"mxfp4": "gpt_oss", "fp8-qwen3": "qwen3_moe", "fp8-deepseek": "deepseek_v3", "fp8-mixtral": "mixtral"}
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
        assert torch.equal(holder.chosen(torch.tensor([3, 0, 3])), dense[[3, 0, 3]])
        assert holder.numel() == dense.numel() and holder.nbytes < dense.numel() * (0.6 if kind == "mxfp4" else 1.1)
    rest = dict(model.named_parameters())
    assert rest.keys() == expected.keys()
    made(FAMILY[kind]).save_pretrained(tmp_path)
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_parameters())
    for name, dense in expected.items():  # whose dtype transformers 5.23 leaves as it is in the file
        assert rest[name].dtype == plain[name].dtype and torch.equal(rest[name], dense.to(rest[name].dtype)), name


@checkpoints
def test_a_model_computes_as_its_dense_copy(written, kind):
    model, dense = (load_model(written[kind], device="cpu", dequantize=so) for so in (False, True))
    assert holders(model) and not holders(dense) and not model.training
    assert getattr(model.config, "quantization_config", None) is None
    assert fingerprint(model) == fingerprint(dense) == fingerprint(made(FAMILY[kind]))
    batch = tiny_batch(vocab_size=259)
    got, expected = model(**batch).logits, dense(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("family", "block"), [("qwen3_moe", (48, 40)), ("deepseek_v3", (128, 128))])
def test_blocks_that_end_with_the_weight(tmp_path, family, block):
    """Of 72 rows in blocks of 48 the second has 24: DeepSeek-V3's `kv_a_proj_with_mqa` has 576 in blocks of 128."""
    sizes = {"moe_intermediate_size": 72} if family == "qwen3_moe" else {"kv_lora_rank": 144}
    write_fp8(tmp_path, family, block, **sizes)
    file = load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, device="cpu", dtype="float32")
    (layer, *_) = moe_layers(model)
    experts = model.get_submodule(layer.experts)
    path = f"{layer.experts}.5"
    gate, up, down = (
        by_hand(file[f"{path}.{name}.weight"], file[f"{path}.{name}.weight_scale_inv"], block)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    assert torch.equal(experts.gate_up_proj.expert(5), torch.cat([gate, up]))
    assert torch.equal(experts.down_proj.expert(5), down)
    for name in ("q_proj", "kv_a_proj_with_mqa"):
        full = f"model.layers.0.self_attn.{name}.weight"
        if full in file:
            assert torch.equal(model.get_parameter(full), by_hand(file[full], file[f"{full}_scale_inv"], block))


def test_scales_by_bits_and_by_exponents():
    """E8M0: every byte is a power of two, the first one below float32's least normal number."""
    found = scale_values(torch.arange(256, dtype=torch.uint8)).double()
    assert (
        torch.equal(found[:255], torch.ldexp(torch.ones(255).double(), torch.arange(255) - 127)) and found[255].isinf()
    )
    assert torch.equal(scale_values(held_scales(torch.tensor([0.1, -2.5]))), torch.tensor([0.1, -2.5]))
    with pytest.raises(ValueError, match="scales for weights of"):
        whole_blocks(torch.ones(3, 3, dtype=torch.int32), (256, 256), (128, 128))


def test_to_dtype_changes_what_comes_out_and_not_what_is_kept(written):
    model = load_model(written["fp8-qwen3"], device="cpu", dtype="float32")
    holder = next(iter(holders(model).values()))
    exact, stored = holder.dequantize(), {name: tensor.clone() for name, tensor in holder.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert holder.to(dtype).dtype == holder.dequantize().dtype == dtype
        assert torch.equal(holder.dequantize(), exact.to(dtype))
    assert stored.keys() == {"packed", "scales"} and not list(holder.parameters())
    assert all(torch.equal(holder.state_dict()[name], tensor) for name, tensor in stored.items())
    copied = copy.deepcopy(model.float())
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_on_a_cpu_mxfp4_stays_in_its_file(written):
    """The blocks are the file's pages: no process has them twice, and a model larger than its memory loads."""
    holder = next(iter(holders(load_model(written["mxfp4"], device="cpu")).values()))
    at, file = holder.packed.data_ptr(), None
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, stop = line.split(" ")[0].partition("-")
        if int(start, 16) <= at < int(stop, 16):
            file = line.split()[-1]
    assert file == str(written["mxfp4"] / "model.safetensors")


@checkpoints
def test_gradients_are_those_on_the_dense_base(written, kind):
    batch, gradients = tiny_batch(vocab_size=259), []
    for dequantize in (False, True):
        base = load_model(written[kind], device="cpu", dtype="float32", dequantize=dequantize)
        torch.manual_seed(0)
        model = peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, init_lora_weights=False))
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    got, expected = gradients
    largest = max(grad.abs().max().item() for grad in expected.values())
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


@checkpoints
def test_an_adapter_on_a_packed_base(written, kind, tmp_path):
    """A plan of the bf16 copy fits; parameters are counted as dense ones; the base is noted; merging is refused."""
    plan, batch = tiny_plan(made(FAMILY[kind])), tiny_batch(vocab_size=259)
    dense, base = (load_model(written[kind], device="cpu", dequantize=so) for so in (True, False))
    counts = [count_parameters(peft.get_peft_model(it, HotLoraConfig(plan=plan, r=4))) for it in (dense, base)]
    assert counts[0] == counts[1]
    adapted = load_model(written[kind], device="cpu")
    adapted = peft.get_peft_model(adapted, HotLoraConfig(plan=plan, r=4, init_lora_weights=False))
    expected = adapted(**batch).logits
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(HotLoraError, match=r"as the checkpoint has them.*Merge it into the dequantized base"):
            merge()
    adapted.save_pretrained(tmp_path / "adapter")
    noted = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_quantization"]
    assert noted == {"checkpoint": "MXFP4" if kind == "mxfp4" else "FP8"}
    assert hotlora.base_quantization(tmp_path / "adapter") is None  # `load_model` does it by itself
    again = load_adapter(load_model(written[kind], device="cpu"), tmp_path / "adapter")
    assert torch.equal(again(**batch).logits, expected)
    merged = load_adapter(load_model(written[kind], device="cpu", dequantize=True), tmp_path / "adapter")
    merged = merged.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    merged.save_pretrained(tmp_path / "merged")
    reread = load_model(tmp_path / "merged", device="cpu")
    assert not holders(reread) and torch.equal(reread(**batch).logits, merged(**batch).logits)


@pytest.mark.parametrize(
    ("kind", "format"),
    [*((kind, "peft") for kind in WRITERS), *(("mxfp4", format) for format in ("vllm", "sglang", "gguf", "mlx"))],
)
def test_exports_hold_what_they_hold_from_a_dense_base(written, kind, format, tmp_path):
    """Stored experts are no parameters, and an export from them once left out their adapters."""
    if format == "gguf":
        pytest.importorskip("gguf", reason="needs gguf: pip install hotlora[gguf]")
    plan, options = tiny_plan(made(FAMILY[kind])), {"r": 4, "train_router": False, "init_lora_weights": False}
    for dense in (True, False):
        torch.manual_seed(0)
        base = load_model(written[kind], device="cpu", dequantize=dense)
        adapted = peft.get_peft_model(base, HotLoraConfig(plan=plan, **options))
        hotlora.export_adapter(adapted, tmp_path / str(dense), format=format)
    for file in (tmp_path / "True").iterdir():
        if file.suffix in (".safetensors", ".gguf"):
            assert file.read_bytes() == (tmp_path / "False" / file.name).read_bytes()


def test_weights_without_their_scales_are_refused(written, tmp_path):
    """FP8 under names that no conversion knows would be read as numbers without scales."""
    shutil.copytree(written["fp8-qwen3"], tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    experts = "model.layers.0.mlp.experts"
    down = torch.stack([tensors.pop(f"{experts}.{e}.down_proj.weight").view(torch.uint8) for e in range(8)])
    scales = torch.stack([tensors.pop(f"{experts}.{e}.down_proj.weight_scale_inv") for e in range(8)])
    tensors |= {f"{experts}.down_proj": down.view(torch.float8_e4m3fn), f"{experts}.down_proj_scale_inv": scales}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="FP8 under a name that is not read"):
        load_model(tmp_path / "other", device="cpu")


@pytest.mark.parametrize("kind", ["mxfp4", "fp8-qwen3"])
def test_the_estimate_counts_packed_bytes(written, kind):
    found = estimate(written[kind], batch_size=1, max_length=16, device="cpu", dtype="float32")
    model = load_model(written[kind], device="cpu", dtype="float32")
    held = sum(p.nbytes for p in model.parameters()) + sum(holder.nbytes for holder in holders(model).values())
    assert found["memory"]["weights"] == pytest.approx(held, rel=0.05)  # biases count as weights


def test_what_packed_experts_do_not_take(written):
    with pytest.raises(ModelError, match=r"stored in FP8 already.*--quantize"):
        load_model(written["fp8-qwen3"], device="cpu", quantization_config=ExpertsQuantization(4))
    model = load_model(written["mxfp4"], device="cpu")
    with pytest.raises(ModelError, match="quantized to MXFP4 already"):
        quantize_experts(model, 8)
    with pytest.raises(HotLoraError, match="cannot be saved"):
        model.save_pretrained("nowhere")
    for option in ("use_dora", "train_full_experts"):
        with pytest.raises(HotLoraError, match=f"{option} needs weights that are not quantized"):
            peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), **{option: True}))


@pytest.fixture(scope="module")
def trained(written, tmp_path_factory):
    """kind -> the folder of a run by the command line, of an adapter on the packed checkpoint."""
    at = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{i} and {i % 7}", "completion": f" make {i + i % 7}"} for i in range(24)]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("mxfp4", "fp8-deepseek"):
        byte_tokenizer().save_pretrained(written[kind])
        command = ["train", "--model", str(written[kind]), "--data", str(at / "rows.jsonl"), "--test-split", "0.3"]
        command += ["--output", str(at / kind), "--experts-per-layer", "3", "--max-steps", "3", "--batch-size", "4"]
        result = CliRunner().invoke(app, [*command, "--r", "4", "--max-length", "64", "--device", "cpu"])
        assert result.exit_code == 0, result.output
    return at


@pytest.mark.parametrize("kind", ["mxfp4", "fp8-deepseek"])
def test_the_commands_take_a_packed_checkpoint(written, trained, kind, tmp_path):
    """Trained on as it is; the adapter's loss is that on the dense base; merged into the dense base."""
    record = read_record(trained / kind)
    assert record["status"] == "done"
    dense = load_model(written[kind], device="cpu", dequantize=True)
    assert record["parameters"]["total"] > record["model"]["num_parameters"] == dense.num_parameters()
    losses = {}
    for name, options in {"as it is": [], "dense": ["--quantize", "0"], "merged": ["--merge"]}.items():
        command = ["evaluate", "--model", str(written[kind]), "--adapter", str(trained / kind / "adapter"), *options]
        command += ["--data", str(trained / "rows.jsonl"), "--device", "cpu", "--output", str(tmp_path / name)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        losses[name] = read_record(tmp_path / name)["evaluation"]["rows"]["loss"]
    assert losses["dense"] == pytest.approx(losses["as it is"], rel=1e-5)
    assert losses["merged"] == pytest.approx(losses["as it is"], rel=1e-4)
    command = ["merge", str(trained / kind / "adapter"), "--model", str(written[kind]), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "whole"), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert not holders(load_model(tmp_path / "whole", device="cpu"))
    model, _ = hotlora.load(trained / kind, device="cpu")
    assert holders(model)


@pytest.mark.parametrize("option", ["use_dora", "train_full_experts"])
def test_an_adapter_that_needs_dense_experts_is_loaded_on_them(written, tmp_path, option):
    """By itself: it was trained with --quantize 0, and its base is packed."""
    kind = written["mxfp4"]
    byte_tokenizer().save_pretrained(kind)
    model = load_model(kind, device="cpu", dequantize=True)
    peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), **{option: True})).save_pretrained(tmp_path / "it")
    expected = model(**tiny_batch()).logits
    again, _ = hotlora.load(tmp_path / "it", str(kind), device="cpu")
    assert torch.equal(again(**tiny_batch()).logits, expected)
    with pytest.raises(HotLoraError, match="--quantize 0"):
        hotlora.load_adapter(load_model(kind, device="cpu"), tmp_path / "it")
    with pytest.raises(HotLoraError, match=r"needs weights that are not quantized.*--quantize 0"):
        check_run(resolve(model=str(kind), data="rows.jsonl", **{option: True}))
    check_run(resolve(model=str(kind), data="rows.jsonl", quantize=0, **{option: True}))


@pytest.mark.parametrize("kind", ["mxfp4", "fp8-qwen3"])
def test_packed_experts_in_float64(written, kind):
    """transformers' own grouped products have none, and are not in the way of ours."""
    model = load_model(written[kind], device="cpu", dtype="float64")
    dense = load_model(written[kind], device="cpu", dtype="float64", dequantize=True)
    torch.testing.assert_close(model(**tiny_batch()).logits, dense(**tiny_batch()).logits, rtol=1e-5, atol=1e-5)


def test_what_a_run_refuses_before_it_loads(written, trained, tmp_path):
    command = ["train", "--model", str(written["mxfp4"]), "--data", str(trained / "rows.jsonl"), "--quantize", "4"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "run"), "--device", "cpu"])
    assert f"{written['mxfp4']}: its experts are stored in MXFP4 already" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_the_peak_of_loading(written, tmp_path):
    """Some 200 MB each: hardly more than a model takes in the end; of MXFP4 nothing, whose blocks stay in the file."""
    made("qwen3_moe").save_pretrained(tmp_path / "tiny")
    kinds = {"mxfp4": (written["mxfp4"], 0), "fp8": (written["fp8-qwen3"], 0), "bf16": (tmp_path / "tiny", 4)}
    asked = [f"{tiny}:{write_large(tmp_path / kind, kind)}:{bits}" for kind, (tiny, bits) in kinds.items()]
    script = Path(__file__).parent / "loading_memory.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes at once: by itself glibc keeps 3 to 14%
    told = subprocess.run([sys.executable, script, *asked], capture_output=True, text=True, check=True, env=environment)
    for line, size, most in zip(told.stdout.splitlines()[-3:], (220e6, 205e6, 114e6), (0.05, 1.05, 1.05), strict=True):
        found = json.loads(line)
        assert found["model"] == pytest.approx(size, rel=0.05) and found["most"] < most * found["model"], found
