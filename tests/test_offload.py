"""Experts outside the device's memory: bit for bit the same numbers, and the memory that they do not take."""

import copy
import json
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from apart import apart
from loading_memory import own_bytes, watched
from runs import run_evaluation, run_training
from safetensors.torch import load_file
from tiny import fill, tiny_batch, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer
from torch import nn
from zoo import families, zoo_model

import hotlora
from hotlora.adapter import offload as module
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.offload import DenseExperts, Fetcher, MappedFolder, OffloadedExperts, keep_on_device, pinned
from hotlora.adapter.offload_embedding import HostEmbedding, offload_embedding
from hotlora.adapter.packed import PackedExperts
from hotlora.adapter.quantize import ExpertsQuantization, quantize_experts
from hotlora.adapter.quantized import QuantizedExperts
from hotlora.adapter.stored import quantized_parameters
from hotlora.base.errors import FileError, HotLoraError
from hotlora.hf.models import load_model
from hotlora.hf.moe_layers import moe_layers
from hotlora.layer import cpu, gpu
from hotlora.layer.function import use_routed_layer
from hotlora.tasks import Example
from hotlora.tasks.tokens import tokenize
from hotlora.training.config import TrainConfig
from hotlora.training.identity import check_same, same_run
from hotlora.training.sft_trainer import make_trainer

LAYOUTS = sorted({"olmoe", "aria_text", "gpt_oss", "nemotron_h", "muse_spark"} & families().keys())


def mapped_files() -> list[str]:
    """The files of experts that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "hotlora-experts-" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32])
def test_a_mapped_tensor_is_equal_and_leaves_no_file(tmp_path, dtype):
    tensor = (torch.randn(3, 5, 7) * 50).to(dtype)
    there = MappedFolder(tmp_path / "new").mapped(tensor)
    assert torch.equal(there, tensor) and there.dtype == dtype and there.data_ptr() != tensor.data_ptr()
    turned = MappedFolder(tmp_path / "new").mapped(tensor.permute(2, 0, 1))
    assert torch.equal(turned, tensor.permute(2, 0, 1)) and turned.stride() == tensor.permute(2, 0, 1).stride()
    assert not (tmp_path / "new").exists()  # it was made for this
    there[0] = 1  # as a merge does
    assert torch.equal(there[1:], tensor[1:]) and (there[0] == 1).all()


def test_what_no_expert_is_in_needs_no_file(tmp_path):
    assert MappedFolder(tmp_path).mapped(torch.zeros(0, 4, 4)).shape == (0, 4, 4)


def trained(model, num_steps: int = 2, **options) -> list[torch.Tensor]:
    """The factors after a few steps, and the logits then."""
    torch.manual_seed(1)
    plan = tiny_plan(model, {layer.layer: [0, 1] for layer in moe_layers(model)})
    adapted = peft.get_peft_model(model, HotLoraConfig(plan=plan, r=2, lora_dropout=0.1, **options)).train()
    factors = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=0.5)
    batch = {name: tensor.to(factors[0].device) for name, tensor in tiny_batch(vocab_size=100).items()}
    for _ in range(num_steps):
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*(p.detach().clone() for p in factors), adapted.eval()(**batch).logits.detach()]


def on_host(model, place=pinned) -> Fetcher:
    """Its experts' weights as they are kept for a GPU; what they are fetched to is the CPU."""
    fetcher = Fetcher(torch.device("cpu"))
    for layer in moe_layers(model):
        experts = model.get_submodule(layer.experts)
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if (weight := getattr(experts, name, None)) is not None:
                delattr(experts, name)
                holder = weight if isinstance(weight, QuantizedExperts) else DenseExperts(weight)
                setattr(experts, name, OffloadedExperts(holder, fetcher, place))
    use_routed_layer(model)
    return fetcher


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", LAYOUTS)
def test_trains_bit_for_bit_as_in_memory(tmp_path, family, bits):
    if bits:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install hotlora[quantize]")
    zoo_model(family).save_pretrained(tmp_path / "model")
    stored = ExpertsQuantization(bits, offload=True, offload_folder=tmp_path / "there")
    offloaded = load_model(tmp_path / "model", device="cpu", quantization_config=stored)
    assert mapped_files() and not (tmp_path / "there").exists()
    if bits:
        plain = load_model(tmp_path / "model", device="cpu", quantization_config=ExpertsQuantization(bits))
    else:
        plain = load_model(tmp_path / "model", device="cpu")
        use_routed_layer(plain)
        for layer in moe_layers(plain):  # may be views of the checkpoint, which lies at any address
            for weight in plain.get_submodule(layer.experts).parameters():
                weight.data = weight.data.clone() if weight.ndim == 3 else weight.data
    for ours, theirs in zip(trained(offloaded), trained(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("products", [cpu, gpu])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", LAYOUTS)
def test_fetched_from_the_host_bit_for_bit(monkeypatch, family, bits, products):
    """As for a GPU, whose products take all experts at once; cold: with two of them on the device throughout."""
    monkeypatch.setattr("hotlora.layer.function.cpu", products)
    plain = zoo_model(family)
    if bits:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install hotlora[quantize]")
        quantize_experts(plain, bits)
    model, cold = copy.deepcopy(plain), copy.deepcopy(plain)
    use_routed_layer(plain)
    on_host(model)
    on_host(cold)
    keep_on_device(cold, {layer.layer: [0, 1] for layer in moe_layers(cold)})
    expected = trained(plain)
    for other in (model, cold):
        for ours, theirs in zip(trained(other), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_comes_next_is_on_its_way_after_one_step(recompute):
    model = tiny_model(num_hidden_layers=4)
    fetcher = on_host(model)
    adapted = peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), r=2)).train()
    if recompute:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    batch = tiny_batch()

    def step() -> int:
        before = fetcher.num_waits
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        return fetcher.num_waits - before

    assert step() >= 8  # four layers, two projections
    step()  # from the end of a step to the start of the next
    assert [step(), step()] == [0, 0]


def test_experts_on_the_host_stay_there_when_the_model_moves():
    model = tiny_model()
    on_host(model)
    holders = [module for module in model.modules() if isinstance(module, OffloadedExperts)]
    addresses = [tensor.data_ptr() for holder in holders for tensor in holder.on_host]
    total = sum(p.numel() for p in tiny_model().parameters())
    assert hotlora.count_parameters(peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model))))["total"] > total
    model.to(torch.bfloat16)
    model.to("cpu")
    assert [tensor.data_ptr() for holder in holders for tensor in holder.on_host] == addresses
    assert "on the host" in repr(model)


def test_the_embedding_is_read_from_the_host(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    expected = trained(copy.deepcopy(model))
    table = model.get_input_embeddings().weight
    offload_embedding(model, pinned)  # on a CPU a tensor as any other
    assert type(model.get_input_embeddings()) is nn.Embedding
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings(), pinned))
    for ours, theirs in zip(trained(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    there = model.get_input_embeddings()
    assert there.nbytes == table.nbytes and "on the host" in repr(model)
    assert quantized_parameters(model) == table.numel()
    model.to("meta")
    assert there.weight.device.type == "meta" and there._table[0].device.type == "cpu"
    assert there(batch["input_ids"]).shape == (*batch["input_ids"].shape, table.shape[1])


def test_the_dtype_of_training_is_the_embeddings(tmp_path):
    """Offloaded it is no parameter, and what comes first may be quantized."""
    model = tiny_model(tie_word_embeddings=False).to(torch.bfloat16)
    adapted = peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), r=4, lora_alpha=8))
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings(), pinned))
    first = next(name for name, _ in model.named_parameters())
    module, _, name = first.rpartition(".")
    setattr(model.get_submodule(module), name, nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False))
    rows = tokenize([Example("a", "b")] * 2, byte_tokenizer(), 8)
    trainer = make_trainer(adapted, byte_tokenizer(), rows, TrainConfig(max_steps=1), tmp_path)
    assert trainer.args.bf16


def test_pinned_memory_is_as_large_as_it_is_asked_for(monkeypatch):
    """What a user has set of torch's allocator stays."""
    asked = []
    monkeypatch.setattr("torch._C._accelerator_setAllocatorSettings", asked.append)
    for own, wanted in (
        (None, "pinned_max_round_threshold_mb:1"),
        ("expandable_segments:True", "expandable_segments:True,pinned_max_round_threshold_mb:1"),
        ("pinned_max_round_threshold_mb:64", None),
    ):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        if own is None:
            monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        else:
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", own)
        asked.clear()
        module._pin_exact_sizes.cache_clear()
        module._pin_exact_sizes()
        assert asked == ([] if wanted is None else [wanted])
    module._pin_exact_sizes.cache_clear()


def test_an_embedding_that_is_the_heads_weight_stays(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.data_ptr()
    offload_embedding(model, pinned)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight.data_ptr() == before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
@pytest.mark.parametrize(
    ("seed", "dtype", "is_in_it"), [(0, torch.float32, True), (1, torch.float32, False), (0, torch.float64, False)]
)
def test_the_embedding_stays_in_the_checkpoints_file(tmp_path, seed, dtype, is_in_it):
    tiny_model().save_pretrained(tmp_path)
    files = [str(tmp_path / "model.safetensors")]
    model = tiny_model(seed=seed).to(dtype)
    table = model.get_input_embeddings().weight.clone()
    offload_embedding(model, MappedFolder(tmp_path / "folder").mapped, files)
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert (files[0] in Path("/proc/self/maps").read_text()) == is_in_it
    assert any(str(tmp_path / "folder") in line for line in mapped_files()) == (not is_in_it)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 4])
def test_on_a_gpu_as_resident(tmp_path, bits):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    found = []
    for offload in (False, True):
        config = ExpertsQuantization(bits, offload=offload) if bits or offload else None
        model = hotlora.load_model(tmp_path, device="cuda", dtype="bfloat16", quantization_config=config)
        assert isinstance(model.get_input_embeddings(), HostEmbedding) == offload
        found.append(trained(model))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_merging_into_experts_on_the_host_is_refused():
    model = tiny_model()
    on_host(model)
    adapted = peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model)))
    with pytest.raises(HotLoraError, match="offloaded from a GPU: load the base model without offload"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_merging_into_mapped_experts(tmp_path, family):
    """What is saved then, too: loading has taken experts one by one, and saving gives them back so."""
    zoo_model(family).save_pretrained(tmp_path / "model")
    stored = ExpertsQuantization(None, offload=True, offload_folder=tmp_path)
    merged = []
    for config in (stored, None):
        model = load_model(tmp_path / "model", device="cpu", quantization_config=config)
        adapted = peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), r=2))
        fill(adapted, seed=3)
        model = adapted.merge_and_unload()
        model.save_pretrained(tmp_path / str(len(merged)))
        merged.append(model.state_dict())
    saved = [load_file(tmp_path / name / "model.safetensors") for name in "01"]
    for ours, theirs in (merged, saved):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_is_the_same_run(tmp_path, monkeypatch):
    """A run that began in memory goes on offloaded, and ends with the same weights; the file lies where it is said."""
    monkeypatch.chdir(tmp_path)
    options = {"max_steps": 4, "batch_size": 2, "limit": 16, "test_limit": 4, "evaluate": False, "save_steps": 2}
    whole = run_training("nano", "nano-math", tmp_path / "whole", **options)
    other = run_training(
        "nano", "nano-math", tmp_path / "other", offload="cold", offload_folder=tmp_path / "o", **options
    )
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "other")]
    assert weights[0] == weights[1]
    assert whole["config"] == other["config"] | {"offload": "none"}
    assert not (tmp_path / "o").exists()
    scored = {"adapter": tmp_path / "whole" / "adapter", "limit": 4}
    here, there = (run_evaluation("nano", "nano-math", **scored, **how)[0] for how in ({}, {"offload": "all"}))
    assert [r["evaluation"]["nano-math"] | {"seconds": 0} for r in (here, there)] == 2 * [
        here["evaluation"]["nano-math"] | {"seconds": 0}
    ]


def _peak_of_a_run(folder: str, offload: str) -> int:
    """Bytes that a training takes at its peak beyond those before it."""
    torch.set_num_threads(1)
    before, is_over = own_bytes(), threading.Event()
    most = [before]
    watching = threading.Thread(target=watched, args=(is_over, most))
    watching.start()
    where = {} if offload == "none" else {"offload_folder": folder}
    options = {"max_steps": 2, "batch_size": 1, "max_length": 32, "r": 2, "limit": 8}
    run_training(f"{folder}/model", f"{folder}/rows.jsonl", f"{folder}/{offload}", offload=offload, **where, **options)
    is_over.set()
    watching.join()
    return most[0] - before


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told as Linux does it")
def test_trains_in_less_memory_than_its_experts_have(tmp_path):
    """Bit for bit as where they are in memory."""
    experts = save_wide_model(tmp_path / "model")
    rows = [{"prompt": f"{n} and {n} are", "completion": str(2 * n)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without, offloaded = (apart(_peak_of_a_run, str(tmp_path), offload) for offload in ("none", "all"))
    assert without > experts > 2 * offloaded
    ours, plain = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("all", "none"))
    assert ours == plain


def save_wide_model(folder: Path) -> int:
    """Bytes of its experts."""
    sizes = {"num_experts": 64, "intermediate_size": 384, "hidden_size": 384, "num_hidden_layers": 4}
    model = tiny_model(**sizes, vocab_size=byte_tokenizer().vocab_size)
    model.save_pretrained(folder, max_shard_size="20MB")
    byte_tokenizer().save_pretrained(folder)
    return sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)


def _load_within_file_size(folder: str) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16,) * 2)
    stored = ExpertsQuantization(None, offload=True, offload_folder=folder)
    try:
        load_model("nano", device="cpu", quantization_config=stored)
    except HotLoraError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_a_disk_that_does_not_take_it_is_named(tmp_path):
    said = apart(_load_within_file_size, str(tmp_path))
    assert (
        said.startswith(f"FileError: offload_folder {tmp_path} is full (File too large)") and "--offload-folder" in said
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none(tmp_path):
    """A disk that is not mounted is told: the experts would fill another one."""
    (tmp_path / "file").write_text("")
    for path in ("file/there", "not/mounted", "file"):
        with pytest.raises(FileError, match=rf"offload_folder .*{path} "):
            MappedFolder(tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_was_there_stays_and_what_is_in_it(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "other").write_text("")
    MappedFolder(tmp_path / "there").mapped(torch.zeros(2, 3))
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["other"]


def test_what_is_refused_makes_no_folder(tmp_path):
    with pytest.raises(HotLoraError, match="rule"):
        run_training("nano", "nano-math", tmp_path / "run", offload="all", offload_folder=tmp_path / "o", rule="no")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_folder(tmp_path):
    """Each makes it where it is not there, and removes it where it was not there."""

    def map_often(folder: MappedFolder) -> bool:
        tensor = torch.rand(64)
        return all(torch.equal(folder.mapped(tensor), tensor) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(map_often, [MappedFolder(tmp_path / "there") for _ in range(4)]))
    assert not (tmp_path / "there").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file is mapped by its name")
def test_a_kill_while_a_file_is_written_leaves_nothing(tmp_path, monkeypatch):
    """It has lost its name before the first byte."""
    seen = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: seen.append(list(tmp_path.iterdir())) or from_file(*a, **k))
    assert torch.equal(MappedFolder(tmp_path).mapped(torch.ones(5)), torch.ones(5))
    assert seen == [[]]


def test_it_says_how_large_the_file_is_and_how_fast_the_disk(tmp_path, caplog):
    hotlora.load_model(
        "nano", device="cpu", quantization_config=ExpertsQuantization(None, offload=True, offload_folder=tmp_path)
    )
    assert f"19 MB of weights are read from a file in {tmp_path}" in caplog.text and "/s" in caplog.text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"offload": "hot"}, "offload = 'hot' does not exist: choose one of none, cold, all"),
        ({"offload_folder": "there"}, "offload_folder goes with offloading"),
        (
            {"on_top_of": ["there"], "quantize": 4},
            "cannot be merged into quantized weights: merge it first",
        ),
        ({"offload": "all", "full": True}, "full fine-tuning trains all weights: leave offload out"),
    ],
)
def test_options_that_do_not_go(tmp_path, options, said):
    with pytest.raises(HotLoraError, match=said):
        run_training("nano", "nano-math", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_experts_on_the_host(bits, is_transposed):
    """As MXFP4 and FP8 have them, with two experts on the device: all that a product asks for is equal."""
    draw = torch.Generator().manual_seed(bits)
    packed = torch.randint(0, 120, (6, 8, 64 * bits // 8), dtype=torch.uint8, generator=draw)
    scales = torch.randint(120, 130, (6, 8, 2), dtype=torch.uint8, generator=draw)

    def holder() -> PackedExperts:
        return PackedExperts(packed.clone(), scales.clone(), bits, torch.float32, is_transposed)

    plain, fetcher = holder(), Fetcher(torch.device("cpu"))
    there, other = (OffloadedExperts(holder(), fetcher, pinned) for _ in range(2))
    there.keep_on_device([1, 4])
    fetcher.fit([there])
    assert fetcher.num_bytes < sum(-(-tensor.nbytes // 256) * 256 for tensor in other.on_host)  # fewer: smaller slots
    fetcher.fit([there, other])
    assert (there.shape, there.dtype, there.is_transposed) == (plain.shape, plain.dtype, is_transposed)
    assert len(there.on_host[0]) == 4 and len(other.on_host[0]) == 6
    for _ in range(2):
        assert torch.equal(there.dequantize(), plain.dequantize()) and torch.equal(there.some(2, 5), plain.some(2, 5))
        assert torch.equal(other.expert(4), plain.expert(4))
        ids = torch.tensor([5, 1, 4])
        assert torch.equal(there.chosen(ids), plain.chosen(ids))
    ours, theirs = there.coded(), plain.coded()
    assert torch.equal(ours.packed, theirs.packed) and torch.equal(ours.scales, theirs.scales)


def test_a_run_goes_on_with_another_offload_and_from_before_there_was_one(tmp_path):
    before = {"r": 8, "batch_size": 4, "gradient_accumulation_steps": 1}
    for now in ({"offload": "none"}, {"offload": "all"}, {"offload": "none", "fit": "24GB"}):
        check_same(same_run(before), same_run(before | now), tmp_path)
        check_same(same_run(before | {"offload": "cold"}), same_run(before | now), tmp_path)
    with pytest.raises(HotLoraError, match="--r 16 against 8"):
        check_same(same_run(before), same_run(before | {"r": 16}), tmp_path)
