import pytest

from hotlora.crew import Job
from hotlora.errors import HotLoraError
from hotlora.recipes import RECIPES, Setting, find_sweep, names
from hotlora.recipes.recipe import across_name, condition_name, scored_name
from hotlora.sweep import Sweep, sweep_jobs

RATE = {"learning_rate": 1e-4}


def setting_of(name: str, model: str | None) -> Setting:
    needs_rate = model is None and name.startswith("moe-sieve")
    return Setting(model, options=RATE if needs_rate else {})


def jobs_of(sweep: Sweep, tmp_path) -> list[Job]:
    return sweep_jobs(sweep, tmp_path)


@pytest.mark.parametrize("model", [None, "nano", "some/other-moe"])
@pytest.mark.parametrize("name", names())
def test_every_recipe_can_be_built(name: str, model: str | None, tmp_path):
    if name not in RECIPES:
        assert jobs_of(find_sweep(name), tmp_path)
        return
    setting = setting_of(name, model)
    if model == "some/other-moe" and name.startswith("moe-sieve"):
        with pytest.raises(HotLoraError, match="--set learning_rate"):
            find_sweep(name, setting)
        setting = Setting(model, options=RATE)
    recipe, sweep = RECIPES[name](setting), find_sweep(name, setting)
    jobs = jobs_of(sweep, tmp_path)
    found = {job.name for job in jobs}
    for row in recipe.rows:
        for column in recipe.columns:
            if not row.only or column.name in row.only:
                assert {condition_name(row, column), scored_name(row, column)} <= found
                assert set(row.published) <= {"GSM8K", "HUMAN", "SAFE", "Spider", "HellaSwag"}
                others = [o for o in recipe.columns if o.name != column.name] if recipe.across and row.method else []
                assert {across_name(row, column, other) for other in others} <= found
    models = {column.model for column in recipe.columns}
    assert models == {model} if model else all("/" in name for name in models)
    assert len(sweep.seeds) == ((3 if name.startswith("hellora") else 8) if model == "nano" else len(sweep.seeds))


def test_a_condition_that_two_recipes_share_is_the_same_run():
    runs: dict[str, dict] = {}
    for name, recipe in RECIPES.items():
        sweep = recipe(setting_of(name, "nano")).sweep()
        for condition in sweep.conditions:
            options = sweep.options_of(condition)
            assert runs.setdefault(condition.name, options) == options, condition.name
    assert len(runs) > 60


def test_hyperparameters_are_the_papers_and_a_users_come_first():
    sweep = find_sweep("hellora-table-2")
    options = {condition.name: condition.options for condition in sweep.conditions}
    assert options["OLMoE-1B-7B-0924/codealpaca-lori/hellora"]["preset"] == "hellora-code"
    assert options["OLMoE-1B-7B-0924/codealpaca-lori/hellora-scored"]["samples"] == 20
    assert len(sweep.seeds) == 10
    sweep = find_sweep("moe-sieve-table-3", Setting(seeds=2, options={**RATE, "epochs": 1}))
    first = sweep.conditions[0].options
    assert (first["epochs"], first["batch_size"], first["learning_rate"]) == (1, 64, 1e-4) and len(sweep.seeds) == 2
    assert {condition.options["model"] for condition in sweep.conditions} == {
        "allenai/OLMoE-1B-7B-0924", "Qwen/Qwen1.5-MoE-A2.7B",
    }  # fmt: skip


def test_local_files_stand_for_a_task():
    sweep = find_sweep("hellora-table-4", Setting(sources={"gsm8k": "/data/gsm8k"}))
    assert {condition.options["data"] for condition in sweep.conditions} == {"gsm8k-lori:/data/gsm8k"}
    assert {condition.name.split("/")[1] for condition in sweep.conditions} == {"gsm8k-lori"}


def test_the_unknown_is_named():
    with pytest.raises(HotLoraError, match=r"no-such-recipe is no Python file and no recipe.*hellora-table-2"):
        find_sweep("no-such-recipe")
    with pytest.raises(HotLoraError, match="says itself what it runs"):
        find_sweep("auto_k", Setting("nano"))
