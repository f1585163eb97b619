"""What a run left, used: loaded, answering, chatting, described by its card."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from runs import run_method
from tiny_files import save_tiny_model, write_sums
from transformers.utils.logging import disable_progress_bar

import hotlora
from hotlora.base.errors import DataError, FileError, HotLoraError, PlanError
from hotlora.base.records import read_record, write_record
from hotlora.cli import main as cli
from hotlora.evaluation.generate import Sampling, answer_batches
from hotlora.evaluation.talk import answer, prompt_ids
from hotlora.hf import hub
from hotlora.report.card import PICTURE, card_text, write_card
from hotlora.runs import evaluation, load
from hotlora.runs.export import combine_saved
from hotlora.runs.load import find
from hotlora.tasks import Example

SHORT = {"max_steps": 8, "batch_size": 8, "limit": 80, "test_limit": 4, "learning_rate": 2e-3, "r": 4, "lora_alpha": 8}
PROMPT = "Question: 3 + 4 ="


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    disable_progress_bar()
    folder = tmp_path_factory.mktemp("talk") / "run"
    run_method("nano", "nano-math", folder, **SHORT)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    rows = folder / "rows.jsonl"
    rows.write_text((json.dumps({"messages": talk}) + "\n") * 16)
    run_method("nano", str(rows), folder / "run", **{**SHORT, "max_steps": 2})
    return folder / "run"


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_pipes_and_files_are_utf8_whatever_the_code_page(call, tmp_path, monkeypatch, capsys):
    """Windows gives them the country's."""
    words = [sys.executable, "-m", "hotlora"]
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "é →", "completion": " 漢字 ✓"}) + "\n")
    told = subprocess.run([*words, "data", rows, "--model", "nano"], env=env, capture_output=True, timeout=300)
    assert told.returncode == 0, told.stderr.decode()
    assert "é →" in told.stdout.decode("utf-8") and "漢字 ✓" in told.stdout.decode("utf-8")

    asked = ["generate", "--model", "nano", "--raw", "--max-new-tokens", "8"]
    piped = "Question: 漢字 =".encode()
    told = subprocess.run([*words, *asked], env=env, input=piped, capture_output=True, timeout=300)
    assert told.stdout.decode("utf-8") == call(*asked, piped.decode())[1] != ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["hotlora", *asked])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "The prompt is no valid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "adapter"])
def test_a_run_or_its_adapter_alone_is_enough(run: Path, part: str):
    model, tokenizer = hotlora.load(run / part)
    by_hand = hotlora.load_adapter(hotlora.load_model("nano"), run / "adapter")
    assert torch.equal(logits(model, tokenizer), logits(by_hand, hotlora.load_tokenizer("nano")))
    merged, _ = hotlora.load(run / part, merge=True)
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged, tokenizer), logits(by_hand, tokenizer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["", "adapter"])
def test_on_a_gpu_a_run_is_loaded_in_what_it_was_trained_in(run: Path, part: str, tmp_path: Path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    record = read_record(tmp_path / "run")
    record["config"]["dtype"] = "float16"
    write_record(tmp_path / "run", record)
    loaded, load_base = [], load.load_base
    monkeypatch.setattr(load, "load_base", lambda *given, **options: loaded.append(options) or load_base(*given))
    for device, asked, expected in (
        ("cpu", "auto", "auto"), ("cuda", "auto", "float16"), ("cuda", "float32", "float32"),
    ):  # fmt: skip
        monkeypatch.setattr(load, "checked_device", torch.device)
        hotlora.load(tmp_path / "run" / part, device=device, dtype=asked)
        assert loaded[-1]["dtype"] == expected


def test_on_a_gpu_a_run_is_evaluated_in_what_it_was_trained_in(run: Path, tmp_path: Path, monkeypatch):
    """Where an evaluation was begun, it goes on in that one's, and one that was made before this is what it was."""
    shutil.copytree(run, tmp_path / "run")
    record = read_record(tmp_path / "run")
    record["config"]["dtype"] = "float16"
    write_record(tmp_path / "run", record)
    loaded, load_base = [], evaluation.load_base
    monkeypatch.setattr(evaluation, "load_base", lambda name, **given: loaded.append(given["dtype"]) or load_base(name))
    score = functools.partial(hotlora.evaluate, tmp_path / "run", "nano-choice", limit=2, progress=False)
    score()
    made_before = tmp_path / "before"
    score(made_before)
    monkeypatch.setattr(evaluation, "checked_device", lambda device: torch.device("cuda"))
    for output in (None, tmp_path / "scored"):
        score(output)
    score(dtype="float32")
    assert loaded == ["auto", "auto", "float16", "float16", "float32"]
    assert read_record(tmp_path / "scored")["config"]["dtype"] == "float16"
    score(made_before)
    monkeypatch.undo()
    score(tmp_path / "scored")
    with pytest.raises(HotLoraError, match="--dtype float32 against float16"):
        score(tmp_path / "scored", dtype="float32")


def test_load_adapter_takes_paths_too(run: Path, tmp_path: Path):
    tokenizer = hotlora.load_tokenizer("nano")
    by_hand = logits(hotlora.load_adapter(hotlora.load_model("nano"), run / "adapter"), tokenizer)
    for given in ((run,), (str(run / "adapter"),), ("nano", run), (hotlora.load_model("nano"), str(run))):
        assert torch.equal(logits(hotlora.load_adapter(*given), tokenizer), by_hand), given
    trainable = hotlora.load_adapter(run, is_trainable=True)
    assert trainable.training and any(parameter.requires_grad for parameter in trainable.parameters())
    for wrong, told in (
        ((hotlora.load_model("nano"),), "path is not given"),
        (("nano",), "is no adapter but a model"),
        ((tmp_path,), "holds no run, adapter or model"),
        ((hotlora.load_model("nano"), tmp_path / "none"), "is not a folder"),
        (("nano", "nano"), "there is nothing to load onto"),
    ):
        with pytest.raises(HotLoraError, match=told):
            hotlora.load_adapter(*wrong)


def test_a_model_and_a_fully_trained_one(run: Path, tmp_path: Path):
    model, tokenizer = hotlora.load("nano")
    assert torch.equal(logits(model, tokenizer), logits(hotlora.load_model("nano"), tokenizer))
    run_method("nano", "nano-math", tmp_path / "full", method="fft", **{**SHORT, "max_steps": 3, "learning_rate": 1e-4})
    whole, tokenizer = hotlora.load(tmp_path / "full")
    assert torch.equal(logits(whole, tokenizer), logits(hotlora.load_model(tmp_path / "full" / "model"), tokenizer))
    assert not torch.equal(logits(whole, tokenizer), logits(model, tokenizer))


def test_a_base_that_moved_is_given(run: Path, tmp_path: Path):
    model, tokenizer = hotlora.load("nano")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    moved, _ = hotlora.load(run, model=str(tmp_path / "base"))
    assert torch.equal(logits(moved, tokenizer), logits(hotlora.load(run)[0], tokenizer))


def test_what_is_not_there_is_told(run: Path, tmp_path: Path):
    with pytest.raises(FileError, match="holds no run, adapter or model"):
        hotlora.load(tmp_path)
    with pytest.raises(HotLoraError, match="is no adapter, so there is nothing to load onto x"):
        hotlora.load("nano", model="x")
    record = read_record(run)
    write_record(tmp_path, {**record, "status": "failed"})
    with pytest.raises(FileError, match="has not been trained to its end"):
        hotlora.load(tmp_path)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "alone").mkdir()
    for noted, error, message in (
        (None, FileError, "notes no base model"),
        ("gone/away/far", FileError, r"adapter_config.json notes the base gone/away/far, which is not there: give"),
        ("/gone", FileError, "notes the base /gone, which is not there"),
    ):
        (tmp_path / "alone" / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": noted})
        )
        with pytest.raises(error, match=message):
            hotlora.load(tmp_path / "alone")
    revised = {**config, "revision": "step1000", "base_model_name_or_path": "lab/moe"}
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(revised))
    with pytest.raises(FileError, match=r"notes revision 'step1000' of lab/moe.*download lab/moe --revision step1000"):
        find(tmp_path / "alone")
    assert find(tmp_path / "alone", "elsewhere").model == "elsewhere"


def test_a_base_in_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_tiny_model(tmp_path / "bases" / "olmoe")
    write_sums(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    run_method("bases/olmoe", "rows.jsonl", Path("run"), max_steps=1, r=2, max_length=64)
    combine_saved("bases/olmoe", ["run/adapter", "run/adapter"], "both")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for adapter in ("../run", "../both"):
        assert find(adapter).model == str(tmp_path / "bases" / "olmoe")


@pytest.mark.parametrize("name", ["typo", "runs/typo"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr(load, "adapter_on_hub", lambda name: pytest.fail(f"{name} was asked for"))
    with pytest.raises(FileError, match=f"{name} does not exist"):
        hotlora.load(name)
    monkeypatch.setattr(load, "adapter_on_hub", lambda name: None)
    with pytest.raises(FileError, match="nosuch/mine is no folder here, and no adapter on the Hub"):
        hotlora.load_adapter("nosuch/mine")


def test_an_adapter_on_the_hub_is_loaded_by_its_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the Hub's cache, without a network; what is no adapter there is a model, as before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, folder in (("mine", run / "adapter"), ("moe", None)):
        there = tmp_path / f"models--lab--{name}"
        (there / "refs").mkdir(parents=True)
        (there / "refs" / "main").write_text("0d7c" * 10)
        if folder is not None:
            shutil.copytree(folder, there / "snapshots" / ("0d7c" * 10))
    model, tokenizer = hotlora.load("lab/mine")
    assert torch.equal(logits(model, tokenizer), logits(*hotlora.load(run)))
    onto = hotlora.load_adapter(hotlora.load_model("nano"), "lab/mine")
    assert torch.equal(logits(onto, tokenizer), logits(model, tokenizer))
    assert find("lab/mine").model == "nano" and find("lab/mine", "x/y").model == "x/y"
    assert find("lab/moe").adapter is None and find("lab/other").adapter is None
    with pytest.raises(HotLoraError, match="is no adapter, so there is nothing to load onto x"):
        find("lab/other", "x")


def test_an_adapter_is_downloaded_or_told_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: f"{tmp_path}/{file}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    assert hub.adapter_on_hub("lab/mine") == tmp_path

    def fail(name: str, **options):
        raise OSError("no space left")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HotLoraError, match=r"lab/mine could not be downloaded \(no space left\): hf download lab/mine"):
        hub.adapter_on_hub("lab/mine")
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    assert hub.adapter_on_hub("lab/mine") is None and hub.adapter_on_hub("a/b/c") is None


def test_an_answer_is_what_evaluation_writes(run: Path):
    model, tokenizer = hotlora.load(run)
    ((written,),) = answer_batches(model, tokenizer, [Example(PROMPT, "")], max_new_tokens=12)
    assert answer(model, tokenizer, PROMPT, max_new_tokens=12) == written.text
    drawn = [
        answer(model, tokenizer, PROMPT, max_new_tokens=12, sampling=Sampling(1, 1.5, 1.0, seed)) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(HotLoraError, match="max_new_tokens = 0"):
        answer(model, tokenizer, PROMPT, max_new_tokens=0)


def test_a_conversation_goes_through_the_template(run: Path):
    _, tokenizer = hotlora.load(run)
    messages = [{"role": "user", "content": "hi"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, messages) == whole
    with pytest.raises(DataError, match="the chat template refuses"):
        prompt_ids(tokenizer, [{"content": 3}])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        prompt_ids(tokenizer, messages)


def test_generate_and_chat(call, run: Path, chats: Path, caplog: pytest.LogCaptureFixture):
    model, tokenizer = hotlora.load(run)
    expected = answer(model, tokenizer, PROMPT, max_new_tokens=8)
    code, out, _ = call("generate", PROMPT, "--adapter", run, "--max-new-tokens", 8)
    assert code == 0 and out.strip() == expected.strip()
    code, piped, _ = call("generate", "--adapter", run, "--max-new-tokens", 8, stdin=PROMPT)
    assert code == 0 and piped == out
    # As it was trained: that run on plain text, this one on conversations.
    assert find(run).is_chat is False and find(chats).is_chat is True
    model, tokenizer = hotlora.load(chats)
    asked = [{"role": "user", "content": "a?"}]
    said = answer(model, tokenizer, asked, max_new_tokens=6)
    code, out, _ = call("generate", "a?", "--adapter", chats, "--max-new-tokens", 6)
    assert code == 0 and out.strip() == said.strip()
    code, out, _ = call("chat", chats, "--max-new-tokens", 6, stdin="a?\n\nagain\n/clear\na?\n/exit\nnever\n")
    asked += [{"role": "assistant", "content": said.strip()}, {"role": "user", "content": "again"}]
    again = answer(model, tokenizer, asked, max_new_tokens=6)
    assert code == 0 and out.split() == f"{said} {again} {said}".split()
    told = "it was trained on plain texts"
    assert told in call("chat", run, stdin="/exit\n")[2] and told not in call("chat", chats, stdin="/exit\n")[2]
    rows = chats.parent / "rows.jsonl"
    for flag, is_told in (("--apply-chat-template", False), ("--no-chat-template", True)):
        words = ("evaluate", "--data", rows, "--adapter", chats, "--limit", 1, "--max-new-tokens", 1, flag)
        caplog.clear()
        assert call(*words)[0] == 0
        told = "trained on rows written by the chat template, and these are written as plain text"
        assert (told in caplog.text) == is_told


def test_a_template_is_given_tools_and_options(call, chats: Path, tmp_path: Path):
    """Both commands, to a template that refuses to write without them."""
    shutil.copytree(chats / "adapter", tmp_path / "adapter")
    template = (tmp_path / "adapter" / "chat_template.jinja").read_text()
    needed = "{% if not tools or mode != 'short' %}{{ raise_exception('not given') }}{% endif %}{{ tools[0].name }}"
    (tmp_path / "adapter" / "chat_template.jinja").write_text(needed + template)
    tools, options = [{"name": "search"}], {"mode": "short"}
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    model, tokenizer = hotlora.load(tmp_path / "adapter")
    asked = [{"role": "user", "content": "a?"}]
    assert tokenizer.decode(prompt_ids(tokenizer, asked, tools, options)).startswith("search")
    said = answer(model, tokenizer, asked, tools=tools, chat_template_kwargs=options, max_new_tokens=6)
    words = ("--tools", tmp_path / "tools.json", "--chat-template-kwargs", json.dumps(options), "--max-new-tokens", 6)
    code, out, _ = call("generate", "a?", "--chat", "--adapter", tmp_path / "adapter", *words)
    assert code == 0 and out.strip() == said.strip()
    code, out, _ = call("chat", tmp_path / "adapter", *words, stdin="a?\n/exit\n")
    assert code == 0 and out.split() == said.split()
    for command in (("generate", "a?", "--chat", "--adapter"), ("chat",)):
        code, _, err = call(*command, tmp_path / "adapter", *words[2:], stdin="")
        assert code == 1 and "the chat template refuses the conversation: not given" in err


def test_generate_with_experts_elsewhere(call, run: Path, tmp_path: Path):
    """The same answer; the ways are those of a training."""
    asked = ["generate", PROMPT, "--adapter", str(run), "--device", "cpu", "--max-new-tokens", "4"]
    plain, other = call(*asked), call(*asked, "--offload", "all", "--offload-folder", str(tmp_path / "there"))
    assert plain[:2] == other[:2] and plain[0] == 0 and plain[1].strip()
    model, _ = hotlora.load(run, device="cpu", offload="cold", offload_folder=tmp_path / "there")
    assert "hotlora-experts-" in Path("/proc/self/maps").read_text()
    del model
    for options, told in (
        ({"offload": "hot"}, "'hot' does not exist"),
        ({"offload_folder": "x"}, "goes with"),
    ):
        with pytest.raises(HotLoraError, match=told):
            hotlora.load(run, **options)


def test_a_chat_renders_its_ends_once(call, chats: Path, monkeypatch: pytest.MonkeyPatch):
    from hotlora.evaluation import generate

    times = []
    monkeypatch.setattr(generate, "turn_ends", lambda tokenizer: times.append(1) or [])
    call("chat", str(chats), "--device", "cpu", "--max-new-tokens", "2", stdin="a?\nb?\nc?\n/exit\n")
    assert len(times) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "hi"], "Give --adapter"),
        (["generate", "--model", "nano"], "There is no prompt"),
        (
            ["generate", "hi", "--model", "nano", "--raw", "--system", "s"],
            "for the chat template alone: --system. Leave that out",
        ),
        (["generate", "hi", "--model", "nano", "--tools", "none.json"], "none.json: No such file"),
        (["generate", "hi", "--model", "nano", "--tools", __file__], "'tools' is text that is no JSON"),
        (["generate", "hi", "--model", "nano", "--chat-template-kwargs", "x=1"], "is no JSON"),
        (["generate", "hi", "--model", "nano", "--chat-template-kwargs", "[]"], "must be an object"),
        (["chat", "nano", "--chat-template-kwargs", '{"tools": []}'], "cannot hold tools: leave it out"),
        (["generate", "hi", "--model", "nano", "--temperature", "-1"], "temperature = -1.0 is out of range"),
        (["chat", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_wrong_words_are_one_message(call, words, message):
    code, _, err = call(*words)
    assert code == 1 and message in " ".join(err.split()) and "Traceback" not in err


def test_the_card(run: Path, tmp_path: Path):
    assert write_card(run) == run / "adapter" / "README.md"
    card = ModelCard.load(run / "adapter" / "README.md")
    data, record = card.data.to_dict(), read_record(run)
    assert data["library_name"] == "peft" and "hotlora" in data["tags"] and "base_model" not in data
    metric = data["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == round(100 * record["evaluation"]["nano-math"]["accuracy"], 2)
    assert f"{record['parameters']['trainable']:,} trained parameters" in card.text and f"]({PICTURE})" in card.text
    assert (run / "adapter" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"{record['training']['test_loss']:.4f}" in card.text and "| learning_rate | 0.002 |" in card.text
    # A path of this machine is nobody's business; a name on the Hub is the card's base.
    write_record(run, {**record, "data": {**record["data"], "name": str(tmp_path / "mine.jsonl")},
                       "model": {**record["model"], "name": "allenai/OLMoE-1B-7B-0924"}})  # fmt: skip
    try:
        card = ModelCard.load(write_card(run))
    finally:
        write_record(run, record)
    assert str(tmp_path) not in card.content and "mine.jsonl" in card.text
    for name in ("spider:/home/me/client/spider", "gsm8k:~/client", "client/acme/data.jsonl", "models/client/olmoe"):
        text = card_text(
            {**record, "data": {**record["data"], "name": name}, "model": {**record["model"], "name": name}}, "adapter"
        )
        assert "client" not in text, name
    assert "| r |" not in card_text(record, "model") and "| rule |" not in card_text(record, "model")
    assert card.data.to_dict()["base_model"] == "allenai/OLMoE-1B-7B-0924"


@pytest.mark.parametrize("where", ["model", "data", "name"])
@pytest.mark.parametrize(
    "hostile",
    [
        "a\n# b", "---\nlicense: mit\n---", "<script>alert(1)</script>", "[x](http://evil)", "![x](http://evil)",
        "```\nimport os\n```", "`x`", "a|b", "owner/na..me", "-x/y", "owner/x-", "x" * 300, "a\x00b", "\u2028x",
    ],
    ids=ascii,
)  # fmt: skip
def test_a_card_of_any_names_is_one(run: Path, where: str, hostile: str):
    record = read_record(run)
    if where == "name":
        record |= {"name": hostile, "plan": {**record["plan"], "rule": hostile}}
    else:
        record[where] = {**record[where], "name": hostile}
    card = ModelCard(card_text(record, "adapter"))
    found = card.data.to_dict()
    assert found["library_name"] == "peft" and not found.keys() & {"license", "base_model"}
    plain = re.sub(r"```python.*?\n```\n|`[^`\n]*`", "", card.text, flags=re.DOTALL)  # what is no code
    assert not re.search(r"\]\(http|(?<!\\)<script|\u2028|\x00", plain)
    titles = [line for line in card.text.splitlines() if line.startswith("#")]
    assert len(titles) == 5 and titles[1:] == ["## Use", "## Results", "## Training", "## Made with"]
    assert sum(line.startswith("```") for line in card.text.splitlines()) == 2


def test_a_run_without_an_end_has_no_card(run: Path, tmp_path: Path):
    write_record(tmp_path, {**read_record(run), "status": "failed"})
    with pytest.raises(DataError, match="its status is 'failed'"):
        write_card(tmp_path)


def test_a_card_of_a_record_that_was_edited_is_refused(run: Path, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    record = read_record(run)
    for section, key in (("data", "train"), ("training", "test_loss_before"), ("training", "best_step")):
        write_record(tmp_path, record)
        text = json.dumps({**record, section: {**record[section], key: ""}})
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(FileError, match=rf"run\.json: {section}: {key} is ''"):
            write_card(tmp_path)
    del record["parameters"]["percent"]
    assert "trained parameters (" in card_text(record, "adapter")


def test_an_adapter_of_another_model_is_refused(run: Path, tmp_path: Path):
    from tiny import tiny_model
    from tiny_tokenizer import byte_tokenizer

    tiny_model("mixtral", vocab_size=259).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError):
        hotlora.load(run, model=str(tmp_path / "other"))
