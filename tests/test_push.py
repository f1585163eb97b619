"""Pushing to the Hub: huggingface_hub's own client against a small server on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import READS, TOKEN, Hub, hub
from huggingface_hub import ModelCard
from runs import run_training
from tiny_files import save_tiny_model, write_sums
from typer.testing import CliRunner

import hotlora
from hotlora.base.errors import FileError, HotLoraError
from hotlora.base.files import read_json
from hotlora.base.records import read_record
from hotlora.cli.main import app
from hotlora.hf.hub import _user, check_push, push
from hotlora.report.card import write_card, write_export_card
from hotlora.runs.export import export_saved

WHAT = {"adapter_config.json", "adapter_model.safetensors", "README.md", "experts.png"}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with hub() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol that is no small server
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-project")
    save_tiny_model(folder / "model")
    write_sums(folder / "rows.jsonl")
    model, data = str(folder / "model"), str(folder / "rows.jsonl")
    run_training(model, data, folder / "run", max_steps=1, r=2, max_length=64)
    write_card(folder / "run")
    return folder / "run"


def test_a_run_is_pushed_as_one_commit_of_its_adapter_alone(there: Hub, run: Path):
    config = (run / "adapter" / "adapter_config.json").read_bytes()
    assert push(run, "lab/mine") == f"{there.url}/lab/mine"
    assert there.repos == {"lab/mine": "private"} and there.commits == {"lab/mine": 1}
    files = there.files["lab/mine"]
    assert set(files) == WHAT | {"tokenizer.json", "tokenizer_config.json"}
    for name in set(files) - {"adapter_config.json"}:
        assert files[name] == (run / "adapter" / name).read_bytes()
    # Where the base lies on this machine is nobody else's business.
    assert not any(b"secret-project" in content or b"/tmp" in content for content in files.values())
    pushed = json.loads(files["adapter_config.json"])
    assert pushed == {**json.loads(config), "base_model_name_or_path": "model"}
    assert (run / "adapter" / "adapter_config.json").read_bytes() == config


def test_a_name_alone_is_the_users_and_an_old_repo_keeps_its_visibility(there: Hub, run: Path):
    there.repos["ada/mine"], there.files["ada/mine"] = "public", {"old.txt": b"1"}
    push(run / "adapter", "mine")
    assert there.repos == {"ada/mine": "public"} and "old.txt" in there.files["ada/mine"]
    push(run / "adapter", "other", private=False)
    assert there.repos["ada/other"] == "public"


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("a/b/c", TOKEN, "'a/b/c' cannot name a repository on the Hub"),
        ("my adapter", TOKEN, "cannot name a repository"),
        ("stranger/mine", TOKEN, r"stranger is neither you \(ada\) nor an organisation of yours \(lab\)"),
        ("ada/mine", READS, "the token only reads"),
        ("ada/mine", "hf_wrong", "the Hub does not know the token"),
        ("ada/mine", None, "there is no token: hf auth login, or HF_TOKEN"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_training(
    there: Hub, run: Path, monkeypatch, tmp_path, name, token, message
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HotLoraError, match=message):
        check_push(name)
    monkeypatch.setattr("hotlora.runs.training.load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(HotLoraError, match=message):
        run_training("nano", "nano-math", tmp_path / "run", push_to_hub=name)
    assert not (tmp_path / "run").exists() and not there.repos


def test_a_hub_that_refuses_or_is_not_there(there: Hub, run: Path, monkeypatch):
    there.is_full = True
    with pytest.raises(HotLoraError, match=r"could not be pushed to lab/mine .*storage limit.*hotlora push .*run lab"):
        push(run, "lab/mine")
    answer = there.answer
    for foreign in ([], "a login page", None, {}):
        there.answer = lambda *asked, foreign=foreign: (200, foreign)
        _user.cache_clear()
        with pytest.raises(HotLoraError, match=r"the Hub cannot be asked .*none of the Hub's"):
            check_push("lab/mine")
    there.answer = answer
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HotLoraError, match=r"the Hub cannot be asked .* a run without --push-to-hub can be"):
        check_push("ada/mine")


def test_training_from_python_pushes_too(there: Hub, run: Path, tmp_path: Path):
    model, data = str(run.parent / "model"), str(run.parent / "rows.jsonl")
    hotlora.train(model, data, output=tmp_path / "run", max_steps=1, r=2, max_length=64, push_to_hub="lab/py")
    assert there.repos == {"lab/py": "private"} and "README.md" in there.files["lab/py"]


def test_what_is_no_adapter_is_not_pushed(there: Hub, tmp_path: Path):
    with pytest.raises(HotLoraError, match="holds no adapter or model to push"):
        push(tmp_path, "mine")
    assert not there.repos


def test_a_link_out_of_the_folder_is_not_pushed(there: Hub, run: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("private")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(FileError, match=r"notes\.txt is a link to .*secret, which would be pushed"):
        push(tmp_path / "adapter", "lab/linked")
    assert not there.repos
    # As huggingface_hub keeps what it downloaded.
    snapshot = tmp_path / "cache" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for file in (run / "adapter").iterdir():
        blob = shutil.copy(file, tmp_path / "cache" / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{Path(blob).name}")
    push(snapshot, "lab/cached")
    assert there.files["lab/cached"].keys() >= WHAT


@pytest.mark.parametrize(
    "config", [{"base_model_name_or_path": 5, "on_top_of": 5}, {"base_model_name_or_path": "x" * 400}]
)
def test_a_config_from_elsewhere_is_pushed_as_it_is(there: Hub, run: Path, tmp_path: Path, config: dict):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    push(tmp_path / "adapter", "lab/odd")
    assert json.loads(there.files["lab/odd"]["adapter_config.json"]) == config


def test_a_base_of_the_hubs_cache_is_named_as_on_the_hub(there: Hub, run: Path, tmp_path: Path):
    """Its folder there is a commit's hash, by which nobody finds the base."""
    base = tmp_path / "hub" / "models--lab--big-moe" / "snapshots" / ("0d7c" * 10)
    shutil.copytree(run.parent / "model", base)
    shutil.copytree(run, tmp_path / "run")
    record, config = tmp_path / "run" / "run.json", tmp_path / "run" / "adapter" / "adapter_config.json"
    for file in (record, config):
        file.write_text(file.read_text().replace(str(run.parent / "model"), str(base)))
    write_card(tmp_path / "run")
    push(tmp_path / "run", "lab/of-cached")
    assert json.loads(there.files["lab/of-cached"]["adapter_config.json"])["base_model_name_or_path"] == "lab/big-moe"
    card = ModelCard(there.files["lab/of-cached"]["README.md"].decode())
    assert card.data.base_model == "lab/big-moe" and "0d7c0d7c" not in str(card)


def test_a_merged_model_is_pushed_without_where_its_adapters_lay(there: Hub, run: Path, tmp_path: Path):
    export_saved(str(run.parent / "model"), run / "adapter", tmp_path / "merged", format="merged")
    kept = json.loads((tmp_path / "merged" / "config.json").read_text())
    push(tmp_path / "merged", "lab/merged")
    config = json.loads(there.files["lab/merged"]["config.json"])
    assert str(run) in json.dumps(kept) and str(run) not in json.dumps(config)
    assert [entry["weights_sha256"] for entry in config["hotlora_merged"]] == [
        entry["weights_sha256"] for entry in kept["hotlora_merged"]
    ]


# One after the other, as far as the first that fails.
COMMANDS = """
import json, sys
from hotlora.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["hotlora", *words]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def test_the_commands(there: Hub, run: Path, tmp_path: Path):
    """In a process of its own, by HF_ENDPOINT: train with --push-to-hub, then push a run that has ended."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**given, "HF_ENDPOINT": there.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "COLUMNS": "200"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    options = ["--max-steps", "1", "--r", "2", "--max-length", "64", "-o", tmp_path / "run", "--push-to-hub", "lab/new"]
    model, data = run.parent / "model", run.parent / "rows.jsonl"
    train = ["train", "-m", model, "-d", data, *options, "--no-hub-private-repo"]
    commands = [list(map(str, words)) for words in (train, ["push", run, "mine"])]
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert there.commits["lab/new"] == 1
    assert f"pushed: {there.url}/lab/new" in done.stderr and there.repos["lab/new"] == "public"
    assert f"pushed: {there.url}/ada/mine (private)" in done.stdout
    assert {"README.md", "experts.png"} <= set(there.files["lab/new"]) == set(there.files["ada/mine"])


@pytest.mark.parametrize("format", ["vllm", "peft", "merged"])
def test_an_export_from_python_has_the_card_of_the_command(run: Path, tmp_path: Path, format: str):
    model, routers = hotlora.load_adapter(run), {"merge_router": True} if format == "vllm" else {}
    out = hotlora.export_adapter(model, tmp_path / "python", format=format, **routers)
    words = ["export", run, "--format", format, "-o", tmp_path / "command", *(["--merge-router"] if routers else [])]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    cards = {card.relative_to(out): card.read_text() for card in out.rglob("README.md")}
    theirs = tmp_path / "command"
    assert cards and cards == {card.relative_to(theirs): card.read_text() for card in theirs.rglob("README.md")}
    if format == "peft":  # AutoPeftModel and servers read the base's name there
        assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(run.parent / "model")
    alone = hotlora.load_adapter(run, is_trainable=True)  # of no file: what it came to is not known
    hotlora.export_adapter(alone, tmp_path / "alone", format="peft")
    assert "## Results" not in (tmp_path / "alone" / "README.md").read_text()


@pytest.mark.parametrize("format", ["vllm", "sglang", "peft", "merged", "combined"])
def test_what_is_exported_has_a_card_that_says_who_loads_it(run: Path, tmp_path: Path, format: str):
    out, words = tmp_path / "out", ["export", run, "--format", format]
    words = {"merged": ["merge", run], "combined": ["combine", run, run]}.get(format, words)
    words += ["--merge-router"] if format in ("vllm", "sglang") else []
    done = CliRunner().invoke(app, [*map(str, words), "-o", str(out)])
    assert done.exit_code == 0, done.output
    cards = sorted(out.rglob("README.md"))
    served = format in ("vllm", "sglang")
    assert cards == ([out / "adapter" / "README.md", out / "base" / "README.md"] if served else [out / "README.md"])
    card = ModelCard.load(cards[0])
    assert card.data.library_name == ("transformers" if format == "merged" else "peft") and "hotlora" in card.data.tags
    use = {
        "vllm": "vllm serve ../base --enable-lora --max-lora-rank 8 ",
        "sglang": "sglang.launch_server --model-path ../base --enable-lora --max-loras-per-batch 2 ",
        "peft": "PeftModel.from_pretrained", "merged": "a plain checkpoint of", "combined": "hotlora.load(",
    }  # fmt: skip
    assert use[format] in card.text
    if served:
        with pytest.raises(HotLoraError, match="holds a base and an adapter that belong together: push"):
            push(out, "mine")
        assert "It needs the base beside it" in card.text
    if format == "peft":
        code = card.text.partition("```python\n")[2].partition("```")[0]
        compile(code, "card", "exec")
        assert "base_model = AutoModelForCausalLM.from_pretrained('model')" in code
        assert (out / "tokenizer.json").read_bytes() == (run / "adapter" / "tokenizer.json").read_bytes()
    assert "secret-project" not in card.content and "rows.jsonl" in card.text
    loss = read_record(run)["training"].get("test_loss")
    assert ("## Results" in card.text) is (format != "combined") and loss is None


@pytest.mark.parametrize("how", ["merge_router", "drop_router"])
def test_a_card_says_what_became_of_the_routers(run: Path, tmp_path: Path, how: str):
    """No results where it is another model than the one that was scored, and no base that it does not fit."""
    for format in ("vllm", "sglang"):
        folder = tmp_path / format
        export_saved(str(run.parent / "model"), run / "adapter", folder, format=format, **{how: True})
        dropped = how == "drop_router"
        card = ModelCard.load(write_export_card(folder, format, "lab/moe", [run / "adapter"], None, dropped))
        assert card.data.base_model == ("lab/moe" if dropped else None)
        assert ("was left out (`--drop-router`)" in card.text) == dropped == ("## Results" not in card.text)
        if not dropped:
            assert ModelCard.load(folder / "base" / "README.md").data.base_model == "lab/moe"
    hotlora.export_adapter(hotlora.load_adapter(run), tmp_path / "python", format="vllm", **{how: True})
    (card,) = (tmp_path / "python" / ("" if dropped else "adapter")).glob("README.md")
    assert ("--drop-router" in card.read_text()) == dropped
