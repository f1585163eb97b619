import pytest

from hotlora.base.errors import HotLoraError
from hotlora.hf.models import NANOS
from hotlora.papers import RECIPES, Direct, Recipe, Setting, find_recipe, names
from hotlora.papers.recipe import across_name, condition_name, scored_name
from hotlora.papers.studies import STUDIES
from hotlora.runs.sweep import Sweep, sweep_jobs
from hotlora.runs.worker_pool import Job


def jobs_of(sweep: Sweep, tmp_path) -> list[Job]:
    return sweep_jobs(sweep, tmp_path)


def trainings() -> dict[str, Recipe]:
    """nano's, by name."""
    made = {name: make(Setting("nano")) for name, make in RECIPES.items()}
    return {name: recipe for name, recipe in made.items() if isinstance(recipe, Recipe)}


def test_every_table_and_figure_of_both_papers_has_a_recipe():
    """HELLoRA's figure 2 is a drawing of the method; MoE-Sieve has experiments in sections, without a table,
    and one is ours."""
    hellora = {f"hellora-table-{n}" for n in range(1, 9)} | {f"hellora-figure-{n}" for n in (1, 3, 4, 5, 6)}
    sieve = {f"moe-sieve-table-{n}" for n in range(1, 11)} | {f"moe-sieve-figure-{n}" for n in range(1, 7)}
    ours = {"moe-sieve-experts-alone"}
    assert {name for name in RECIPES if "section" not in name} == hellora | sieve | ours


@pytest.mark.parametrize("model", [None, "nano", "nano-qwen", "some/other-moe"])
@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(trainings())))
def test_every_recipe_without_trainings_can_be_built(name: str, model: str | None, tmp_path):
    recipe = find_recipe(name, Setting(model))
    assert isinstance(recipe, Direct) and recipe.name == name and recipe.title
    assert recipe.where.split(",")[0] == ("HELLoRA" if name.startswith("hellora") else "MoE-Sieve")
    made = recipe.state(tmp_path)
    assert {state for *_, state in made} <= {"new"} and len({folder for _, folder, _ in made}) == len(made)
    for what, folder, _ in made:
        assert folder.is_relative_to(tmp_path) and (model is None or model in what or what == "warm-up")
    assert (recipe.result(tmp_path) is None) == bool(made)  # what is made of nothing is there at once


@pytest.mark.parametrize("model", [None, "nano", "nano-qwen", "some/other-moe"])
@pytest.mark.parametrize("name", [*trainings(), *STUDIES])
def test_every_recipe_can_be_built(name: str, model: str | None, tmp_path):
    if name not in RECIPES:
        assert jobs_of(find_recipe(name), tmp_path) and set(names()) == {*RECIPES, *STUDIES}
        return
    setting = Setting(model)
    recipe, sweep = RECIPES[name](setting), find_recipe(name, setting)
    assert isinstance(recipe, Recipe)
    jobs = jobs_of(sweep, tmp_path)
    found = {job.name for job in jobs}
    for row in recipe.rows:
        for column in recipe.columns:
            if not row.only or column.name in row.only:
                assert {condition_name(row, column), scored_name(row, column)} <= found
                assert {key.split()[-1] for key in row.published} <= {"GSM8K", "HUMAN", "SAFE", "Spider", "HellaSwag"}
                others = [o for o in recipe.columns if o.name != column.name] if recipe.across and row.method else []
                assert {across_name(row, column, other) for other in others} <= found
    models = {column.model for column in recipe.columns}
    assert models == {model} if model else all("/" in name for name in models)
    assert len(sweep.seeds) == ((3 if name.startswith("hellora") else 8) if model in NANOS else len(sweep.seeds))


def test_a_task_has_options_of_its_own():
    given = {"nano-choice.max_steps": 500, "max_steps": 150, "r": 4}
    sweep = find_recipe("hellora-table-2", Setting("nano", options=given))
    options = [sweep.options_of(condition) for condition in sweep.conditions]
    found = {(o["data"], o["max_steps"], o["r"]) for o in options if "max_steps" in o}
    assert found == {("nano-math", 150, 4), ("nano-sql", 150, 4), ("nano-choice", 500, 4)}
    with pytest.raises(HotLoraError, match=r"has no runs on nano-chess, .* it has nano-math, nano-sql, nano-choice"):
        find_recipe("hellora-table-2", Setting("nano", options={"nano-chess.max_steps": 500}))


def test_options_of_every_run_are_those_of_runs_that_only_score_too():
    given = {"dtype": "float16", "device": "cpu", "test_limit": 7, "eval_batch_size": 3, "quantize": 4, "max_steps": 5}
    for setting in (Setting("nano", options=given), Setting("some/moe", options=given)):
        for name in ("hellora-table-7", "hellora-table-8"):
            sweep = find_recipe(name, setting)
            for condition in sweep.conditions:
                found = condition.options
                told = {"dtype": "float16", "device": "cpu", "test_limit": 7, "eval_batch_size": 3}
                assert {option: found.get(option) for option in told} == told, condition.name
                assert found.get("quantize") == (None if condition.scores else 4), "adapters bring their base's"
                assert ("max_steps" in found) == (condition.train and condition.scores is None)
    sweep = find_recipe("hellora-table-8", Setting("nano", options={"nano-sql.test_limit": 9}))
    limits = {
        condition.name: condition.options.get("test_limit") for condition in sweep.conditions if not condition.train
    }
    assert limits == {"nano/nano-math/base": None, "nano/nano-sql/base": 9, "nano/nano-choice/base": None}
    across = {condition.name: condition.options.get("test_limit") for condition in sweep.conditions if condition.scores}
    assert {name for name, limit in across.items() if limit == 9} == {
        "nano/nano-math/hellora-on-nano-sql", "nano/nano-choice/hellora-on-nano-sql",
    }  # fmt: skip


def test_how_answers_are_drawn_is_an_option_where_runs_only_score():
    setting = Setting("some/moe", options={"codealpaca-lori.samples": 5})
    sweep = find_recipe("hellora-table-2", setting)
    found = {condition.name: condition.options.get("samples") for condition in sweep.conditions}
    drawn = {name for name, samples in found.items() if samples}
    assert drawn == {name for name in found if name.endswith("-scored") and "code" in name} | {
        "moe/codealpaca-lori/base"
    }
    assert {found[name] for name in drawn} == {5}
    for wrong, options in ((Setting("nano"), {"temperature": 0.9}), (Setting(), {"gsm8k-lori.samples": 5})):
        with pytest.raises(HotLoraError, match=r"--set does not take .*: on (nano-math|gsm8k).* greedily"):
            find_recipe("hellora-table-2", Setting(wrong.model, options=options))


def test_a_task_is_called_as_data_has_it():
    for given in ("gsm8k.max_steps", "gsm8k-lori.max_steps"):
        sweep = find_recipe("hellora-table-2", Setting(options={given: 300}))
        steps = {(c.options["data"], c.options.get("max_steps")) for c in sweep.conditions if c.train and not c.scores}
        assert steps == {("gsm8k-lori", 300), ("codealpaca-lori", None), ("saferpaca-lori", None)}
    with pytest.raises(HotLoraError, match=r"gsm8k\.max_steps and gsm8k-lori\.max_steps are one option"):
        Setting(options={"gsm8k.max_steps": 1, "gsm8k-lori.max_steps": 2})
    with pytest.raises(HotLoraError, match="whose options are set: it has gsm8k, codealpaca, saferpaca"):
        find_recipe("hellora-table-2", Setting(options={"spider.max_steps": 1}))


def test_a_condition_that_two_recipes_share_is_the_same_run():
    runs: dict[str, dict] = {}
    for recipe in trainings().values():
        sweep = recipe.sweep()
        for condition in sweep.conditions:
            options = sweep.options_of(condition)
            assert runs.setdefault(condition.name, options) == options, condition.name
    assert len(runs) > 60


def test_hyperparameters_are_the_papers_and_a_users_come_first():
    sweep = find_recipe("hellora-table-2")
    options = {condition.name: condition.options for condition in sweep.conditions}
    assert options["OLMoE-1B-7B-0924/codealpaca-lori/hellora"]["preset"] == "hellora-code"
    assert options["OLMoE-1B-7B-0924/codealpaca-lori/hellora-scored"]["samples"] == 20
    assert len(sweep.seeds) == 10
    sweep = find_recipe("moe-sieve-table-3", Setting(seeds=2, options={"epochs": 1}))
    first = sweep.conditions[0].options
    assert (first["epochs"], first["batch_size"], first["learning_rate"]) == (1, 8, 4e-4)
    assert sweep.seeds == [42, 99]
    assert {first[name] for name in ("train_on", "lr_scheduler", "max_length")} == {"all", "linear", 2048}
    limits = {condition.options["data"]: condition.options.get("limit") for condition in sweep.conditions}
    assert limits == {"spider": None, "gsm8k": None, "hellaswag": 7500}
    assert find_recipe("moe-sieve-table-3", Setting(seeds=10)).seeds[7:] == [6969, 0, 1]
    assert find_recipe("moe-sieve-table-3", Setting("nano")).seeds == list(range(8))
    nano = find_recipe("moe-sieve-table-3", Setting("nano")).conditions[0].options
    assert nano["limit"] == 2000 and "train_on" not in nano
    assert {condition.options["model"] for condition in sweep.conditions} == {
        "allenai/OLMoE-1B-7B-0924", "Qwen/Qwen1.5-MoE-A2.7B",
    }  # fmt: skip


def test_what_the_papers_print_is_beside_its_own_model_and_task():
    recipe = RECIPES["moe-sieve-table-3"](Setting())
    every, hot = recipe.rows
    assert [every.published[column.name] for column in recipe.columns] == [39.6, 30.4, 80.5, 52.0, 59.0, 88.5]
    assert hot.published["Qwen HellaSwag"] == 89.3 and hot.published["HellaSwag"] == 80.7
    for name, heads in (
        ("hellora-table-2", {"trained, %"}),
        ("hellora-table-7", {"trained, %", "samples/s"}),
        ("moe-sieve-section-6.1", {"sd"}),
        ("moe-sieve-table-10", {"sd, HellaSwag", "sd, Spider"}),
    ):
        assert {head for row in RECIPES[name](Setting()).rows for head in row.printed} == heads, name


def test_local_files_stand_for_a_task():
    sweep = find_recipe("hellora-table-4", Setting(sources={"gsm8k": "/data/gsm8k"}))
    assert {condition.options["data"] for condition in sweep.conditions} == {"gsm8k-lori:/data/gsm8k"}
    assert {condition.name.split("/")[1] for condition in sweep.conditions} == {"gsm8k-lori"}


@pytest.mark.parametrize(
    ("name", "model", "sources", "says"),
    [
        ("hellora-table-4", None, ["gsm8kk"], "--data gsm8kk changes nothing in hellora-table-4: it takes gsm8k"),
        (
            "hellora-table-2",
            None,
            ["hexphi", "spider"],
            "--data spider changes .* codealpaca, gsm8k, hexphi, humaneval, ",
        ),
        ("hellora-table-4", None, ["gsm8k", "gsm8k-lori"], "--data gsm8k changes nothing"),
        ("hellora-table-4", "nano", ["gsm8k"], "--data gsm8k changes nothing .* it reads no files: leave it out"),
        ("moe-sieve-table-4", "nano", ["gsm8k"], "it reads no files: leave it out"),
        ("moe-sieve-table-1", None, ["gsm8k"], "it reads no files: leave it out"),
        ("hellora-table-1", None, ["gsm8k"], "it reads no files: leave it out"),
        ("moe-sieve-table-2", "nano", ["spider"], "on nano it takes all of .*gsm8k.*, or none"),
        ("hellora-figure-3", None, ["spider"], "--data spider changes nothing in hellora-figure-3: it takes gsm8k"),
    ],
)
def test_files_of_a_task_that_is_not_read_are_refused(name: str, model: str | None, sources: list[str], says: str):
    with pytest.raises(HotLoraError, match=says):
        find_recipe(name, Setting(model, dict.fromkeys(sources, "/data")))


WRONG = {
    "model": "--set does not take model: give --model MODEL in its place",
    "nano-math.model": "--set does not take nano-math.model: give --model MODEL",
    "data": "--set does not take data: give --data TASK=FILES",
    "output_dir": "--set does not take output_dir: give --output FOLDER",
    "seed": "--set does not take seed: give --seeds NUMBER",
    "seeds": "--set does not take seeds: give --seeds NUMBER",
    "method": "the rows of NAME say that themselves.*sweep of your own",
    "preset": "the rows of NAME say that themselves",
    "rule": "the rows of NAME say that themselves",
    "plan": "the rows of NAME say that themselves",
    "condition": "the rows of NAME say that themselves",
    "full": "the rows of NAME say that themselves",
    "extend": "a recipe's runs are not trained on. Give max_steps or epochs, and another --output",
    ".max_steps": r"--set \.max_steps names no option: give it as in --set max_steps=300, or .* --set gsm8k\.max_steps",
    "nano-math.": r"--set nano-math\. names no option",
}


@pytest.mark.parametrize("given", WRONG)
def test_set_takes_no_option_that_a_recipe_or_another_flag_says(given: str):
    for name in ("hellora-table-2", "hellora-table-1"):
        with pytest.raises(HotLoraError, match=WRONG[given].replace("NAME", "hellora-table-2")):
            find_recipe(name, Setting("nano", options={given: 1}))


def test_set_takes_no_option_in_which_rows_differ():
    for name, option in (
        ("hellora-table-5", "placement"), ("hellora-table-7", "fraction"), ("hellora-table-7", "experts_per_layer"),
        ("moe-sieve-section-6.2", "p"), ("hellora-table-2", "train_a"), ("hellora-table-3", "train_a"),
        ("hellora-table-2", "keep"), ("hellora-table-2", "use_dora"), ("hellora-table-5", "train_attention"),
        ("hellora-table-5", "train_router"), ("moe-sieve-experts-alone", "train_attention"),
        ("moe-sieve-table-3", "experts_per_layer"), ("hellora-table-2", "experts_per_layer"),
        ("moe-sieve-table-3", "fraction"), ("hellora-table-3", "p"),
    ):  # fmt: skip
        with pytest.raises(HotLoraError, match=f"--set does not take {option}: the rows of {name} say"):
            find_recipe(name, Setting("nano", options={option: 1}))
    find_recipe("hellora-table-4", Setting("nano", options={"placement": "pure"}))
    find_recipe("moe-sieve-table-3", Setting("nano", options={"lora_dropout": 0.1, "train_attention": False}))
    sweep = find_recipe("hellora-table-5", Setting("nano", options={"fraction": 0.5}))
    assert {sweep.resolved(condition).fraction for condition in sweep.conditions} == {0.5}


def test_set_takes_an_option_once_by_any_of_its_names():
    sweep = find_recipe("moe-sieve-table-3", Setting(options={"num_train_epochs": 1, "hellaswag.num_train_epochs": 2}))
    found = {(sweep.resolved(condition).data, sweep.resolved(condition).epochs) for condition in sweep.conditions}
    assert found == {("gsm8k", 1), ("spider", 1), ("hellaswag", 2)}
    for pair in (("epochs", "num_train_epochs"), ("gsm8k.num_train_epochs", "gsm8k.epochs")):
        with pytest.raises(HotLoraError, match=f"{pair[0]} and {pair[1]} are one option"):
            find_recipe("moe-sieve-table-3", Setting(options=dict.fromkeys(pair, 1)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"test_limit": 0}, "test_limit = 0 is out of range"),
        ({"quantize": 5}, "quantize = 5 is out of range"),
        ({"signal": "nope"}, "signal 'nope' does not exist"),
        ({"dense_learning_rate": 0.1}, "/lora: dense_learning_rate, granularity and fresh_a are of LoRI's sparse run"),
    ],
)
def test_wrong_values_are_told_before_anything_runs(options: dict, says: str):
    """On a paper's model and data that are not here, too."""
    for setting in (Setting("nano", options=options), Setting(options=options)):
        with pytest.raises(HotLoraError, match=says):
            find_recipe("hellora-table-3", setting)


def test_the_unknown_is_named():
    with pytest.raises(HotLoraError, match=r"no-such-recipe is no Python file and no recipe.*hellora-table-2"):
        find_recipe("no-such-recipe")
    with pytest.raises(HotLoraError, match="hellora-figure-3 trains nothing, and has no seeds"):
        find_recipe("hellora-figure-3", Setting(seeds=2))
    with pytest.raises(HotLoraError, match="says itself what it runs"):
        find_recipe("auto_k", Setting("nano"))
