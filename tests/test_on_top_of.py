"""Adapters that were trained on a base with another adapter merged in: that one is recorded, and is there again
wherever they are used, or the use is refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from test_run import CONFIG, EXAMPLES, TOKENIZER
from tiny import fill, tiny_model, tiny_plan

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.load import load_adapter, saved_config
from hotlora.base.errors import FileError, HotLoraError, PlanError
from hotlora.base.files import read_json, sha256_file, write_json
from hotlora.hf.models import load_model
from hotlora.runs.evaluation import run_evaluation
from hotlora.runs.export import combine_saved, export_saved
from hotlora.runs.folder import load_base
from hotlora.runs.training import run_training
from hotlora.tasks.data import batches, tokenize

WEIGHTS = "adapter_model.safetensors"


def logits(model):
    batch = next(iter(batches(tokenize(EXAMPLES[:4], TOKENIZER, 64), TOKENIZER, 4)))
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def adapter_on(base, folder: Path, seed: int):
    """A saved adapter that changes what the model says, and the adapted model's logits."""
    model = peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=2, lora_alpha=4)).eval()
    fill(model, seed)
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """(model folder, adapter A, adapter B on top of A, the logits of both together)"""
    folder = tmp_path_factory.mktemp("on-top-of")
    model, first, second = (str(folder / name) for name in ("model", "first", "second"))
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=512).save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    adapter_on(load_model(model), Path(first), 0)
    return model, first, second, adapter_on(load_base(model, [first]), Path(second), 1)


def test_it_is_recorded_and_a_base_without_it_is_refused(saved):
    model, first, second, expected = saved
    assert saved_config(first).on_top_of == []
    digest = sha256_file(Path(first) / WEIGHTS)
    assert saved_config(second).on_top_of == [{"path": first, "weights_sha256": digest}]
    base = load_model(model)
    before = logits(base)
    with pytest.raises(PlanError, match=r"on top of .*first.*merge_and_unload"):
        load_adapter(base, second)
    assert torch.equal(logits(base), before)
    with pytest.raises(PlanError, match="on top of"):
        peft.PeftModel.from_pretrained(load_model(model), second)
    base = load_adapter(load_model(model), first).merge_and_unload()
    assert torch.equal(logits(load_adapter(base, second)), expected)
    # One more, merged beside it: what the adapter needs is there.
    load_adapter(load_base(model, [first, first]), second)


def test_the_commands_load_it_by_themselves(saved, tmp_path):
    model, first, second, expected = saved
    assert torch.equal(logits(load_adapter(load_base(model, adapter=second), second)), expected)
    merged = export_saved(model, second, tmp_path / "merged", format="merged")
    torch.testing.assert_close(logits(load_model(str(merged))), expected, rtol=1e-3, atol=1e-3)
    asked, _ = run_evaluation(model, "nano-choice", adapter=second, on_top_of=[first], limit=2)
    record, _ = run_evaluation(model, "nano-choice", adapter=second, limit=2)
    assert record["config"]["on_top_of"] == asked["config"]["on_top_of"] == [sha256_file(Path(first) / WEIGHTS)]
    # Merged under a third one, which then names all three.
    third = load_base(model, [second])
    expected = adapter_on(third, tmp_path / "third", 2)
    assert [entry["path"] for entry in saved_config(tmp_path / "third").on_top_of] == [first, second]
    assert torch.equal(logits(load_adapter(load_base(model, adapter=tmp_path / "third"), tmp_path / "third")), expected)


def test_a_training_records_it(saved, tmp_path):
    model, first, second, _ = saved
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in EXAMPLES))
    record = run_training(model, str(rows), tmp_path / "run", config=CONFIG, on_top_of=[second])
    assert [entry["path"] for entry in saved_config(tmp_path / "run" / "adapter").on_top_of] == [first, second]
    assert record["config"]["on_top_of"] == [sha256_file(Path(folder) / WEIGHTS) for folder in (first, second)]


def test_a_checkpoint_with_it_merged_in_says_so(saved, tmp_path):
    model, first, second, expected = saved
    merged = str(export_saved(model, first, tmp_path / "merged", format="merged"))
    loaded = load_adapter(load_base(merged, adapter=second), second)  # nothing is merged a second time
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
    # There an adapter alone is all that a server needs; on the base without it, it would be wrong.
    export_saved(merged, second, tmp_path / "served", format="sglang", drop_router=True)
    with pytest.raises(HotLoraError, match=r"holds the adapter alone.*first"):
        export_saved(model, second, tmp_path / "wrong", format="sglang", drop_router=True)
    with pytest.raises(HotLoraError, match=r"holds the adapter alone.*first"):
        export_saved(model, second, tmp_path / "wrong", format="peft")
    export_saved(model, second, tmp_path / "both", format="vllm", merge_router=True)
    assert load_model(str(tmp_path / "both" / "base")).config.hotlora_merged == saved_config(second).on_top_of


def test_one_that_is_gone_or_changed_is_named(saved, tmp_path, monkeypatch):
    model, _, _, expected = saved
    shutil.copytree(saved[1], tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    adapter_on(load_base(model, ["first"]), tmp_path / "second", 1)
    shutil.move("first", "elsewhere")
    with pytest.raises(FileError, match=r"on top of first.*--on-top-of"):
        export_saved(model, "second", "merged", format="merged")
    export_saved(model, "second", "merged", format="merged", on_top_of=["elsewhere"])
    torch.testing.assert_close(logits(load_model("merged")), expected, rtol=1e-3, atol=1e-3)
    adapter_on(load_model(model), tmp_path / "first", 5)
    with pytest.raises(FileError, match="other weights"):
        run_evaluation(model, "nano-choice", adapter="second", limit=2)


def test_adapters_on_different_ground_are_not_combined(saved, tmp_path):
    model, first, second, _ = saved
    with pytest.raises(HotLoraError, match="on top of different adapters"):
        combine_saved(model, [first, second], tmp_path / "wrong")
    adapter_on(load_base(model, [first]), tmp_path / "other", 3)
    combined = combine_saved(model, [second, tmp_path / "other"], tmp_path / "combined")
    assert saved_config(combined).on_top_of == saved_config(second).on_top_of
    base = load_base(model, [first])
    both = load_adapter(load_adapter(base, second, "a"), tmp_path / "other", "b")
    both.base_model.set_adapter(["a", "b"])
    found = logits(load_adapter(load_base(model, adapter=combined), combined))
    torch.testing.assert_close(found, logits(both), rtol=1e-3, atol=1e-3)


def test_one_merged_in_memory_is_an_adapter_without_a_file(saved, tmp_path):
    model, first, _, _ = saved
    base = load_model(model)
    trained = peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=2, lora_alpha=4)).eval()
    fill(trained, 0)  # as the saved one
    expected = adapter_on(trained.merge_and_unload(), tmp_path / "second", 1)
    assert saved_config(tmp_path / "second").on_top_of == [{"path": None, "weights_sha256": None}]
    with pytest.raises(PlanError, match="merged in memory"):
        load_adapter(load_model(model), tmp_path / "second")
    with pytest.raises(FileError, match="merged in memory"):
        export_saved(model, tmp_path / "second", tmp_path / "merged", format="merged")
    export_saved(model, tmp_path / "second", tmp_path / "merged", format="merged", on_top_of=[first])
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"))), expected, rtol=1e-3, atol=1e-3)


def test_plain_and_older_adapters_load_as_before(saved, tmp_path):
    model, first, _, _ = saved
    shutil.copytree(first, tmp_path / "old")
    data = read_json(tmp_path / "old" / "adapter_config.json")
    del data["on_top_of"]
    write_json(tmp_path / "old" / "adapter_config.json", data)
    assert torch.equal(
        logits(load_adapter(load_model(model), tmp_path / "old")), logits(load_adapter(load_model(model), first))
    )
    write_json(tmp_path / "old" / "adapter_config.json", {**data, "on_top_of": [{"path": 3}]})
    with pytest.raises(FileError, match="on_top_of"):
        load_adapter(load_model(model), tmp_path / "old")
