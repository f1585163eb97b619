"""Options once: the dataclasses, and what the command line, YAML files and records make of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from hotlora.base.errors import DataError, FileError, HotLoraError
from hotlora.base.options import ALIASES, converted, read_yaml
from hotlora.cli.main import app
from hotlora.cli.options import options_of
from hotlora.routing.selection import Selection
from hotlora.runs.keywords import TrainKeywords
from hotlora.runs.methods import METHODS, PRESETS, resolve
from hotlora.runs.options import EvalOptions, LoadOptions, ProfileOptions, RunOptions
from hotlora.runs.sweep import Condition, Sweep
from hotlora.training.config import TrainConfig

CLASSES = (TrainConfig, Selection, LoadOptions, RunOptions, EvalOptions, ProfileOptions)
TYPES = {
    "r": int, "dtype": str, "learning_rate": float, "max_steps": int | None, "packing": bool, "rule": str,
    "plan": str | Path | None,
}  # fmt: skip


@pytest.mark.parametrize("options", CLASSES)
def test_every_option_has_its_line_and_its_default_its_type(options):
    for field in dataclasses.fields(options):
        told = field.metadata["help"]
        assert told and told[-1] in ".)…" and "\n" not in told, field.name
        if field.default is not dataclasses.MISSING:
            assert converted(field.name, field.default, field.type) == field.default


def test_what_the_command_line_has_not_a_method_sets():
    hidden = {field.name for field in dataclasses.fields(RunOptions) if not field.metadata["cli"]}
    assert hidden == {"full", "train_full_experts", "condition"}
    assert {"full", "train_full_experts"} <= {name for method in METHODS.values() for name in method}
    names = {field.name for field in dataclasses.fields(RunOptions)} | {"method"}
    assert {name for options in (*METHODS.values(), *PRESETS.values()) for name in options} <= names


@pytest.mark.parametrize(
    ("kind", "value", "becomes"),
    [
        (float, "4e-4", 4e-4), (float, 3, 3), (int, 4.0, 4), (int | None, None, None), (str | Path | None, "a", "a"),
        (Path, "a", Path("a")), (list[str] | None, ["a"], ("a",)), (list[Path], "a", (Path("a"),)),
        (str | Mapping[str, str] | None, {"prompt": "ask", "completion": "a b"}, "prompt=ask,completion=a b"),
        (str | Mapping[str, Any] | None, {"min_lr_rate": 0.1}, '{"min_lr_rate": 0.1}'),
        (str | Mapping[str, str] | None, "prompt=ask", "prompt=ask"),
        (int | str | None, "top_k", "top_k"), (int | str | None, "8", 8), (str, Path("a/b"), "a/b"),
    ],
)  # fmt: skip
def test_values_become_their_type(kind, value, becomes):
    found = converted("it", value, kind)
    assert found == becomes and type(found) is type(becomes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 8.5}, r"r = 8.5 has the wrong type: it must be a whole number"),
        ({"r": True}, "r = True has the wrong type"),
        ({"packing": 1}, "packing = 1 has the wrong type: it must be true or false"),
        ({"learning_rate": "fast"}, "learning_rate = 'fast' has the wrong type: it must be a number"),
        ({"learning_rate": None}, "learning_rate = None has the wrong type"),
        ({"on_top_of": {"a": 1}}, "on_top_of = .* has the wrong type"),
        ({"columns": {"prompt": "a,b"}}, "columns = .* 'a,b' is no name, a text without '=' and ','"),
        ({"columns": 3}, "columns = 3 has the wrong type: it must be text or a mapping or none"),
        ({"max_steps": float("1e400")}, "max_steps = inf has the wrong type"),
        ({"fresh_a": True}, "give keep, or method lori-s"),
        ({"keep": 0.1}, "keep is of LoRI's sparse run, whose A is frozen"),
        ({"a_seed": 3}, "a_seed is of a frozen A"),
        ({"reprofile_left": "merge"}, "give reprofile_every, too"),
        ({"on_top_of": 3}, "on_top_of = 3 has the wrong type: it must be a list"),
        ({"rule": ["hot"]}, r"rule = \['hot'\] has the wrong type: it must be text"),
    ],
)
def test_other_types_are_told(given, message):
    with pytest.raises(HotLoraError, match=message):
        RunOptions(model="nano", data="nano-math", **given)


def test_a_yaml_file(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 4e-4\nmax_steps: null\npacking: true\n", encoding="utf-8")
    assert read_yaml(file, TYPES) == {"learning_rate": 4e-4, "packing": True}
    file.write_text("learning-rate: 4e-4\nmax-steps: 3\n", encoding="utf-8")  # as the command line spells them
    assert read_yaml(file, TYPES) == {"learning_rate": 4e-4, "max_steps": 3}
    file.write_text("num-train-epochs: 2", encoding="utf-8")
    assert read_yaml(file, {"epochs": float}, {"num_train_epochs": "epochs"}) == {"epochs": 2}
    file.write_text("", encoding="utf-8")
    assert read_yaml(file, TYPES) == {}


@pytest.mark.parametrize("name", ["data", "test_data"])
def test_several_files_are_a_folder(tmp_path: Path, name: str):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: nano\n{name}: [a.jsonl, b.jsonl]\n", encoding="utf-8")
    with pytest.raises(HotLoraError, match=rf"run.yaml: {name} = .*it must be text.*a folder with all of the files"):
        read_yaml(file, {"model": str, name: str})
    flag = "--" + name.replace("_", "-")
    for words in ([f"--{name}", "a", flag, "b"], [f"{flag}=a", f"{flag}=b"]):
        with pytest.raises(HotLoraError, match=f"{flag} is given twice: give one file, or a folder"):
            CliRunner().invoke(app, ["train", "--model", "nano", *words], catch_exceptions=False)


@pytest.mark.parametrize("command", ["generate", "evaluate", "verify"])
def test_several_adapters_are_combined_first(command: str):
    for words in (
        ["--adapter", "a", "--adapter", "b"],
        ["--adapter=a", "-a" if command == "verify" else "--adapter", "b"],
    ):
        with pytest.raises(HotLoraError, match="--adapter is given twice: give one; `hotlora combine` makes one"):
            CliRunner().invoke(app, [command, *words], catch_exceptions=False)
    with pytest.raises(HotLoraError, match="nowhere/at/all"):  # a prompt may have such words
        words = ["generate", "--adapter", "nowhere/at/all", "--", "--adapter"]
        CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"run.yaml has options that do not exist: learning_rte \(did you mean learning_rate\?\)"),
        ("learning-rte: 1", r"learning-rte \(did you mean learning_rate\?\)"),
        ("learning-rate: 1\nlearning_rate: 2", "learning_rate is given twice, also as learning-rate"),
        ("target_modules: [q_proj]", r"target_modules \(leave it out: attention, .*train_attention, train_router"),
        ("zzz: 1", "do not exist: zzz; there are dtype, learning_rate, max_steps"),
        ("plan: 2026-02-30", "is not valid YAML"),
        ("? []\n: 1", "is not valid YAML"),
        (f"max_steps: {'9' * 5000}", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
        ("max_stepss: 1", r"max_stepss \(did you mean max_steps\?\)"),
        ("lora_r: 1", r"do not exist: lora_r \(did you mean r\?\)"),
        ("bf16: 1", r"bf16 \(did you mean dtype bfloat16\?\)"),
        ("logging_steps: 1", r"logging_steps \(leave it out: metrics.jsonl .* each step\)"),
        ("lr: 1", r"lr \(did you mean learning_rate\?\)"),
        ("rule: hot\nrule: all", "rule is given twice"),
        ("max_steps: 2.5", r"run.yaml: max_steps = 2.5 has the wrong type: it must be a whole number or none"),
        ("- rule", "holds no options: write NAME: VALUE"),
        ("rule: [", "is not valid YAML"),
        ("rule: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_wrong_yaml_file_is_one_message(tmp_path: Path, text: str, message: str):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(HotLoraError, match=message):
        read_yaml(file, TYPES)


def test_a_missing_yaml_file_is_told(tmp_path: Path):
    with pytest.raises(FileError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml", TYPES)


@pytest.fixture
def given():
    """Calls a command that has `train`'s options: what it was given."""
    app, seen = typer.Typer(), {}

    @app.command()
    @options_of(RunOptions, aliases=ALIASES)
    def command(method: str | None = None, output: Path | None = None, **options) -> None:
        seen.clear()
        seen.update(options, method=method, output=output)

    def call(*words: object) -> dict:
        done = CliRunner().invoke(app, [*map(str, words)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return dict(seen)

    return call


def test_the_command_line_comes_before_the_file(given, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: nano\ndata: rows.jsonl\nmethod: hellora\noutput: runs/x\nlearning_rate: 1e-3\nr: 8\npacking: true\n"
        "train_a: false\non_top_of: [a, b]\nexperts_per_layer: 4\n",
        encoding="utf-8",
    )
    expected = {
        "model": "nano", "data": "rows.jsonl", "method": "hellora", "output": Path("runs/x"), "learning_rate": 1e-3,
        "r": 8, "packing": True, "train_a": False, "on_top_of": (Path("a"), Path("b")), "experts_per_layer": 4,
    }  # fmt: skip
    assert given("--config", file) == expected
    words = "--r 4 --no-packing --train-a --data b.jsonl --method lora --on-top-of c"
    over = given("--config", file, *words.split())
    assert over == {
        **expected, "r": 4, "packing": False, "train_a": True, "data": "b.jsonl", "method": "lora",
        "on_top_of": (Path("c"),),
    }  # fmt: skip
    file.write_text("model: nano\ndata: rows.jsonl\non_top_of: []\n")
    assert given("--config", file)["on_top_of"] == ()
    method = over.pop("method")
    over.pop("output")
    assert resolve(method, **over).experts_per_layer == 4


THEIRS = {
    "num_train_epochs": ("epochs", 2), "per_device_train_batch_size": ("batch_size", 4),
    "per_device_eval_batch_size": ("eval_batch_size", 8), "lr_scheduler_type": ("lr_scheduler", "linear"),
    "load_best_model_at_end": ("load_best", True), "max_seq_length": ("max_length", 64),
    "activation_checkpointing": ("gradient_checkpointing", True), "output_dir": ("output", "runs/x"),
}  # fmt: skip


def test_all_that_is_tested_is_all_there_is():
    assert {theirs: ours for theirs, (ours, _) in THEIRS.items()} == ALIASES


@pytest.mark.parametrize("theirs", THEIRS)
def test_transformers_names_mean_ours(given, theirs: str, tmp_path: Path):
    ours, value = THEIRS[theirs]
    flag = f"--{theirs.replace('_', '-')}"
    words = [flag] if value is True else [flag, value]
    needed = {"model": "nano", "data": "d", "method": None, "output": None}
    expected = needed | {ours: Path(value) if ours == "output" else value}
    assert given("--model", "nano", "--data", "d", *words) == expected
    file = tmp_path / "run.yaml"
    file.write_text(f"model: nano\ndata: d\n{theirs}: {value}\n")
    assert given("--config", file) == expected
    own = f"--{ours.replace('_', '-')}"
    other = {int: 32, str: "cosine", bool: False}[type(value)] if ours != "output" else Path("runs/y")
    over = given("--config", file, *([f"--no-{ours.replace('_', '-')}"] if other is False else [own, other]))
    assert over == needed | {ours: other}, "the command line comes before the file"
    twice = rf"{theirs} and {ours} are one option: give one of them"
    with pytest.raises(HotLoraError, match=twice):
        given("--model", "nano", "--data", "d", *words, *([own] if value is True else [own, value]))
    file.write_text(f"{theirs}: {value}\n{ours}: {value}\n")
    with pytest.raises(HotLoraError, match=rf"run.yaml: {twice}"):
        given("--config", file, "--model", "nano", "--data", "d")
    if ours != "output":  # each run of a sweep has its own
        swept = Sweep("s", "nano", "d", [Condition("a", {theirs: value})], options={ours: other, "eval_steps": 5})
        assert getattr(swept.resolved(swept.conditions[0]), ours) == value, "a condition's own come first"
        with pytest.raises(HotLoraError, match=twice):
            Sweep("s", "nano", "d", [Condition("a", {theirs: value, ours: value})])
        assert get_type_hints(TrainKeywords)[theirs] == get_type_hints(TrainKeywords)[ours]


def test_a_theirs_from_the_command_line_comes_before_ours_from_the_file(given, tmp_path: Path):
    (tmp_path / "run.yaml").write_text("model: nano\ndata: d\nepochs: 5\n")
    assert given("--config", tmp_path / "run.yaml", "--num-train-epochs", "2")["epochs"] == 2


def test_only_what_is_given_is_handed_on(given):
    assert given("--model", "nano", "--data", "d") == {"model": "nano", "data": "d", "method": None, "output": None}


def test_a_file_may_not_name_what_a_method_sets(given, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("full: true\n", encoding="utf-8")
    with pytest.raises(HotLoraError, match="do not exist: full"):
        given("--config", file, "--model", "nano", "--data", "d")


def test_what_a_record_holds():
    """Changing this makes every run that was begun another one."""
    held = set(RunOptions(model="nano", data="nano-math").recorded())
    assert held - {field.name for field in dataclasses.fields(TrainConfig)} == {
        "model", "data", "test_data", "test_split", "attn_implementation", "evaluate", "full", "dtype", "quantize",
        "quantize_linear", "offload", "fit",
        "expert_parallel", "profile_until", "profile_fraction", "plan_seed", "reprofile_every", "reprofile_left",
        "grow_every",
        *(field.name for field in dataclasses.fields(Selection)),
    }  # fmt: skip


@pytest.mark.parametrize("profiling", [{"signal": "saliency"}, {"saliency": True}])
def test_saliency_and_expert_parallelism_are_told_apart_at_once(profiling):
    kind = ProfileOptions if "saliency" in profiling else RunOptions
    data = {} if kind is ProfileOptions else {"data": "nano-math"}
    with pytest.raises(HotLoraError, match="saliency is not gathered under expert parallelism"):
        kind(model="nano", expert_parallel=2, **data, **profiling)
    assert kind(model="nano", **data, **profiling).expert_parallel == 1


def test_how_much_is_profiled():
    """By default until it is settled, of all; an explicit share says how much by itself, or the most of it."""

    def of(**options):
        made = RunOptions(model="nano", data="nano-math", **options)
        return made.until, made.share_profiled

    assert of() == (0.95, 1.0) and of(profile_until=0.9) == (0.9, 1.0) and of(profile_until=1) == (1.0, 1.0)
    assert of(profile_fraction=0.1) == (1.0, 0.1) and of(profile_fraction=0.1, profile_until=0.9) == (0.9, 0.1)
    # Where none is made, what runs from before this option hold.
    assert of(profile="p") == of(plan="p") == of(full=True) == (1.0, 0.1)
    assert of(profile="p", reprofile_every=5) == (0.95, 1.0)
    with pytest.raises(DataError, match=r"profile_until = 2 is out of range: it must be in \(0, 1\]"):
        of(profile_until=2)
    with pytest.raises(HotLoraError, match="a warm-up profiles the examples that it trained on"):
        of(profile_until=0.9, warmup="lora")
