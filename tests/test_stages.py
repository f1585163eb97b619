"""Methods that take more than one training, and plans that move while one runs: on a tiny model, end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from runs import run_evaluation, run_method, run_training
from safetensors.torch import load_file, save_file
from test_run import CONFIG, EXAMPLES, TOKENIZER
from tiny import fill, tiny_model, tiny_plan

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.load import load_adapter
from hotlora.adapter.mask import SparseMask
from hotlora.base.errors import HotLoraError, PlanError
from hotlora.base.files import read_json, sha256_file, write_json
from hotlora.base.records import read_record, write_record
from hotlora.cli.train import print_run
from hotlora.hf.models import load_model
from hotlora.hf.weights import model_hash
from hotlora.routing.plan import ExpertPlan
from hotlora.routing.profile import RoutingProfile, jaccard
from hotlora.runs.export import export_saved
from hotlora.runs.folder import load_base
from hotlora.runs.methods import METHODS
from hotlora.runs.training import _describe
from hotlora.tasks.data import data_hash, load_examples
from hotlora.tasks.split import drawn
from hotlora.tasks.tokens import batches, tokenize
from hotlora.training.config import TrainConfig
from hotlora.training.reprofile import Reprofiling
from hotlora.training.trainer import train

SHORT = {
    "max_steps": 3,
    "batch_size": 4,
    "save_steps": 2,
    "r": 4,
    "lora_alpha": 8,
    "max_length": 64,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=512).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in EXAMPLES))
    return str(file)


def logits(model):
    batch = next(iter(batches(tokenize(EXAMPLES[:4], TOKENIZER, 64), TOKENIZER, 4)))
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_a_run_does_not_go_on_upon_other_weights(model_folder, data, tmp_path):
    """The model's hash tells; where the record has none, of the Hub or older, the held-out loss before training."""
    model, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_folder, model)
    rows = Path(data).read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:4]) + "\n")
    options = {"test_data": str(tmp_path / "test.jsonl"), "config": replace(CONFIG, max_steps=4)}
    record = run_training(str(model), data, output, **options)
    assert record["model"]["test_loss"] == record["training"]["test_loss_before"]
    assert record["config"]["model_hash"] == model_hash(model)
    write_record(output, {**record, "status": "failed"})
    again = run_training(str(model), data, output, **options)
    assert again["training"]["resumed_from"] == 4 and again["training"]["test_loss"] == record["training"]["test_loss"]
    write_record(output, {**again, "status": "failed"})
    tiny_model("olmoe", seed=1, vocab_size=259, max_position_embeddings=512).save_pretrained(model)
    with pytest.raises(HotLoraError, match=r"the model \(its weights, .*\) is not what it was"):
        run_training(str(model), data, output, **options)
    for file in (output / "run.json", output / "train.json"):
        without_model_hash(file)
    with pytest.raises(HotLoraError, match=r"are not those that the run in .* was begun on: its held-out loss before"):
        run_training(str(model), data, output, **options)


def without_model_hash(file: Path) -> None:
    """As before a training noted it."""
    text = read_json(file)
    options = text.get("config", text)
    del options["model_hash"]
    write_json(file, text)


def test_a_run_without_held_out_data_does_not_go_on_upon_other_weights_either(model_folder, data, tmp_path):
    model, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_folder, model)
    record = run_training(str(model), data, output, config=replace(CONFIG, max_steps=2))
    shutil.move(model, tmp_path / "moved")
    moved = run_training(str(tmp_path / "moved"), data, output, config=replace(CONFIG, max_steps=2))
    assert moved == record, "the same weights, elsewhere"
    shutil.move(tmp_path / "moved", model)
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor / 2 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    for config in (replace(CONFIG, max_steps=2), replace(CONFIG, max_steps=4, extend=True)):
        with pytest.raises(HotLoraError, match=r"the model \(its weights, .*\) is not what it was"):
            run_training(str(model), data, output, config=config)
    for file in (output / "run.json", output / "train.json"):
        without_model_hash(file)
    assert run_training(str(model), data, output, config=replace(CONFIG, max_steps=2))["seconds"] == record["seconds"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_where_what_it_never_reads_has_changed(sharded, model_folder, data, tmp_path, caplog):
    model, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_folder, model)
    tiny = tiny_model("olmoe", vocab_size=259, max_position_embeddings=512)
    if sharded:
        (model / "model.safetensors").unlink()
        tiny.save_pretrained(model, max_shard_size="100KB")
    record = run_training(str(model), data, output, config=replace(CONFIG, max_steps=2))
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    tiny.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", model / "consolidated.safetensors")
    (model / "pytorch_model-2.bin").write_bytes(b"of nothing")
    assert model_hash(model) != record["config"]["model_hash"]
    longer = replace(CONFIG, max_steps=4, extend=True)
    then = run_training(str(model), data, output, config=longer)
    assert then["training"]["resumed_from"] == 2 and then["config"]["model_hash"] == record["config"]["model_hash"]
    assert "is not what it was" not in caplog.text
    for file in ("config.json", sorted(file.name for file in model.glob("model*.safetensors"))[-1]):
        before = (model / file).read_bytes()
        (model / file).write_bytes(before.replace(b"{", b"{ ", 1) if file == "config.json" else before[:-1] + b"!")
        with pytest.raises(HotLoraError, match=r"the model \(its weights, .*\) is not what it was"):
            run_training(str(model), data, output, config=longer)
        assert caplog.messages[-1] == f"{model} is not what it was when the run in {output} was begun: {file}"
        (model / file).write_bytes(before)
    without_files = read_json(output / "run.json")
    del without_files["model"]["files"]  # as before a training noted them: one hash is of all
    write_json(output / "run.json", without_files)
    with pytest.raises(HotLoraError, match=r"the model \(its weights, .*\) is not what it was"):
        run_training(str(model), data, output, config=longer)


# test_rank_growth has dr-lora, whose saved tensors are not those that it trained, and test_perft what is never merged.
OTHERS = ("fft", "lori-s", "hellori-s", "dr-lora", "perft-e", "perft-r", "perft-d", "perft-s")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in OTHERS])
def test_each_method_trains_saves_loads_and_merges(method, model_folder, data, tmp_path):
    record = run_method(model_folder, data, tmp_path / "run", method=method, **SHORT)
    assert record["status"] == "done" and record["condition"] == method
    assert record["training"]["loss_last"] < record["training"]["loss_first"]
    adapted = load_adapter(load_model(model_folder), tmp_path / "run" / "adapter")
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(load_model(model_folder)), atol=1e-4)
    merged = export_saved(model_folder, tmp_path / "run" / "adapter", tmp_path / "merged", format="merged")
    torch.testing.assert_close(logits(load_model(str(merged))), expected, rtol=1e-3, atol=1e-3)
    held = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in held.values()) == record["parameters"]["trainable"]
    assert record["parameters"]["adapter_bytes"] == pytest.approx(4 * record["parameters"]["trainable"], rel=0.25)


def test_full_fine_tuning_saves_a_model(model_folder, data, tmp_path):
    record = run_method(model_folder, data, tmp_path / "run", method="fft", **SHORT)
    base = load_model(model_folder)
    assert record["parameters"]["trainable"] == base.num_parameters() and "plan" not in record
    assert record["training"]["loss_last"] < record["training"]["loss_first"]
    tuned = load_model(str(tmp_path / "run" / "model"))
    changed = [not torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    run_evaluation(str(tmp_path / "run" / "model"), "nano-choice", limit=2)
    with pytest.raises(HotLoraError, match="no plan, mask or re-profiling"):
        run_training(model_folder, data, tmp_path / "other", config=CONFIG, full=True, reprofile_every=2)


def test_full_fine_tuning_leaves_the_configs_as_they_were(model_folder, data, tmp_path):
    """The trainer sets them for itself. generation_config.json here is one that transformers refuses to save once it
    is changed, as published ones are."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    config = {**read_json(base / "config.json"), "router_aux_loss_coef": 0.02, "use_cache": True}
    write_json(base / "config.json", config)
    generation = {**read_json(base / "generation_config.json"), "do_sample": False, "temperature": 0.6}
    del generation["pad_token_id"]  # which the trainer takes from the tokenizer
    write_json(base / "generation_config.json", generation)
    try:
        load_model(str(base)).save_pretrained(tmp_path / "saved")
    except ValueError as error:
        pytest.skip(f"this transformers does not save such a model at all ({str(error).splitlines()[0]})")
    run_method(str(base), data, tmp_path / "run", method="fft", **SHORT)
    for folder in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / "checkpoint-3"):
        assert read_json(folder / "config.json") == config
        assert read_json(folder / "generation_config.json") == generation
    # The same for a model that is merged after training in one process.
    model = load_model(str(base))
    before = (model.config.to_dict(), model.generation_config.to_dict())
    adapted = get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), r=2, lora_alpha=4))
    train(adapted, TOKENIZER, tokenize(EXAMPLES, TOKENIZER, 64), TrainConfig(**SHORT), tmp_path / "adapter")
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before


def test_lori_s_is_a_dense_run_its_mask_and_a_sparse_run(model_folder, data, tmp_path):
    options = {"method": "hellori-s", **SHORT, "dense_learning_rate": 1e-3}
    record = run_method(model_folder, data, tmp_path / "run", **options)
    dense = read_record(tmp_path / "run" / "dense")
    assert dense["config"]["learning_rate"] == 1e-3 and record["config"]["learning_rate"] == 3e-3
    assert record["plan"]["hash"] == dense["plan"]["hash"] and record["condition"] == "hellori-s"
    assert record["training"]["dense_seconds"] == dense["training"]["seconds"]
    share = record["parameters"]["trainable"] / dense["parameters"]["trainable"]
    assert share == pytest.approx(0.1, abs=0.01)
    mask = SparseMask.load(tmp_path / "run")
    assert sum(mask.num_kept().values()) == record["parameters"]["trainable"]
    expected = logits(load_adapter(load_model(model_folder), tmp_path / "run" / "adapter"))
    merged = export_saved(model_folder, tmp_path / "run" / "adapter", tmp_path / "merged", format="merged")
    torch.testing.assert_close(logits(load_model(str(merged))), expected, rtol=1e-3, atol=1e-3)

    # Run again: nothing is trained twice. Another run may take the mask; another A is another start.
    assert run_method(model_folder, data, tmp_path / "run", **options) == record
    plan = tmp_path / "run" / "plan.json"
    given = {"method": "hellori-s", **SHORT, "mask": tmp_path / "run" / "mask.safetensors", "plan": plan, "rule": "hot"}
    again = run_method(model_folder, data, tmp_path / "again", **given)
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert again["config"]["mask_hash"] == record["config"]["mask_hash"]
    # Another mask is refused before it takes the place of the run's.
    with pytest.raises(HotLoraError, match=r"holds another run: --keep 0\.5 against 0\.1"):
        run_method(model_folder, data, tmp_path / "run", **{**options, "keep": 0.5})
    assert SparseMask.load(tmp_path / "run").keep == 0.1
    # A mask saved again is the same one, though its file has other bytes.
    mask = SparseMask.load(tmp_path / "run")
    files = {}
    while len(files) < 2:
        mask.save(tmp_path / "mask.safetensors")
        files[sha256_file(tmp_path / "mask.safetensors")] = SparseMask.load(tmp_path / "mask.safetensors").hash
    assert set(files.values()) == {record["config"]["mask_hash"]}
    shutil.copytree(tmp_path / "run" / "dense", tmp_path / "fresh" / "dense")
    fresh = run_method(model_folder, data, tmp_path / "fresh", **options, fresh_a=True)
    assert fresh["config"]["a_seed"] == 1 and fresh["training"]["loss_last"] != record["training"]["loss_last"]


def test_a_warm_up_comes_before_the_profile(model_folder, data, tmp_path):
    options = {"method": "hellora", **SHORT, "warmup": "lora"}
    record = run_method(model_folder, data, tmp_path / "run", **options)
    warm = RoutingProfile.load(tmp_path / "run" / "warmup" / "warm-profile.safetensors")
    base = RoutingProfile.load(tmp_path / "run" / "warmup" / "profile.safetensors")
    assert record["profile"]["hash"] == warm.hash != base.hash
    assert read_record(tmp_path / "run" / "warmup")["plan"]["rule"] == "all"
    plan = ExpertPlan.load(tmp_path / "run")
    found = record["warmup"]["top_k"]
    assert found["experts_per_layer"] == 2 == len(plan.experts[0])
    order = base.counts.sort(dim=1, descending=True, stable=True).indices[:, :2].tolist()
    assert found["jaccard"] == pytest.approx(jaccard(plan, dict(enumerate(order))))
    assert read_record(tmp_path / "run") == record
    with pytest.raises(HotLoraError, match="warmup 'fft' does not exist"):
        run_method(model_folder, data, tmp_path / "other", config=CONFIG, warmup="fft")
    with pytest.raises(HotLoraError, match="there to make a profile"):
        run_method(model_folder, data, tmp_path / "other", config=CONFIG, warmup="lora", plan=tmp_path / "run")


@pytest.mark.parametrize("limit", [None, 70])
def test_a_warm_up_has_rows_of_the_training_alone(limit, model_folder, tmp_path):
    """`--limit` draws them: of all rows the warm-up's would be others."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}", "completion": f" {i + 1}"}) + "\n" for i in range(400)))
    run = tmp_path / "run"
    run_method(model_folder, str(file), run, method="hellora", **SHORT, warmup="lora", limit=limit)
    rows = load_examples(str(file), "train", limit=limit, tokenizer=TOKENIZER)
    record, warm = read_record(run / "warmup"), RoutingProfile.load(run / "warmup" / "warm-profile.safetensors")
    assert record["data"]["train"] == 64
    assert record["data"]["hash"] == warm.source["data_hash"] == data_hash(drawn(rows, 64))
    # One that was begun when they were drawn from all rows is not another run.
    before = load_examples(str(file), "train", limit=64, tokenizer=TOKENIZER)
    write_record(run / "warmup", record | {"config": record["config"] | {"data_hash": data_hash(before)}})
    run_method(model_folder, str(file), run, method="hellora", **SHORT, warmup="lora", limit=limit)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [((6, 6), "12.5%"), ((12, 12), "25%"), ((3, 3), "6.25%"), ((6, 12), "19%"), ((16, 16), "33%"), ((48, 48), "")],
)
def test_a_run_is_named_by_the_share_of_its_plan(numbers, told):
    """Where layers differ, it is a rule's own number, of which each seed has another."""
    experts = {layer: tuple(range(number)) for layer, number in enumerate(numbers)}
    plan = ExpertPlan(experts=experts, num_experts=48, rule="hot", params={}, profile_hash=None)
    assert _describe("hot", plan) == f"hot {told}".strip()


def test_a_task_on_top_of_another(model_folder, data, tmp_path):
    run_method(model_folder, data, tmp_path / "one", method="sieve", **SHORT)
    first = tmp_path / "one" / "adapter"
    rows = tmp_path / "other.jsonl"
    rows.write_text(Path(data).read_text().replace("make", "give"))
    other = run_method(model_folder, str(rows), tmp_path / "two", method="sieve", **SHORT, on_top_of=[first])
    assert len(other["config"]["on_top_of"]) == 1
    base = load_base(model_folder, [first])
    torch.testing.assert_close(
        logits(base), logits(load_adapter(load_model(model_folder), first)), rtol=1e-3, atol=1e-3
    )
    both = load_adapter(base, tmp_path / "two" / "adapter")
    merged = export_saved(
        model_folder, tmp_path / "two" / "adapter", tmp_path / "merged", format="merged", on_top_of=[first]
    )
    torch.testing.assert_close(logits(load_model(str(merged))), logits(both), rtol=1e-3, atol=1e-3)


# Plans that move


@pytest.mark.parametrize("left", ["drop", "merge"])
def test_reprofiling_is_resumed_to_the_same_end(left, model_folder, data, tmp_path, monkeypatch, capsys):
    config = replace(CONFIG, max_steps=6, save_steps=3, learning_rate=0.1)
    options = {"config": config, "experts_per_layer": 2, "reprofile_every": 2, "reprofile_left": left}
    calm = run_training(model_folder, data, tmp_path / "calm", **options)
    drift = calm["reprofile"]
    print_run(calm, tmp_path / "calm")
    assert f"re-profiled {len(drift)} times: " in capsys.readouterr().out
    assert [row["step"] for row in drift] == [2, 4] and min(row["jaccard"] for row in drift) < 1
    assert all(row["came"] == row["went"] for row in drift)

    class Stopped(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr("hotlora.training.reprofile.Reprofiling.move", stop_after(3, stop))
        with pytest.raises(Stopped):
            run_training(model_folder, data, tmp_path / "killed", **options)
    record = run_training(model_folder, data, tmp_path / "killed", **options)
    assert record["training"]["resumed_from"] == 3
    assert [r["plan_hash"] for r in record["reprofile"]] == [r["plan_hash"] for r in drift]
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("calm", "killed")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    adapted = load_adapter(load_model(model_folder), tmp_path / "calm" / "adapter")
    plan = ExpertPlan.from_dict(adapted.peft_config["default"].plan)
    assert (plan.ranks is not None) == (left == "merge")
    ended = hotlora.Run(tmp_path / "calm").plan
    assert ended == plan and ended.experts != ExpertPlan.load(tmp_path / "calm" / "plan.json").experts


@pytest.mark.parametrize(
    "method",
    [
        {"grow_every": 1, "lr_scheduler": "constant_with_warmup"}, {"perft": "E"},
        {"train_a": False, "keep": 0.5, "granularity": "matrix"},
        {"rule": "hot", "reprofile_every": 2, "reprofile_left": "merge"},
    ],
)  # fmt: skip
def test_a_warm_up_is_plain_lora_on_all_experts(method, model_folder, data, tmp_path):
    """Whatever is trained after it."""
    common = {"max_steps": 8, "r": 4, "lora_alpha": 8, "max_length": 64, "warmup": "lora", "rule": "all"}
    off = {"train_attention": False, "train_shared": False, "train_router": "grow_every" in method}
    run_method(model_folder, data, tmp_path / "run", **common | off | method)
    config = json.loads((tmp_path / "run" / "warmup" / "adapter" / "adapter_config.json").read_text())
    assert config["perft"] is None and {len(ids) for ids in config["plan"]["experts"].values()} == {8}
    assert config["plan"].get("ranks") is None


def stop_after(step, stop):
    """`Reprofiling.move`, until a step."""
    move = Reprofiling.move

    def wrapped(self, plan, optimizer, at):
        return stop() if at > step else move(self, plan, optimizer, at)

    return wrapped


def test_what_stays_keeps_its_factors_and_what_goes_is_in_the_saved_adapter(tmp_path):
    """Moves by hand: {1, 3} -> {3, 5} -> {1, 5} with merging. The model computes the same before and after a move
    that only takes experts away, and the finished adapter computes what the moved model computed."""

    def plan_of(model, ids):
        return ExpertPlan.from_dict(tiny_plan(model, {0: ids, 1: ids}))

    base = tiny_model(vocab_size=259, max_position_embeddings=512)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, HotLoraConfig(plan=plan_of(base, [1, 3]), r=4, lora_alpha=8)).eval()
    fill(model, 0)
    moving = Reprofiling(model, lambda: None, lambda profile: None, 1, tmp_path / "log.jsonl", left="merge")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    layer = model.get_base_model().model.layers[0].mlp.experts
    kept = layer.lora_B_down["default"][1].clone()
    moment = optimizer.state[layer.lora_B_down["default"]]["exp_avg"][1].clone()
    expected = logits(model)
    moving.move(plan_of(base, [3, 5]), optimizer, 1)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)  # 1 is merged, 5 starts at zero
    assert layer.expert_ids["default"] == (3, 5)
    assert torch.equal(layer.lora_B_down["default"][0], kept) and not layer.lora_B_down["default"][1].any()
    state = optimizer.state[layer.lora_B_down["default"]]["exp_avg"]
    assert torch.equal(state[0], moment) and not state[1].any()
    with torch.no_grad():
        layer.lora_B_down["default"][1].add_(0.1)
    expected = logits(model)
    moving.move(plan_of(base, [1, 5]), optimizer, 2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.lora_B_down["default"][0].add_(0.1)  # 1 is back, and learns more
    expected = logits(model)
    moving.finish()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    plan = ExpertPlan.from_dict(model.peft_config["default"].plan)
    assert plan.experts[0] == (1, 3, 5) and plan.ranks is not None and plan.ranks[0] == (8, 4, 4)
    for name, weight in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace("base_layer.", "")])
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tiny_model(vocab_size=259, max_position_embeddings=512), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_newcomers_step_as_a_fresh_adamw_does(fused, tmp_path):
    """Among experts that AdamW has stepped a thousand times; and those go on as if nothing had come. The gradients are
    made here, the same for all. In the middle the optimizer's state goes through a file."""
    base = tiny_model(vocab_size=259)
    plans = [ExpertPlan.from_dict(tiny_plan(base, {0: ids, 1: ids})) for ids in ([1, 3, 5], [2, 3, 4], [0, 2, 3])]
    model = get_peft_model(base, HotLoraConfig(plan=plans[0], r=2, lora_alpha=4))
    moving = Reprofiling(model, lambda: None, lambda profile: None, 1, tmp_path / "log.jsonl")
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1, "fused": fused}
    names = {n: p for n, p in model.named_parameters() if p.requires_grad and ("B_down" in n or "q_proj" in n)}
    optimizer = torch.optim.AdamW(names.values(), **options)
    held = next(p for n, p in names.items() if "layers.0" in n and "B_down" in n)
    generator = torch.Generator().manual_seed(0)

    def steps(number, *others):
        """`others`: (an optimizer, its parameter, the row of `held` whose gradients it gets)"""
        for _ in range(number):
            for parameter in names.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for other, parameter, row in others:
                parameter.grad = held.grad[row : row + 1].clone()
                other.step()
            moving.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
            optimizer.step()

    def alone(row):
        parameter = torch.nn.Parameter(held[row : row + 1].detach().clone())
        return torch.optim.AdamW([parameter], **options), parameter, row

    staying = alone(1)
    steps(1000, staying)
    assert torch.equal(held[1:2], staying[1])
    moving.move(plans[1], optimizer, 1000)  # 2 and 4 come, 3 stays
    first, second = alone(0), alone(2)
    start = held.detach().clone()
    steps(15, staying, first, second)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer = torch.optim.AdamW(names.values(), **options)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(15, staying, first, second)
    for _, parameter, row in (staying, first, second):
        assert torch.equal(held[row : row + 1], parameter)
    assert (held - start).abs().max() < 30 * 1.2e-2  # before: 143 times the learning rate
    moving.move(plans[2], optimizer, 1030)  # 0 comes; 2 and 3 stay, at steps of their own
    third = alone(0)
    steps(30, (staying[0], staying[1], 2), (first[0], first[1], 1), third)
    assert torch.equal(held, torch.cat([third[1], first[1], staying[1]]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reprofile_every": 0}, HotLoraError, "reprofile_every = 0"),
        ({"reprofile_every": 2, "reprofile_left": "keep"}, HotLoraError, "left is 'keep'"),
        ({"reprofile_every": 2, "config": TrainConfig(train_a=False, max_steps=4)}, HotLoraError, "moves plain LoRA"),
        ({"reprofile_every": 1, "rule": "auto"}, PlanError, "keeps the number of experts"),
    ],
)
def test_reprofiling_says_what_is_wrong(options, error, message, model_folder, data, tmp_path):
    options = {"config": replace(CONFIG, max_steps=4, learning_rate=0.3), **options}
    with pytest.raises(error, match=message):
        run_training(model_folder, data, tmp_path / "run", **options)
