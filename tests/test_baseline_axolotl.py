"""The contender `axolotl`: Axolotl's kernels compute what PEFT does. On a GPU where there is one, else on the CPU by
Triton's interpreter. In processes of their own, since Axolotl patches PEFT."""

import importlib.util
import sys

import pytest
import torch
from apart import apart
from peft.tuners.lora import ParamWrapper
from tiny import tiny_batch, tiny_config, tiny_model
from zoo import zoo_model

from hotlora.base.errors import ModelError
from hotlora.bench.bench import BenchConfig, run_bench
from hotlora.bench.contenders import Contender, adapted
from hotlora.bench.worker import Worker

R = 4
FAMILIES = ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_INSTALLED = all(importlib.util.find_spec(name) for name in ("axolotl", "triton"))
needs_axolotl = pytest.mark.skipif(not _INSTALLED, reason="pip install axolotl triton compares with it")


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl", None)  # as if it were not there
    assert Contender("axolotl").missing == "not installed"


@needs_axolotl
def test_missing_without_triton_or_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Contender("axolotl").missing == "installed, but its kernels need a GPU"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert Contender("axolotl").missing == "installed, but Triton is not"
    assert "axolotl" not in sys.modules


@needs_axolotl
def test_it_computes_what_peft_does():
    """Logits, and the gradient of every adapter, with the fused kernel and with the three products that it takes for
    few large experts."""
    found, allowed = apart(fused_and_split, FAMILIES), 1e-5 if DEVICE == "cpu" else 1e-2  # TF32
    for family in FAMILIES:
        logits, gradients = update("peft", family)
        assert len(gradients) == 2 * (2 * 4 + 2 * 2) and all(g.any() for g in gradients.values())
        for theirs, their_gradients in found[family]:
            assert off(theirs, logits) < allowed
            for name, gradient in gradients.items():
                assert off(their_gradients[name], gradient) < allowed, name


@needs_axolotl
@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("aria_text", "scattermoe supports concatenated, non-transposed"),
        ("hy_v4", "no attribute 'act_fn'"),  # has a gate of its own
        ("muse_spark", "its output is .*% off transformers'"),  # has a norm after each expert
    ],
)
def test_families_that_axolotl_does_not_compute(family, why):
    with pytest.raises(ModelError, match=f"does not compute LoRA on the experts of {family} here.*{why}"):
        apart(adapt, family)


@needs_axolotl
def test_it_tells_when_peft_computes_instead():
    with pytest.raises(ModelError, match="its kernels ran for 0 of 4 adapted weights"):
        apart(adapt_without_the_patch)


@needs_axolotl
def test_a_worker_counts_and_times(tmp_path):
    """In half precision under autocast."""
    tiny_config("olmoe").save_pretrained(tmp_path)
    peft, axolotl = measured(tmp_path, "peft"), apart(measured, tmp_path, "axolotl")
    assert axolotl["trainable"] == peft["trainable"]
    assert axolotl["saved_bytes_per_token_layer"] < peft["saved_bytes_per_token_layer"]  # no W + BA
    assert axolotl["loss"] == pytest.approx(peft["loss"], rel=5e-3)


@needs_axolotl
@pytest.mark.gpu
def test_it_takes_part(tmp_path):
    """Its large weights given back between turns."""
    tiny_config("olmoe", num_experts=16, intermediate_size=512, hidden_size=128).save_pretrained(tmp_path)
    config = BenchConfig(
        str(tmp_path), tokens=64, r=8, dtype="bfloat16", contenders=("floor", "peft", "axolotl"), rounds=2
    )
    rows = {row["name"]: row for row in run_bench(config)["contenders"]}
    assert rows["axolotl"]["status"] == "done", rows["axolotl"]


def lora_ops():
    """Axolotl's module of kernels. Without a GPU: as the interpreter can run it, which times no block sizes, and for
    which a loop's variable is an int."""
    from axolotl.integrations.kernels.libs.scattermoe_lora.kernels import grouped_gram, lora_ops, ops
    from triton.runtime.autotuner import Autotuner

    class Int(int):
        def to(self, dtype):
            return self

    for module in (grouped_gram, lora_ops, ops) if DEVICE == "cpu" else ():
        module.range = lambda *bounds: map(Int, range(*map(int, bounds)))
        for kernel in list(vars(module).values()):
            while hasattr(kernel, "fn"):
                if isinstance(kernel, Autotuner):
                    kernel.configs = kernel.configs[:1]
                kernel = kernel.fn
    return lora_ops


def fused_and_split(families):
    """family -> the two updates."""
    ops, by_peft = lora_ops(), ParamWrapper.get_delta_weight
    ParamWrapper.get_delta_weight = None  # PEFT's way would fail
    found = {family: [plain(update("axolotl", family))] for family in families}
    ops._SPLIT_LORA_FWD_THRESHOLD = 0
    for family in families:
        found[family].append(plain(update("axolotl", family)))
    ParamWrapper.get_delta_weight = by_peft
    return found


def plain(value):
    """Tensors as arrays, to be sent: a process that has ended can share none."""
    logits, gradients = value
    return logits.numpy(), {name: g.numpy() for name, g in gradients.items()}


def update(kind, family):
    """Logits and gradients, of adapters with the same values for every kind."""
    model = adapted(tiny_model(family).to(DEVICE), Contender(kind), None, R)
    batch = {name: tensor.to(DEVICE) for name, tensor in tiny_batch().items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
    return output.logits.detach().cpu(), gradients


def off(found, expected):
    return ((torch.from_numpy(found) - expected).norm() / expected.norm()).item()


def adapt(family):
    lora_ops()
    adapted(zoo_model(family).to(DEVICE), Contender("axolotl"), None, R)


def adapt_without_the_patch():
    lora_ops()
    ParamWrapper.forward._scattermoe_fastpath = True  # Axolotl's mark that its own is there already
    adapted(tiny_model().to(DEVICE), Contender("axolotl"), None, R)


def measured(folder, kind):
    """The interpreter multiplies bfloat16 by its bits, so on the CPU it is float16."""
    if kind == "axolotl":
        lora_ops()
    dtype = "bfloat16" if DEVICE == "cuda" else "float16"
    config = BenchConfig(str(folder), tokens=32, length=16, r=8, dtype=dtype, device=DEVICE, contenders=("peft",))
    worker = Worker(config, Contender(kind))
    found = worker.prepare([1.0, 1.0], None)
    times = worker.turn()
    assert times["forward"] > 0 and times["backward"] > 0
    return found | {"loss": worker.loss().item()}
