"""Where vLLM is installed: its answers and its reading of our adapters. vLLM's build for CPUs is enough.

On a CPU vLLM has no kernels for adapters on experts, so such a one is merged, or read and not run.
"""

import os
from pathlib import Path

import pytest
import torch
from runs import run_evaluation, run_training

from hotlora import load_adapter, load_model, load_tokenizer
from hotlora.evaluation.generate import Sampling
from hotlora.evaluation.vllm_engine import load_engine, vllm_answers
from hotlora.hf.models import model_source
from hotlora.runs.export import export_saved
from hotlora.tasks import get_task
from hotlora.training.config import TrainConfig

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # before it is imported
pytest.importorskip("vllm", reason="needs vLLM: pip install vllm, or a build of it for CPUs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of nano, with experts, attention and router; at a rank that vLLM has no room of."""
    config = TrainConfig(max_steps=20, batch_size=16, r=12, lora_alpha=24, max_length=128, learning_rate=1e-2)
    folder = tmp_path_factory.mktemp("run")
    run_training("nano", "nano-math", folder / "run", config=config, fraction=0.25, limit=400, evaluate=False)
    return folder / "run" / "adapter"


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_answers_are_those_of_transformers(adapter: Path, with_adapter: bool):
    options = {"adapter": adapter, "merge": True} if with_adapter else {}
    answers = []
    for engine in ("transformers", "vllm"):
        _, found = run_evaluation("nano", "nano-math", limit=16, dtype="float32", engine=engine, **options)
        assert found is not None
        answers.append([result["prediction"] for result in found.results])
    assert answers[0] == answers[1]


def test_a_sample_depends_on_its_prompt_and_number_alone():
    task, sampling = get_task("nano-math"), Sampling(samples=3, temperature=0.8, top_p=0.95, seed=3)
    examples = task.load("test", None, 5, 0)
    engine, request = load_engine(model_source("nano"), dtype="float32")
    assert request is None

    def drawn(some, done=()):
        batches = vllm_answers(
            engine,
            request,
            load_tokenizer("nano"),
            some,
            max_new_tokens=20,
            stop=task.stop,
            sampling=sampling,
            done=done,
        )
        return {(some[a.index].prompt, a.sample): a.text for batch in batches for a in batch}

    whole = drawn(examples)
    assert len(whole) == 15 and len(set(whole.values())) > 10
    assert drawn(examples[2:4]).items() <= whole.items()
    rest = drawn(examples, done={0, 1, 2})
    assert len(rest) == 6 and rest.items() <= whole.items()


def test_vllm_holds_every_update_of_an_exported_adapter(adapter: Path, tmp_path: Path, monkeypatch):
    """In the buffers that its kernels read, of each expert and projection, and of attention."""
    runner = pytest.importorskip("vllm.v1.worker.cpu_model_runner", reason="needs vLLM's build for CPUs")
    monkeypatch.setattr(runner.CPUModelRunner, "warming_up_model", lambda self: None)  # it would run the kernels
    export_saved("nano", adapter, tmp_path / "out", format="vllm", merge_router=True, device="cpu")
    engine, request = load_engine(str(tmp_path / "out/base"), tmp_path / "out/adapter", dtype="float32")
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert worker.add_lora(request)
    manager = worker.model_runner.lora_manager._adapter_manager
    slot = manager.lora_index_to_id.index(request.lora_int_id)

    plain = load_model("nano", device="cpu").state_dict()
    merged = load_adapter(load_model("nano", device="cpu"), adapter).merge_and_unload().state_dict()
    checked = set()

    def check(name: str, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        got = torch.cat([B.squeeze(0).float() @ A.squeeze(0).float() for A, B in pairs], -2)
        wanted = merged[name] - plain[name]
        assert wanted.any() and (got - wanted).norm() < 1e-5 * wanted.norm(), name
        checked.add(name)

    for name, module in manager.modules.items():
        if name.endswith("experts"):
            gate, up = zip(module.w13_lora_a_stacked, module.w13_lora_b_stacked, strict=True)
            check(f"{name}.gate_up_proj", *((A[slot], B[slot]) for A, B in (gate, up)))
            check(f"{name}.down_proj", (module.w2_lora_a_stacked[0][slot], module.w2_lora_b_stacked[0][slot]))
        elif "self_attn" in name:
            parts = [name.replace("qkv", part) for part in "qkv"] if name.endswith("qkv_proj") else [name]
            for part, A, B in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
                check(f"{part}.weight", (A[slot], B[slot]))
    routers = {name for name in plain if name.endswith("mlp.gate.weight")}
    assert checked == {name for name in plain if not torch.equal(plain[name], merged[name])} - routers
