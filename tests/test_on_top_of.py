"""Adapters that were trained on a base with another adapter merged in: that one is recorded, and is there again
wherever they are used, or the use is refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from runs import run_evaluation, run_training
from safetensors.torch import load_file
from test_run import CONFIG, EXAMPLES, TOKENIZER
from tiny import fill, tiny_model, tiny_plan

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.load import load_adapter, saved_config, saved_options_hash
from hotlora.adapter.mask import draw_mask
from hotlora.base.errors import FileError, HotLoraError, PlanError
from hotlora.base.files import read_json, sha256_file, write_json
from hotlora.hf.models import load_model
from hotlora.runs.export import combine_saved, export_saved, shared_experts
from hotlora.runs.folder import load_base, underneath
from hotlora.tasks.tokens import batches, tokenize

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
    assert saved_config(second).on_top_of == [
        {"path": first, "weights_sha256": digest, "options_sha256": saved_options_hash(first)}
    ]
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


def test_it_is_found_from_another_folder(saved, tmp_path, monkeypatch):
    """Also where an older adapter notes it by a path from where it was trained, and other runs have such a name."""
    model, first, second, expected = saved
    home = tmp_path / "home"
    shutil.copytree(first, home / "runs" / "one" / "adapter")
    monkeypatch.chdir(home)
    adapter_on(load_base(model, ["runs/one/adapter"]), Path("runs/two/adapter"), 1)
    noted = read_json("runs/two/adapter/adapter_config.json")
    assert noted["on_top_of"][0]["path"] == str(home / "runs" / "one" / "adapter")
    noted["on_top_of"][0]["path"] = "runs/one/adapter"
    write_json("runs/two/adapter/adapter_config.json", noted)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    for _ in range(2):
        two = "../home/runs/two/adapter"
        assert torch.equal(logits(load_adapter(load_base(model, adapter=two), two)), expected)
        shutil.copytree(second, "runs/one/adapter", dirs_exist_ok=True)
    shutil.rmtree(home / "runs" / "one")
    with pytest.raises(FileError, match=r"other weights now .*SHA-256\): give its folder .*where a command has it"):
        underneath(model, adapter=two)
    shutil.rmtree("runs")
    with pytest.raises(FileError, match=r"and that is not there: .*a model with it merged in \(--model\)"):
        underneath(model, adapter=two)


def test_a_plain_peft_export_notes_its_base_from_the_root(saved, tmp_path, monkeypatch):
    model, first, _, _ = saved
    monkeypatch.chdir(Path(model).parent)
    export_saved("model", first, tmp_path / "plain", format="peft")
    assert read_json(tmp_path / "plain" / "adapter_config.json")["base_model_name_or_path"] == model


def test_a_run_stands_for_its_adapter(saved, tmp_path):
    model, first, second, expected = saved
    run = tmp_path / "run"
    shutil.copytree(first, run / "adapter")
    write_json(run / "run.json", {})
    assert underneath(model, [run]) == [run / "adapter"]
    assert torch.equal(logits(load_adapter(load_base(model, [str(run)]), second)), expected)
    shutil.rmtree(run / "adapter")
    with pytest.raises(FileError, match="run is a run with no adapter yet"):
        underneath(model, [run])
    (run / "model").mkdir()
    with pytest.raises(FileError, match="a whole model, of full fine-tuning"):
        underneath(model, [run])


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
    with pytest.raises(FileError, match=r"on top of .*first, .*--on-top-of"):
        export_saved(model, "second", "merged", format="merged")
    export_saved(model, "second", "merged", format="merged", on_top_of=["elsewhere"])
    torch.testing.assert_close(logits(load_model("merged")), expected, rtol=1e-3, atol=1e-3)
    adapter_on(load_model(model), tmp_path / "first", 5)
    with pytest.raises(FileError, match="other weights"):
        run_evaluation(model, "nano-choice", adapter="second", limit=2)


def rescale(adapter: Path, lora_alpha: int) -> None:
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"lora_alpha": lora_alpha})


def test_one_of_the_same_weights_with_another_lora_alpha_is_another(saved, tmp_path, monkeypatch):
    model = saved[0]
    first = tmp_path / "first"
    shutil.copytree(saved[1], first)
    adapter_on(load_base(model, [first]), tmp_path / "second", 1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in EXAMPLES))
    score = partial(run_evaluation, model, str(rows), tmp_path / "scored", on_top_of=[first], limit=2, max_new_tokens=2)
    train = partial(run_training, model, str(rows), tmp_path / "run", config=CONFIG, on_top_of=[first])
    done = score()[0], train()
    write_json(
        first / "adapter_config.json", read_json(first / "adapter_config.json") | {"base_model_name_or_path": "x"}
    )
    assert (score()[0], train()) == done, "a path in it is no matter"
    base = load_base(model, [first])
    rescale(first, 40)
    for again in (score, train):
        with pytest.raises(
            HotLoraError, match=r"the options of the adapters underneath \(lora_alpha, .*is not what it"
        ):
            again()
    for record in ("scored", "run"):
        text = read_json(tmp_path / record / "run.json")
        del text["config"]["on_top_of_options_hash"]
        write_json(tmp_path / record / "run.json", text)
    assert score()[0]["seconds"] == done[0]["seconds"] and train()["seconds"] == done[1]["seconds"], "as older ones are"

    with pytest.raises(FileError, match=r"second was trained on top of .*first, and that has another lora_alpha"):
        load_base(model, adapter=tmp_path / "second")
    with pytest.raises(FileError, match=r"on top of .*first"):
        load_base(model, [first], adapter=tmp_path / "second")
    with pytest.raises(PlanError, match=r"on top of .*first"):
        load_adapter(load_base(model, [first]), tmp_path / "second")
    load_adapter(base, tmp_path / "second")
    config = read_json(tmp_path / "second" / "adapter_config.json")
    del config["on_top_of"][0]["options_sha256"]
    write_json(tmp_path / "second" / "adapter_config.json", config)
    load_adapter(load_base(model, adapter=tmp_path / "second"), tmp_path / "second")  # as older ones are


def test_the_experts_that_tasks_share_are_told(saved, tmp_path):
    model, first, _, _ = saved
    base = load_model(model)
    peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base, {0: [1, 3], 1: [2]}), r=2)).save_pretrained(tmp_path)
    mine = {(layer, e) for layer, ids in saved_config(first).plan["experts"].items() for e in ids}
    both = len(mine & {("0", 1), ("0", 3), ("1", 2)})
    assert both, "the case must say something"
    (told,) = shared_experts([first, tmp_path])
    assert f"{first} has {len(mine)} experts, {tmp_path} 3, and {both} are of both" in told
    assert told.endswith(f"Jaccard {both / (len(mine) + 3 - both):.2f}")


def test_adapters_on_different_ground_are_not_combined(saved, tmp_path):
    model, first, second, _ = saved
    with pytest.raises(HotLoraError, match="on top of different adapters"):
        combine_saved(model, [first, second], tmp_path / "wrong")
    adapter_on(load_base(model, [first]), tmp_path / "other", 3)
    combined = combine_saved(model, [second, tmp_path / "other"], tmp_path / "combined")
    assert (combined / "tokenizer_config.json").is_file() and not (combined / "README.md").exists()
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


IN_MEMORY = {"path": None, "weights_sha256": None}


def test_one_merged_by_merge_adapter_is_noted_at_unload(saved):
    model, first, second, _ = saved
    adapted = load_adapter(load_model(model), first)
    adapted.merge_adapter()
    expected = logits(adapted)
    base = adapted.unload()
    assert torch.equal(logits(base), expected)
    digest = sha256_file(Path(first) / WEIGHTS)
    assert base.config.hotlora_merged == [
        {"path": first, "weights_sha256": digest, "options_sha256": saved_options_hash(first)}
    ]
    load_adapter(base, second)
    adapted = load_adapter(load_model(model), first)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert not hasattr(adapted.unload().config, "hotlora_merged")
    adapted = load_adapter(load_model(model), first)
    adapted.merge_adapter()
    assert len(adapted.merge_and_unload().config.hotlora_merged) == 1  # nothing is merged a second time


def test_a_plain_adapter_merged_beside_ours_is_noted(saved):
    model = load_adapter(load_model(saved[0]), saved[1], "hot")
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    base = model.merge_and_unload(adapter_names=["plain"])
    assert base.config.hotlora_merged == [IN_MEMORY]


@pytest.mark.parametrize("load", [load_adapter, peft.PeftModel.from_pretrained])
@pytest.mark.parametrize("how", ["data", "no_grad", "loaded over"])
def test_one_whose_values_were_changed_is_no_longer_its_file(saved, load, how):
    model, first, second, _ = saved
    adapted = load(load_model(model), first)
    before = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    if how == "data":
        before[-1].data.view(-1)[0] += 1e-6
    elif how == "no_grad":
        with torch.no_grad():
            before[0].mul_(2)
    else:
        peft.set_peft_model_state_dict(adapted, load_file(Path(second) / WEIGHTS))
    assert adapted.merge_and_unload().config.hotlora_merged == [IN_MEMORY]


@pytest.mark.parametrize("load", [load_adapter, peft.PeftModel.from_pretrained])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_that_was_only_cast_is_its_file_still(saved, load, dtype):
    model, first, _, _ = saved
    merged = load(load_model(model), first).to(dtype).merge_and_unload().config.hotlora_merged
    assert [entry["weights_sha256"] for entry in merged] == [sha256_file(Path(first) / WEIGHTS)]


def test_a_saved_config_with_fresh_values_is_not_its_file(saved):
    model, first, _, _ = saved
    fresh = peft.get_peft_model(load_model(model), saved_config(first))
    assert fresh.merge_and_unload().config.hotlora_merged == [IN_MEMORY]


@pytest.mark.parametrize(
    "options", [{"mask": True}, {"train_a": False}, {"use_dora": True}, {"train_full_experts": True}, {"ranks": True}]
)
@pytest.mark.parametrize("load", [load_adapter, peft.PeftModel.from_pretrained])
def test_every_kind_of_adapter_is_known_as_its_file(options, load, tmp_path):
    base, options = tiny_model("olmoe"), dict(options)
    plan = tiny_plan(base) | ({"ranks": {"0": [2, 4, 8], "1": [4, 4, 2]}} if options.pop("ranks", False) else {})
    if options.pop("mask", False):
        frozen = peft.get_peft_model(tiny_model("olmoe"), HotLoraConfig(plan=plan, r=2, train_a=False))
        fill(frozen, 1)
        options = {"train_a": False, "mask": draw_mask(frozen)}
    model = peft.get_peft_model(base, HotLoraConfig(plan=plan, r=2, **options))
    fill(model, 0)
    model.save_pretrained(tmp_path)
    for change, digest in ((0.0, sha256_file(tmp_path / WEIGHTS)), (1e-6, None)):
        loaded = load(tiny_model("olmoe"), tmp_path)
        next(p for name, p in loaded.named_parameters() if "lora_" in name).data.view(-1)[0] += change
        assert [e["weights_sha256"] for e in loaded.merge_and_unload().config.hotlora_merged] == [digest]
