"""Whole runs, from a model's folder and a data file to the record."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from runs import run_evaluation, run_training
from safetensors.torch import load_file
from tiny import tiny_model, tiny_plan
from tiny_files import save_tiny_model
from tiny_tokenizer import byte_tokenizer

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.load import load_adapter
from hotlora.base.errors import DataError, FileError, HotLoraError, ModelError, PlanError
from hotlora.base.records import new_record, read_record, write_record
from hotlora.evaluation.score import response_loss
from hotlora.hf.models import load_model
from hotlora.routing.profile import RoutingProfile
from hotlora.runs import training
from hotlora.runs.export import combine_saved, export_saved
from hotlora.runs.profiling import profile_data
from hotlora.runs.study import run_study
from hotlora.tasks import Example
from hotlora.tasks.tokens import tokenize
from hotlora.training.config import TrainConfig

TOKENIZER = byte_tokenizer()
EXAMPLES = [Example(f"{i} and {i % 7}", f" make {i + i % 7}") for i in range(24)]
CONFIG = TrainConfig(max_steps=6, batch_size=4, save_steps=4, r=4, lora_alpha=8, max_length=64, learning_rate=3e-3)


def dataset():
    return tokenize(EXAMPLES, TOKENIZER, 64)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder)


def test_a_whole_run_and_its_record(model_folder: str, tmp_path: Path):
    config = replace(CONFIG, max_length=256)
    record = run_training(model_folder, "nano-choice", tmp_path / "run", config=config, limit=40, test_limit=8)
    assert record == read_record(tmp_path / "run") and record["status"] == "done"
    assert (record["name"], record["condition"]) == ("hot 25%", "hot")
    assert record["data"]["train"] == 40 and record["evaluation"]["nano-choice"]["n"] == 8
    assert record["parameters"]["trainable"] > 0 and record["training"]["steps"] == 6
    for part in (record["profile"]["path"], record["plan"]["path"], record["training"]["metrics"], "adapter"):
        assert (tmp_path / "run" / part).exists()
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert record["parameters"]["adapter_bytes"] == weights.stat().st_size

    # What is saved is what was scored.
    saved, _ = run_evaluation(model_folder, "nano-choice", tmp_path / "again", adapter=weights.parent, limit=8)
    kept = (tmp_path / "again" / "results-nano-choice.jsonl").read_text()
    assert kept == (tmp_path / "run" / "results-nano-choice.jsonl").read_text()
    assert saved["condition"] == "adapter"
    base, evaluation = run_evaluation(model_folder, "nano-choice", tmp_path / "base", limit=8)
    assert base["condition"] == "base" and evaluation is not None and base["parameters"]["trainable"] == 0
    assert run_evaluation(model_folder, "nano-choice", tmp_path / "base", limit=8) == (base, None)

    # The same words give the record back; others are told apart.
    before = weights.stat().st_mtime_ns
    assert run_training(model_folder, "nano-choice", tmp_path / "run", config=config, limit=40, test_limit=8) == record
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(HotLoraError, match="--rule all against hot"):
        run_training(model_folder, "nano-choice", tmp_path / "run", config=config, limit=40, test_limit=8, rule="all")


def test_a_run_on_a_file_with_a_shared_profile(model_folder: str, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in EXAMPLES))
    base = tiny_model("olmoe", vocab_size=259, max_position_embeddings=512)
    profile = profile_data(base, TOKENIZER, EXAMPLES, str(file), model_folder)
    profile.save(tmp_path / "profile.safetensors")
    assert profile.num_tokens == sum(map(len, dataset()["input_ids"]))
    record = run_training(
        model_folder, str(file), tmp_path / "cold", config=CONFIG, rule="cold", experts_per_layer=3,
        profile=tmp_path / "profile.safetensors", test_data=str(file),
    )  # fmt: skip
    assert record["profile"] == {
        "path": "../profile.safetensors", "hash": profile.hash, "num_tokens": profile.num_tokens
    }  # fmt: skip
    assert (record["name"], "evaluation" in record) == ("cold 37.5%", False) and record["training"]["test_loss"] > 0
    plan = json.loads((tmp_path / "cold" / "plan.json").read_text())
    assert all(len(ids) == 3 for ids in plan["experts"].values())
    by_plan = run_training(model_folder, str(file), tmp_path / "p", config=CONFIG, plan=tmp_path / "cold" / "plan.json")
    assert by_plan["plan"]["hash"] == record["plan"]["hash"] and "profile" not in by_plan
    assert by_plan["training"]["loss_last"] == record["training"]["loss_last"]
    loaded = load_file(tmp_path / "p" / "adapter" / "adapter_model.safetensors")
    model = load_adapter(
        tiny_model("olmoe", vocab_size=259, max_position_embeddings=512), tmp_path / "cold" / "adapter"
    )
    assert response_loss(model, TOKENIZER, dataset()) == record["training"]["test_loss"] and len(loaded) > 0


def test_a_run_profiles_until_its_experts_are_settled(model_folder: str, tmp_path: Path, capsys, caplog):
    """Runs that were begun before there was a choice have read what --profile-fraction gave, a tenth by default."""
    file, run = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"prompt": f"{i}", "completion": f" {i % 7}"}) + "\n" for i in range(300)))
    config, named = replace(CONFIG, max_steps=1), (model_folder, str(file))
    record = run_training(*named, run, config=config, profile_until=0.5, rule="cold", fraction=0.5, progress=True)
    profile = RoutingProfile.load(run)
    assert (profile.source["examples"], profile.source["drawn_from"]) == (64, 300)
    assert profile.source["until"]["experts"] == {"rule": "cold", "fraction": 0.5, "signal": "count"}
    assert record["profile"]["examples"] == 64 and record["profile"]["stability"]["mean"] >= 0.5
    said = "profiled on 64 of 300 examples, {:,} tokens: the chosen experts (cold, fraction 0.5, by count) overlap"
    assert said.format(profile.num_tokens) in capsys.readouterr().err
    same = {"config": config, "profile_until": 0.5, "rule": "cold", "fraction": 0.5}
    assert run_training(*named, run, **same) == record
    with pytest.raises(HotLoraError, match=r"--profile-until 0\.95 against 0\.5"):
        run_training(*named, run, **{**same, "profile_until": None})

    old = run_training(*named, tmp_path / "old", config=config, profile_fraction=0.1)
    assert RoutingProfile.load(tmp_path / "old").source["examples"] == 64  # of a small set as many at least
    assert (old["config"].pop("profile_until"), old["config"]["profile_fraction"]) == (1.0, 0.1)
    write_record(tmp_path / "old", old)
    with pytest.raises(HotLoraError, match=r"--profile-fraction 1\.0 against 0\.1, --profile-until 0\.95 against 1\.0"):
        run_training(*named, tmp_path / "old", config=config)
    assert run_training(*named, tmp_path / "old", config=config, profile_fraction=0.1)["status"] == "done"

    assert all("is done already" in told.getMessage() for told in caplog.records)
    run_training(*named, tmp_path / "few", config=config, profile_until=0.9999, profile_fraction=0.25)
    assert "on all 75 examples" in caplog.text and "short of profile_until = 0.9999" in caplog.text
    assert "give a larger --profile-fraction to read more." in caplog.text


def test_a_run_by_saliency_gathers_it(model_folder: str, tmp_path: Path):
    arguments = {"config": replace(CONFIG, max_steps=1, max_length=256), "limit": 12, "evaluate": False}
    arguments |= {"signal": "saliency"}
    record = run_training(model_folder, "nano-choice", tmp_path / "run", **arguments)
    assert RoutingProfile.load(tmp_path / "run").saliency is not None
    assert record["plan"]["params"]["signal"] == "saliency"
    plain = replace(RoutingProfile.load(tmp_path / "run"), saliency=None)
    plain.save(tmp_path / "plain.safetensors")
    with pytest.raises(PlanError, match="holds no saliency: make it again with `hotlora profile --saliency`"):
        run_training(model_folder, "nano-choice", tmp_path / "no", profile=tmp_path / "plain.safetensors", **arguments)
    assert not (tmp_path / "no").exists()


def test_a_run_that_fails_says_so_and_goes_on(model_folder: str, tmp_path: Path):
    other = tiny_model("olmoe", vocab_size=259, num_experts=4)
    profile_data(other, TOKENIZER, EXAMPLES, "rows", "other").save(tmp_path / "other.safetensors")
    arguments = {"config": replace(CONFIG, max_length=400), "limit": 12, "test_limit": 2, "evaluate": False}
    with pytest.raises(PlanError, match="is the profile of olmoe-"):
        run_training(model_folder, "nano-math", tmp_path / "run", profile=tmp_path / "other.safetensors", **arguments)
    assert not (tmp_path / "run").exists(), "a wrong option is told before anything is begun"
    shutil.copytree(model_folder, tmp_path / "model")
    weights = next((tmp_path / "model").glob("*.safetensors")).rename(tmp_path / "weights")
    model_folder = str(tmp_path / "model")
    with pytest.raises(ModelError, match="no causal language model could be loaded"):
        run_training(model_folder, "nano-math", tmp_path / "run", **arguments)
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed" and "ModelError" in record["error"]
    weights.rename(tmp_path / "model" / "model.safetensors")
    # Nothing was trained, so there is nothing to mix up.
    record = run_training(
        model_folder,
        "nano-math",
        tmp_path / "run",
        **{**arguments, "config": replace(CONFIG, max_length=512)},
    )
    assert record["status"] == "done" and "error" not in record
    assert RoutingProfile.load(tmp_path / "run").source["examples"] == 12


DATED = (
    "{{ strftime_now('%d %B %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _dated_model(folder: Path) -> str:
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=512).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return str(folder)


def _talks(file: Path, *more: dict) -> str:
    rows = [
        {"messages": [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.completion.strip()}]}
        for e in EXAMPLES
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return str(file)


def test_a_run_that_goes_on_another_day_keeps_the_date_of_its_first_start(tmp_path: Path):
    """The template writes the date: other tokens, and another loss, on another day."""
    model, data, run = _dated_model(tmp_path / "model"), _talks(tmp_path / "rows.jsonl"), tmp_path / "run"
    began = new_record(
        name="hot", condition="hot", model={"name": model, "fingerprint": ""},
        data={"name": data, "read_at": "2020-02-03T04:05:06"},
    )  # fmt: skip
    write_record(run, {**began, "status": "failed"})
    config = replace(CONFIG, max_length=128)
    calm = run_training(model, data, run, config=config, test_data=data)
    assert calm["data"]["read_at"] == "2020-02-03T04:05:06" and calm["training"]["resumed_from"] == 0
    today = run_training(model, data, tmp_path / "today", config=config, test_data=data)
    assert today["data"]["hash"] == calm["data"]["hash"] and today["data"]["read_at"] > "2026"
    assert today["training"]["loss_first"] != calm["training"]["loss_first"]

    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    write_record(run, {**calm, "status": "failed"})
    again = run_training(model, data, run, config=config, test_data=data)
    assert again["training"]["resumed_from"] == 4 and again["data"] == calm["data"]
    assert again["training"]["loss_last"] == calm["training"]["loss_last"]
    assert again["training"]["test_loss_before"] == calm["training"]["test_loss_before"]
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    # The hash of the data says nothing of the template, so the run does.
    (tmp_path / "model" / "chat_template.jinja").write_text(DATED + " ")
    with pytest.raises(HotLoraError, match="the model's chat template is not what it was"):
        run_training(model, data, run, config=config, test_data=data)
    write_record(run, {**calm, "data": {**calm["data"], "read_at": "yesterday"}})
    with pytest.raises(FileError, match="read_at is 'yesterday'; it must be a time"):
        run_training(model, data, run, config=config)


def test_a_row_that_cannot_be_trained_on_is_told_before_a_model_is_loaded(tmp_path: Path):
    folder = tmp_path / "model"
    model = _dated_model(folder)
    (folder / "model.safetensors").unlink()
    tokenizer = byte_tokenizer(extra_special_tokens=["<more>"])
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    bad = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<more>"}]}
    data, good = _talks(tmp_path / "rows.jsonl", bad), _talks(tmp_path / "good.jsonl")
    for train, test in ((data, None), (good, data)):
        with pytest.raises(DataError, match=r"rows.jsonl line 25: '<more>' is token 259, and .* has 259 rows"):
            run_training(model, train, tmp_path / "run", config=replace(CONFIG, max_length=128), test_data=test)
    with pytest.raises(DataError, match=r"rows.jsonl line 25: '<more>' is token 259"):
        run_study([data], model)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_told(model_folder: str):
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        run_evaluation(model_folder, "rows.jsonl")
    with pytest.raises(DataError, match="profile_fraction = 2"):
        run_training(model_folder, "nano-math", "never", profile_fraction=2)


def test_data_without_a_scorer_is_trained_on_and_has_a_loss(model_folder: str, tmp_path: Path):
    (tmp_path / "train.txt").write_text("".join(f"Sentence {i} is here .\n" for i in range(12)))
    (tmp_path / "test.txt").write_text("Sentence 99 is here .\n")
    record = run_training(model_folder, f"wikitext2:{tmp_path}", tmp_path / "run", config=CONFIG)
    assert record["status"] == "done" and record["training"]["test_loss"] > 0 and not record.get("evaluation")
    with pytest.raises(DataError, match="wikitext2 has no scorer"):
        run_evaluation(model_folder, f"wikitext2:{tmp_path}")


def test_merged_is_a_plain_checkpoint_with_the_adapters_logits(model_folder: str, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in EXAMPLES))
    run_training(model_folder, str(file), tmp_path / "run", config=CONFIG)
    merged = export_saved(model_folder, tmp_path / "run" / "adapter", tmp_path / "merged", format="merged")
    base, plain = load_model(model_folder, device="cpu"), load_model(merged, device="cpu")
    assert type(plain) is type(base) and not (merged / "adapter_config.json").exists()
    ids = torch.arange(24).view(2, 12)
    unchanged = base(ids).logits
    adapted = load_adapter(base, tmp_path / "run" / "adapter")
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(ids).logits, unchanged, atol=1e-4)
    with pytest.raises(FileError, match="not empty: give a new folder"):
        export_saved(model_folder, tmp_path / "run" / "adapter", merged, format="merged")


def test_what_the_adapters_config_forbids_is_said_before_a_model_is_looked_for(tmp_path: Path):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    model = tiny_model()
    get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), r=2)).save_pretrained(adapter)
    with pytest.raises(HotLoraError, match="cannot hold the adapter's router updates"):
        export_saved("no/such-model", adapter, out, format="vllm")
    with pytest.raises(HotLoraError, match="holds the router: leave drop_router out"):
        export_saved("no/such-model", adapter, out, format="peft", drop_router=True)
    with pytest.raises(FileError, match="nowhere is not a folder"):
        export_saved("no/such-model", tmp_path / "nowhere", out, format="merged")
    with pytest.raises(FileError, match="nowhere is not a folder"):
        combine_saved("no/such-model", [adapter, tmp_path / "nowhere"], out)


def test_a_profile_of_another_base_is_not_taken(model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that failed before its first checkpoint may be begun anew with other options."""
    file, run = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"prompt": f"{i}", "completion": f" {i % 7}"}) + "\n" for i in range(32)))
    config, named = replace(CONFIG, max_steps=1), (model_folder, str(file))
    made = []
    real = training.profile_data
    monkeypatch.setattr(training, "profile_data", lambda **given: made.append(1) or real(**given))
    for options in ({}, {}, {"dtype": "bfloat16"}, {"dtype": "bfloat16"}, {}):
        (run / "run.json").unlink(missing_ok=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        with monkeypatch.context() as patched:
            patched.setattr(training, "train", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_training(*named, run, config=config, **options)
    assert len(made) == 3
