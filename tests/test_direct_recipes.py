"""Recipes that profiles, benches and configs make: really run, and their numbers found again in other ways."""

import csv
import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import typer
from tiny import tiny_config
from typer.testing import CliRunner

from hotlora.adapter.count import parameters_from_config
from hotlora.base.errors import DataError, FileError, HotLoraError, ModelError
from hotlora.base.files import write_json
from hotlora.bench import bench, worker
from hotlora.bench.worker import Worker
from hotlora.cli.sweep import sweep as sweep_command
from hotlora.cost.estimate import estimate, meta_model, sized_config
from hotlora.cost.flops import attention_adapter_flops, expert_adapter_flops, forward_flops
from hotlora.hf import connection
from hotlora.hf.models import config_file
from hotlora.papers import RECIPES, Direct, Recipe, Setting, benches, find_recipe, needs
from hotlora.papers.benches import BenchRecipe
from hotlora.papers.needs import data_size, sweep_needs
from hotlora.papers.result import Result, write_results
from hotlora.report.published import MODELS, THROUGHPUT, UNIFORM_COVERAGE
from hotlora.routing.profile import RoutingProfile
from hotlora.runs.sweep import Condition, Sweep
from hotlora.tasks import TASKS
from hotlora.tasks.data import load_examples

APP = typer.Typer()
APP.command()(sweep_command)
SMALL = {"limit": 70, "batch_size": 16}
NANO = Setting("nano", options=SMALL)
TIMED = {"tokens": 32, "length": 16, "r": 4, "rounds": 2, "device": "cpu", "dtype": "float32"}
PROFILES = [
    *(f"hellora-figure-{n}" for n in (1, 3, 4, 6)), *(f"moe-sieve-table-{n}" for n in (2, 7, 9)),
    *(f"moe-sieve-figure-{n}" for n in (1, 2, 3, 5, 6)),
]  # fmt: skip


def call(*words: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(APP, [str(word) for word in words])
    assert not isinstance(done.exception, AssertionError | TypeError | KeyError), done.exc_info
    return done.exit_code, done.output


def direct(name: str, setting: Setting = NANO) -> Direct:
    found = find_recipe(name, setting)
    assert isinstance(found, Direct)
    return found


def shown(name: str, store: Path, setting: Setting = NANO) -> Result:
    found = direct(name, setting).result(store)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's three tasks and its warm-up, profiled."""
    folder = tmp_path_factory.mktemp("store")
    told: list[str] = []
    for name in ("hellora-figure-4", "hellora-figure-3"):
        direct(name).run(folder, told.append)
    assert [line for line in told if line.startswith("profiling")] == [
        f"profiling nano on {task}" for task in ("nano-math", "nano-sql", "nano-choice")
    ]
    return folder


@pytest.fixture(scope="module")
def counts(store: Path) -> dict[str, torch.Tensor]:
    """Task -> float64 [L, E]"""
    tasks = ("nano-math", "nano-sql", "nano-choice")
    return {task: RoutingProfile.load(store / "profiles" / "nano" / task).counts.double() for task in tasks}


def top(values: torch.Tensor, k: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda e: (-values[e].item(), e))[:k])


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def test_a_profile_is_made_once(store: Path):
    files = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}
    for name in PROFILES:
        recipe = direct(name)
        assert {state for *_, state in recipe.state(store)} == {"done"}
        recipe.run(store, pytest.fail)
    assert files == {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", PROFILES)
def test_every_result_can_be_written(name: str, store: Path, tmp_path: Path):
    result = shown(name, store)
    page = write_results([result], tmp_path, "Title")
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len(rows) == len(result.numbers) > 0 and {len(row) for row in result.rows} == {len(result.columns)}
    assert result.title in page.with_suffix(".md").read_text() and r"\toprule" in (tmp_path / f"{name}.tex").read_text()
    for end in result.figures:
        assert (tmp_path / result.picture(end)).stat().st_size > 5000
    assert bool(result.figures) == ("figure" in name or name == "moe-sieve-table-7")


def test_one_layer_against_all(store: Path, counts: dict[str, torch.Tensor]):
    layer, everything = shown("hellora-figure-1", store).numbers
    found, sums = counts["nano-math"][2], counts["nano-math"].sum(dim=0)  # of 6 layers the third
    assert layer["layers"] == "layer 2" and everything["layers"] == "all layers"
    for number, values in ((layer, found), (everything, sums)):
        assert number["hot_share"] == pytest.approx((values.topk(4).values.sum() / values.sum()).item())
        assert number["cv"] == pytest.approx((values.std(correction=0) / values.mean()).item())
    assert layer["cv"] > everything["cv"]


def test_the_warm_up(store: Path, counts: dict[str, torch.Tensor]):
    made = store / "profiles" / "nano" / "nano-math-warm-up"
    numbers = shown("hellora-figure-3", store).numbers
    for name, file in (("warmed up, on a tenth", "warmed-up"), ("base, on a tenth", "profile")):
        other = RoutingProfile.load(made / f"{file}.safetensors").counts
        expected = [jaccard(top(a, 4), top(b, 4)) for a, b in zip(counts["nano-math"], other, strict=True)]
        assert [row["jaccard"] for row in numbers if row["profile"] == name] == pytest.approx(expected)
    slices = [RoutingProfile.load(made / f"{file}.safetensors") for file in ("profile", "warmed-up")]
    assert slices[0].num_tokens == slices[1].num_tokens  # the same examples
    assert not torch.equal(slices[0].counts, slices[1].counts)  # by another model
    record = json.loads((made / "run.json").read_text())
    assert record["config"]["rule"] == "all" and record["config"]["epochs"] == 1 and record["config"]["r"] == 8
    assert shown("hellora-figure-3", store).rows[-1][1] == "11 of 16"


def test_a_warm_up_by_other_options_is_not_taken(store: Path):
    for option, then, now in (("learning_rate", "0.008", 0.05), ("r", "8", 4)):
        recipe = direct("hellora-figure-3", Setting("nano", options={**SMALL, option: now}))
        flag = option.replace("_", "-")
        with pytest.raises(HotLoraError, match=f"nano-math-warm-up holds another run: --{flag} {now} against {then}"):
            recipe.run(store, pytest.fail)


def test_the_warm_up_among_the_records_is_of_its_recipe():
    folder = Path(__file__).parent.parent / "results/nano/papers"
    direct("hellora-figure-3", Setting("nano")).run(folder, pytest.fail)


def test_five_layers(store: Path, counts: dict[str, torch.Tensor]):
    numbers = shown("hellora-figure-4", store).numbers
    assert [row["layer"] for row in numbers] == [0, 2, 3, 4, 5]
    for row in numbers:
        layers = {task: values[row["layer"]] for task, values in counts.items()}
        for task, values in layers.items():
            assert row[task] == pytest.approx((values.topk(4).values.sum() / values.sum()).item())
        hot = [top(values, 4) for values in layers.values()]
        pairs = [jaccard(hot[i], hot[j]) for i in range(3) for j in range(i)]
        assert row["jaccard"] == pytest.approx(sum(pairs) / 3)
    assert shown("hellora-figure-6", store).numbers == numbers  # on nano it is the same model


def test_skew(store: Path, counts: dict[str, torch.Tensor]):
    ours, *published = shown("moe-sieve-table-2", store).numbers
    layer_cv = [(c.std(dim=1, correction=0) / c.mean(dim=1)).mean().item() for c in counts.values()]
    sums = [c.sum(dim=0) for c in counts.values()]
    global_cv = [(s.std(correction=0) / s.mean()).item() for s in sums]
    assert ours["layer_cv"] == pytest.approx(statistics.mean(layer_cv))
    assert ours["global_cv"] == pytest.approx(statistics.mean(global_cv))
    assert ours["ratio"] == pytest.approx(statistics.mean(layer_cv) / statistics.mean(global_cv))
    covered = [(c.topk(8, dim=1).values.sum(dim=1) / c.sum(dim=1)).mean().item() for c in counts.values()]
    assert ours["coverage"] == pytest.approx(statistics.mean(covered))
    assert [row["model"] for row in published] == list(MODELS) and published[0]["layer_cv"] == 0.869
    at = shown("moe-sieve-figure-2", store).numbers[0]
    assert at["coverage_with_shared"] == pytest.approx(statistics.mean(covered))  # nano has no shared experts
    ratios = {row["data"]: row["ratio"] for row in shown("moe-sieve-figure-1", store).numbers}
    assert ratios["nano-math"] == pytest.approx(layer_cv[0] / global_cv[0])


def test_layer_by_layer_beside_the_papers(store: Path, counts: dict[str, torch.Tensor]):
    numbers = shown("moe-sieve-table-7", store).numbers
    found = counts["nano-sql"]  # in Spider's place
    assert len(numbers) == 16 and numbers[6]["cv"] is None and numbers[6]["cv_paper"] == 1.42
    for row, values in zip(numbers, found, strict=False):
        assert row["cv"] == pytest.approx((values.std(correction=0) / values.mean()).item())
        assert row["cold_share"] == pytest.approx((values < values.sum() / 64).double().mean().item())


def test_greedy_budgets(store: Path, counts: dict[str, torch.Tensor]):
    result = shown("moe-sieve-table-9", store)
    found = counts["nano-math"]
    shares = found / found.sum(dim=1, keepdim=True)
    order = shares.flatten().argsort(descending=True, stable=True)[: 6 * 8]
    sizes = torch.bincount(order // 32, minlength=6).tolist()
    ours = result.numbers[:6]
    assert [row["greedy_experts"] for row in ours] == sizes and {row["uniform_experts"] for row in ours} == {8}
    for row, values, size in zip(ours, shares, sizes, strict=True):
        assert row["greedy_coverage"] == pytest.approx(100 * values.topk(size).values.sum().item())
        assert row["uniform_coverage"] == pytest.approx(100 * values.topk(8).values.sum().item())
    assert [row["uniform_coverage_paper"] for row in result.numbers] == UNIFORM_COVERAGE
    # The published means, which nothing types here.
    assert result.rows[-1][-4:] == ["16", "56.7", "16", "56.8"]


def test_overlap_and_stability(store: Path, counts: dict[str, torch.Tensor]):
    pairs = {(row["a"], row["b"]): row["jaccard"] for row in shown("moe-sieve-figure-3", store).numbers}
    a, b = counts["nano-math"], counts["nano-sql"]
    expected = statistics.mean(jaccard(top(x, 8), top(y, 8)) for x, y in zip(a, b, strict=True))
    assert len(pairs) == 3 and pairs["nano-math", "nano-sql"] == pytest.approx(expected)
    rows = shown("moe-sieve-figure-6", store).numbers
    assert [row["examples"] for row in rows] == [70] * 3
    assert all(0.3 < row["min"] <= row["mean"] <= row["max"] <= 1 for row in rows)
    assert shown("moe-sieve-figure-6", store).rows[-1][1] == "mean of 3"


def test_files_of_the_papers_data_come_before_nanos_tasks(store: Path, tmp_path: Path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(12)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = Setting("nano", {"gsm8k": str(file)})
    for name in ("moe-sieve-table-9", "hellora-figure-1"):
        recipe = direct(name, setting)
        assert [folder.name for _, folder, _ in recipe.state(tmp_path)] == ["gsm8k"]
    recipe = direct("moe-sieve-table-9", setting)
    recipe.run(tmp_path, print)
    assert "nano on gsm8k" in shown("moe-sieve-table-9", tmp_path).notes[0]  # a reader need not know the files
    profile = RoutingProfile.load(tmp_path / "profiles" / "nano" / "gsm8k")
    assert profile.source["examples"] == 12
    again = Setting("nano", {"gsm8k": str(tmp_path / "other.jsonl")})
    with pytest.raises(HotLoraError, match=r"holds a profile with data 'gsm8k:.*train.jsonl', and 'gsm8k:.*other"):
        direct("moe-sieve-table-9", again).run(tmp_path, print)
    with pytest.raises(HotLoraError, match="holds a profile with limit 2000, and 5 is asked for"):
        direct("moe-sieve-table-9", Setting("nano", {"gsm8k": str(file)}, options={"limit": 5})).run(tmp_path, print)


def test_only_what_is_there_is_shown(tmp_path: Path, store: Path):
    """Of the papers' models: a model without a profile is told, and none at all is no result."""
    assert shown("moe-sieve-figure-5", store).notes == ["nano"]
    setting = Setting()
    assert direct("moe-sieve-table-2", setting).result(store) is None
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "OLMoE-1B-7B-0924").symlink_to(store / "profiles" / "nano")
    assert direct("hellora-figure-4", setting).result(tmp_path) is None  # nano's tasks stand for nothing there
    (tmp_path / "profiles" / "OLMoE-1B-7B-0924").unlink()
    (tmp_path / "profiles" / "OLMoE-1B-7B-0924").mkdir()
    (tmp_path / "profiles" / "OLMoE-1B-7B-0924" / "spider").symlink_to(store / "profiles" / "nano" / "nano-sql")
    found = shown("moe-sieve-table-2", tmp_path, setting)
    assert found.rows[0][0] == "OLMoE-1B-7B-0924 (here)" and len(found.notes) == 1 + 2 * 10 - 1
    assert "allenai/OLMoE-1B-7B-0924 on gsm8k: no profile." in found.notes


def test_options_that_do_not_exist():
    for name, wrong in (("moe-sieve-table-2", "learning_rate"), ("moe-sieve-table-4", "limit")):
        with pytest.raises(HotLoraError, match=f"{name} has no option '{wrong}': --set takes .*dtype"):
            find_recipe(name, Setting("nano", options={wrong: 1}))
    find_recipe("hellora-figure-3", Setting("nano", options={"learning_rate": 1e-3}))
    for length in ("max_steps", "epochs"):  # the warm-up has a length of its own
        with pytest.raises(HotLoraError, match=f"hellora-figure-3 has no option '{length}'"):
            find_recipe("hellora-figure-3", Setting("nano", options={length: 1}))


# --- configs ----------------------------------------------------------------------------------------------------


def test_hyperparameters_are_read_off_what_is_trained():
    rows = {row[0]: row[1:] for row in shown("hellora-table-1", Path(), Setting()).rows}
    assert rows["adapter rank"] == ["32", "32"] and rows["seeds"] == ["10", "10"]
    assert rows["learning rate, code"][1].startswith("0.0002 for FFT") and rows["scaling α"][1] == "64"
    assert [rows[f"epochs, {domain}"][1] for domain in ("math", "code", "safety")] == ["3", "2", "1"]
    changed = {row[0]: row[2] for row in shown("hellora-table-1", Path(), Setting(options={"r": 4})).rows}
    assert changed["adapter rank"] == "4"
    nano = {row[0]: row[2] for row in shown("hellora-table-1", Path(), Setting("nano")).rows}
    assert nano["steps, math"] == "60" and nano["seeds"] == "3"


def test_the_published_shapes_come_from_configs(tmp_path: Path):
    from transformers import OlmoeConfig, Qwen2MoeConfig

    models = {
        "OLMoE-1B-7B": OlmoeConfig(intermediate_size=1024),
        "Qwen1.5-MoE-A2.7B": Qwen2MoeConfig(
            hidden_size=2048, num_hidden_layers=24, num_experts=60, num_experts_per_tok=4, intermediate_size=5632,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        ),
    }  # fmt: skip
    for name, config in models.items():
        config.save_pretrained(tmp_path / name)
        recipe = direct("moe-sieve-table-1", Setting(str(tmp_path / name)))
        recipe.run(tmp_path / "store", print)
        rows = {row[0]: row[1:] for row in recipe.result(tmp_path / "store").rows}
        assert rows[f"{name} (here)"] == rows[f"{name} (paper)"]


def test_models_of_one_name_do_not_share_what_a_store_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import OlmoeConfig

    store = tmp_path / "store"
    for owner, layers in (("a", 2), ("b", 3)):
        config = OlmoeConfig(num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
        config.save_pretrained(tmp_path / owner / "x")
    first, second = (Setting(str(tmp_path / owner / "x"), options={}) for owner in "ab")
    direct("moe-sieve-table-1", first).run(store, print)
    assert shown("moe-sieve-table-1", store, first).numbers[0]["layers"] == 2
    with pytest.raises(
        HotLoraError, match=r"x\.json holds the shape of .*a/x, and .*b/x is asked for: delete the file"
    ):
        direct("moe-sieve-table-1", second).run(store, pytest.fail)
    assert direct("moe-sieve-table-1", second).result(store) is None
    made = {"version": 1, "kind": "bench", "settings": {}, "recipe": {"model": first.model}, "contenders": []}
    write_json(store / "benches/x/moe-sieve.json", made)
    with pytest.raises(HotLoraError, match=r"moe-sieve\.json holds a bench of .*a/x, and .*b/x is asked for"):
        direct("moe-sieve-table-4", second).run(store, pytest.fail)
    assert direct("moe-sieve-table-4", second).result(store) is None


def test_a_config_is_called_by_its_folder(tmp_path: Path):
    for name in ("olmoe", "mixtral"):
        tiny_config(name).save_pretrained(tmp_path / name)
        setting = Setting(str(tmp_path / name / "config.json"))
        direct("moe-sieve-table-1", setting).run(tmp_path / "store", print)
        assert shown("moe-sieve-table-1", tmp_path / "store", setting).rows[0][0] == f"{name} (here)"
    assert {file.stem for file in (tmp_path / "store/configs").iterdir()} == {"olmoe", "mixtral"}


# --- benches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path: Path) -> str:
    tiny_config("olmoe").save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def in_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders in this process, which saves the start of others."""

    class InHere:
        def __init__(self, config, contender):
            self.contender, self.worker = contender, Worker(config, contender)

        def ask(self, what, *args):
            return getattr(self.worker, what)(*args)

        def end(self):
            pass

    monkeypatch.setattr(bench, "_Process", InHere)
    monkeypatch.setattr(worker, "matrix_rate", lambda dtype, device: 1e9)


def test_throughput(tiny_folder: str, tmp_path: Path, in_here: None):
    setting = Setting(tiny_folder, options=TIMED)
    table, figure = direct("hellora-table-6", setting), direct("hellora-figure-5", setting)
    assert isinstance(table, BenchRecipe) and isinstance(figure, BenchRecipe)
    assert sum(map(len, table.benches.values())) == 3 * 6 + 1 and set(figure.benches["hellora-full"]) >= {"fft"}
    few = {
        name: [kind for kind in kinds if kind.startswith(("lora", "hellori-d", "fft"))]
        for name, kinds in table.benches.items()
    }
    table = dataclasses.replace(table, benches=few)
    figure = dataclasses.replace(figure, benches={"hellora-full": few["hellora-full"]})
    figure.run(tmp_path, print)
    assert [state for *_, state in table.state(tmp_path)] == ["new", "new", "done"]  # both need it
    half = table.result(tmp_path)
    assert half is not None and f"{tiny_folder}, hellora-pure: no bench." in half.notes
    table.run(tmp_path, print)
    found = table.result(tmp_path)
    assert found is not None and len(found.numbers) == 18
    benches = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "benches" / "tiny").glob("*.json")}
    for number in found.numbers:
        method, placement = str(number["method"]), str(number["placement"])
        place = ("pure", "gate", "full").index(placement)
        assert number["published_samples_per_second"] == THROUGHPUT[method][place]
        if method not in ("lora", "hellori-d"):
            assert number["over_lora"] is None
            continue
        end = "" if placement == "full" else f"-{placement}"
        rows = {row["name"]: row for row in benches[f"hellora-{placement}"]["contenders"]}
        mine, lora = (rows[f"{name}{end}"]["seconds"]["step"]["all"] for name in (method, "lora"))
        assert number["over_lora"] == pytest.approx(statistics.median(b / a for a, b in zip(mine, lora, strict=True)))
    trained = parameters_from_config(tiny_folder, r=4, experts_per_layer="top_k", train_a=False)["trainable"]
    (line,) = [row for row in found.rows if row[0] == "HELLoRI-D"]
    assert line[1] == f"{trained:,}"
    result = figure.result(tmp_path)
    assert result is not None and [row[0] for row in result.rows][:2] == ["FFT", "LoRA"] and result.figures
    assert result.numbers[1]["over_lora"] == 1 and result.numbers[0]["over_fft"] == 1
    before = (tmp_path / "benches" / "tiny" / "hellora-full.json").read_bytes()
    figure.run(tmp_path, pytest.fail)  # what is there is not timed again
    assert (tmp_path / "benches" / "tiny" / "hellora-full.json").read_bytes() == before


def test_costs(tiny_folder: str, tmp_path: Path, in_here: None):
    """Parameters and checkpoints come from the config, the published ones from OLMoE's."""
    from transformers import OlmoeConfig

    OlmoeConfig(intermediate_size=1024).save_pretrained(tmp_path / "olmoe")
    recipe = direct("moe-sieve-table-4", Setting(tiny_folder, options=TIMED))
    assert isinstance(recipe, BenchRecipe)
    counts = recipe.counts(str(tmp_path / "olmoe"), ["lora", "sieve"], 32)
    assert counts == {"lora": 311_459_840, "sieve": 84_967_424}
    recipe.run(tmp_path, print)
    result = shown("moe-sieve-table-4", tmp_path, Setting(tiny_folder))
    ours, published, qwen = result.numbers
    assert (published["bytes_saved"], qwen["bytes_saved"]) == (0.734, 0.71)  # as printed
    assert ["73.4%", "71.0%"] == [row[4] for row in result.rows[1:]]
    assert ours["parameters_all"] == parameters_from_config(tiny_folder, r=4)["trainable"]
    assert ours["bytes_hot"] == 4 * parameters_from_config(tiny_folder, r=4, fraction=0.25)["trainable"]
    assert ours["parameters_saved"] == pytest.approx(1 - ours["bytes_hot"] / ours["bytes_all"])
    for (kind, side), value in {("lora", "all"): 311_459_840, ("sieve", "hot"): 84_967_424}.items():
        assert published[f"parameters_{side}"] == pytest.approx(value, rel=0.001), kind
        assert published[f"bytes_{side}"] == pytest.approx(4 * value, rel=0.005)
    assert published["seconds_saved"] == 0.5 and ours["seconds_all"] > 0
    assert "layers" not in result.notes[0]
    cut = Setting(tiny_folder, options={**TIMED, "layers": 1})
    direct("moe-sieve-table-4", cut).run(tmp_path / "cut", print)
    words = "its first 1 of 2 layers (parameters are counted of all)"
    assert words in shown("moe-sieve-table-4", tmp_path / "cut", cut).notes[0]


def test_a_bench_by_other_options_is_not_taken(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[object] = []

    def run_bench(config, *, tell):
        made.append(config)
        resolved = dataclasses.asdict(dataclasses.replace(config, device="cpu", dtype="float32", layers=2, length=16))
        return {"version": 1, "kind": "bench", "settings": resolved, "contenders": []}

    monkeypatch.setattr(benches, "run_bench", run_bench)
    recipe = direct("moe-sieve-table-4", Setting(tiny_folder, options={"rounds": 3, "tokens": 32, "length": 16}))
    recipe.run(tmp_path, print)
    for options, says in (
        ({"rounds": 50, "tokens": 32}, "rounds 3, and 50 is asked for: delete the file, or give another --output"),
        ({"rounds": 3}, "tokens 32, and 8192 is asked for"),
        ({"rounds": 3, "tokens": 32, "layers": 1}, "layers 2, and 1 is asked for"),
        ({"rounds": 3, "tokens": 32, "dtype": "float16"}, "dtype 'float32', and 'float16' is asked for"),
    ):
        with pytest.raises(HotLoraError, match=f"benches/tiny/moe-sieve.json holds a bench with {says}"):
            direct("moe-sieve-table-4", Setting(tiny_folder, options={"length": 16, **options})).run(tmp_path, print)
    recipe.run(tmp_path, pytest.fail)
    assert len(made) == 1


@pytest.mark.slow
def test_a_bench_of_real_processes(tiny_folder: str, tmp_path: Path):
    code, text = call(
        "moe-sieve-table-4", "--model", tiny_folder, "-o", tmp_path, "--set", "tokens=32", "--set", "rounds=2",
        "--set", "r=4", "--set", "length=16",
    )  # fmt: skip
    assert code == 0 and "tiny (here)" in text and "round 2 of 2" in text
    assert (tmp_path / "tables" / "moe-sieve-table-4.tex").is_file()


# --- what it needs ----------------------------------------------------------------------------------------------


def test_needs_of_trainings(tiny_folder: str, tmp_path: Path):
    """FLOPs and memory as `flops` and `estimate` have them, for the runs that the sweep makes."""
    rows = [{"question": "1" * 300, "answer": f"{i}\n#### {i}"} for i in range(10)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"batch_size": 2, "max_length": 64, "r": 4, "learning_rate": 1e-4, "profile_fraction": 0.5}
    setting = Setting(tiny_folder, {"gsm8k": str(file)}, seeds=3, options=options)
    recipe = RECIPES["moe-sieve-section-7.3"](setting)
    assert isinstance(recipe, Recipe)
    lines = sweep_needs(recipe.sweep(), tflops=1e-8)
    assert lines[0] == "12 runs and 1 shared profile" and lines[1] == f"data: gsm8k:{file}"
    total = estimate(tiny_folder, batch_size=2, max_length=64, r=4)["memory"]["total"]
    assert f"at most {total / 1e9:,.1f} GB (tiny/gsm8k/sieve-all: a step of 2 × 64 tokens" in lines[2]
    examples, tokens = data_size(f"gsm8k:{file}", tiny_folder, None, 64)
    assert (examples, tokens) == (10, 640)  # cut
    meta = meta_model(sized_config(tiny_folder))
    forward, least = forward_flops(meta, 64), 0.0
    profiled = 0.5 * tokens * sum(forward.values())
    base = 2 * sum(forward.values()) + forward["scores"] + 3 * attention_adapter_flops(meta, 4)
    least = 4 * 3 * 3 * tokens * base + profiled  # conditions, seeds, epochs
    most = 4 * 3 * 3 * tokens * (base + 3 * expert_adapter_flops(meta, 4, {0: 1.0, 1: 1.0})) + profiled
    told = re.search(r"([\d.e+]+) FLOP of training and profiling, ([\d.,]+) hours at 1e-08 TFLOP/s", lines[3])
    assert told and least * 0.99 < float(told[1]) < most
    assert float(told[2].replace(",", "")) == pytest.approx(float(told[1]) / 1e4 / 3600, rel=0.06)
    assert lines[3].endswith("scoring is not counted")
    other = tmp_path / "other"
    tiny_config("mixtral").save_pretrained(other)
    both = dataclasses.replace(
        recipe.sweep(),
        conditions=[
            Condition(f"{i}{c.name}", {**c.options, "model": model})
            for i, model in enumerate((tiny_folder, str(other))) for c in recipe.sweep().conditions
        ],
    )  # fmt: skip
    assert sweep_needs(both, tflops=1e-8)[3].endswith(lines[3])  # what the other model needs is not in it
    away = sweep_needs(RECIPES["moe-sieve-section-7.3"](Setting(tiny_folder, seeds=3, options=options)).sweep())
    assert away[1] == "data from the Hub: gsm8k (or --data TASK=FILES)"
    assert "hours of training and profiling unknown: the data is not here" in away[3]


def test_needs_reads_own_rows_as_the_runs_do(tiny_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """By their own names of fields, and by the model's chat template: nothing that the runs read is told as unread."""
    table, chat = tmp_path / "rows.csv", tmp_path / "chat.jsonl"
    table.write_text("ask,reply\n1 + 1?,2\n2 + 2?,4\n")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chat.write_text(json.dumps({"messages": turns, "tools": [{"type": "function", "function": {"name": "a"}}]}) + "\n")
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    template = "{% if tools %}tools{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    conditions = [
        Condition("table", {"data": str(table), "columns": "prompt=ask,completion=reply"}),
        Condition("chat", {"data": str(chat)}),
    ]
    lines = sweep_needs(Sweep("own", str(model), str(chat), conditions, range(1)), tflops=1e-8)
    assert "FLOP of training and profiling" in lines[3] and "unknown" not in lines[3]
    assert "nothing reads" not in caplog.text


def test_needs_names_the_data_that_only_the_user_has(tiny_folder: str, tmp_path: Path):
    """What is trained on and what is scored, with the options that bring it; before anything starts."""
    words = ("hellora-table-2", "--model", tiny_folder, "-o", tmp_path / "runs", "--dry-run")
    code, text = call(*words)
    assert code == 0 and not (tmp_path / "runs").exists()
    hub = "data from the Hub: codealpaca-lori, gsm8k-lori, humaneval-lori (or --data TASK=FILES)"
    told = "data that is on no Hub: hexphi-lori, saferpaca-lori; give --data hexphi=FILES --data saferpaca=FILES"
    assert f"  {hub}; {told}\n" in text
    for name in ("hexphi", "saferpaca"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}]))
        words += ("--data", f"{name}={tmp_path / name}.json")
        with pytest.raises(DataError):
            load_examples(f"{name}-lori", "test" if name == "hexphi" else "train")
    code, text = call(*words)
    assert code == 0, text
    assert f"data: hexphi-lori:{tmp_path}/hexphi.json, saferpaca-lori:{tmp_path}/saferpaca.json; {hub}\n" in text
    setting = Setting(tiny_folder, options={"learning_rate": 1e-4})
    lines = sweep_needs(RECIPES["moe-sieve-table-3"](setting).sweep())
    assert lines[1].endswith("data that is on no Hub: spider; give --data spider=FILES")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.needs_files])
def test_a_task_that_needs_files_says_so_itself(name: str):
    task = TASKS[name]
    with pytest.raises(DataError, match=f"(?s)give .*{name}:"):
        task.load(task.splits[-1], None, None, 0)


def test_needs_without_a_network(monkeypatch: pytest.MonkeyPatch):
    """One line, at once."""

    monkeypatch.setattr(connection, "_why", lambda endpoint: "Name or service not known")
    line = r"'a/b' is no folder here, and the Hub cannot be reached \(Name or service not known\): check"
    with pytest.raises(ModelError, match=line):
        config_file("a/b")
    for name in ("hellora-table-2", "hellora-figure-4", "hellora-figure-5", "moe-sieve-table-1"):
        recipe = RECIPES[name](Setting("a/b"))
        lines = sweep_needs(recipe.sweep()) if isinstance(recipe, Recipe) else recipe.needs()
        assert [text for text in lines if re.search(line, text)] and not any("\n" in text for text in lines)


def test_needs_of_nano(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(needs, "matrix_rate", lambda dtype, device: 1e12)
    lines = direct("hellora-figure-3").needs()
    assert lines[0] == "1 pass without gradients" and lines[1] == "data: nano-math"
    assert "0.02 GB of weights" in lines[2] and "at 0.3 TFLOP/s (30% of what a matrix product gets here" in lines[3]
    assert "warm-up" in lines[4]
    lines = direct("hellora-figure-5", Setting("nano")).needs()
    assert "an idle machine" in lines[1] and "LoRA on all experts" in lines[2] and "full fine-tuning" in lines[3]


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_makes_and_shows(store: Path, tmp_path: Path):
    words = ("moe-sieve-table-2", "--model", "nano", "--set", "limit=70", "--set", "batch_size=16", "-o", store)
    code, text = call(*words, "--dry-run", "--tflops", "2")
    assert code == 0 and "at 2 TFLOP/s (as given)" in text and text.count("│ done") == 3
    assert not (store / "tables").exists()
    code, text = call(*words)
    assert code == 0 and "nano (here)" in text and "files: " in text and "profiling nano" not in text
    assert (store / "tables" / "moe-sieve-table-2.csv").is_file()
    code, text = call("moe-sieve-table-2", "--model", "nano", "--set", "nonsense=1", "-o", tmp_path)
    assert code != 0 and not list(tmp_path.iterdir())
    code, text = call("moe-sieve-table-3", "--model", "nano", "--dry-run", "-o", tmp_path / "none")
    assert code == 0 and "FLOP of training and profiling" in text and "│ new" in text


def test_a_broken_study_is_told(tmp_path: Path):
    write_json(tmp_path / "profiles" / "nano" / "nano-sql" / "study.json", {"format": "other"})
    with pytest.raises(FileError, match="is no study of version 1"):
        direct("moe-sieve-table-7").result(tmp_path)
