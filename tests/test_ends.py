"""Answers end with the token that the chat template ends a turn with, wherever they are generated."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import run_evaluation, run_training
from test_chat import CHATML, TEMPLATES, tokenizer_of
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar
from typer.testing import CliRunner

import hotlora
from hotlora.base.errors import FileError, HotLoraError
from hotlora.base.records import read_record
from hotlora.cli.main import app
from hotlora.evaluation.talk import answer
from hotlora.evaluation.vllm_engine import vllm_answers
from hotlora.hf.stopping import add_stop_tokens, saved_stop_tokens, stop_tokens
from hotlora.runs.export import combine_saved, export_saved
from hotlora.tasks.data import load_examples
from hotlora.tasks.ends import turn_ends

# Of the templates that TRL bundles, those that end answers otherwise than with one token of the same kind.
ENDS = {
    "qwen3": ["<|im_end|>"], "qwen2_5": ["<|im_end|>"], "llama3": ["<|eot_id|>"], "llama3_1": ["<|eot_id|>"],
    "gemma3": ["<end_of_turn>"], "gptoss": ["<|call|>", "<|return|>"], "gemma4": ["<turn|>", "<|tool_response>"],
    "cohere2": ["<|END_OF_TURN_TOKEN|>"], "deepseekv3": ["<｜end▁of▁sentence｜>"], "smolvlm": ["<end_of_utterance>"],
    "phi3": ["<eos>", "<|end|>"], "glm4moe": [],
}  # fmt: skip
PROMPT = [{"role": "user", "content": "say a"}]


@pytest.mark.parametrize("name", sorted(ENDS.keys() & TEMPLATES.keys()))
def test_what_ends_an_answer(name: str):
    tokenizer = tokenizer_of(name)
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ENDS[name]


def test_a_token_that_also_stands_between_two_calls_ends_none():
    """Nor does a text of several tokens."""
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}</tool_call>{% endfor %}"
    template = CHATML.replace("<|im_end|>", "{{ '' if m.tool_calls else '<|im_end|>' }}")
    assert "m.content" in template
    tokenizer = tokenizer_of(template.replace("{{ m.content }}", "{{ m.content }}" + calls))
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ["<|im_end|>"]
    plain = byte_tokenizer()
    assert turn_ends(plain) == []
    plain.chat_template = CHATML
    assert turn_ends(plain) == []


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """nano with ChatML's tokens, and <|endoftext|> still as its end of text."""
    disable_progress_bar()
    folder = tmp_path_factory.mktemp("chatml") / "model"
    model, tokenizer = hotlora.load("nano")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer))
    noise = torch.Generator().manual_seed(0)
    for weight in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
        weight[-2:] = weight[:-2].std() * torch.randn(weight[-2:].shape, generator=noise)  # apart, as pretraining does
    # As published ones have it, which transformers refuses to save once it was changed.
    told = {"eos_token_id": 0, "pad_token_id": 1, "do_sample": False, "temperature": 0.6}
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(told))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    talks = [
        [{"role": "user", "content": f"say {c}"}, {"role": "assistant", "content": c * 2}]
        for c in "ab"
        for _ in "12345678"
    ]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(file)


@pytest.fixture(scope="module")
def run(chatml: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_training(chatml, rows, folder, max_steps=40, batch_size=8, learning_rate=2e-3, r=8, lr_scheduler="linear")
    return folder


def ids_of(model: str) -> list[int]:
    tokenizer = hotlora.load_tokenizer(model)
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_what_may_stand_in_an_answer_ends_none():
    """An added token that is no special one, and the end of the conversation beside that of a turn."""
    tokenizer = hotlora.load_tokenizer("nano")
    tokenizer.add_tokens(["\n\n", "."])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    for_each = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    prompt = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    names = {
        for_each + "\n\n" + prompt: [],
        for_each + "." + prompt: [],
        for_each + "<|im_end|>\n" + prompt: ["<|im_end|>"],
        for_each + "<|im_end|>\n" + prompt.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"): [
            "<|endoftext|>", "<|im_end|>",
        ],
    }  # fmt: skip
    for template, expected in names.items():
        tokenizer.chat_template = template
        assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == expected, template


def test_answers_stop_there_wherever_they_are_generated(chatml: str, rows: str, run: Path):
    record, evaluation = run_evaluation(chatml, rows, adapter=run / "adapter")
    assert record["evaluation"]["rows"]["accuracy"] == 1.0, evaluation and evaluation.results[:2]
    model, tokenizer = hotlora.load(run)
    assert stop_tokens(model) == ids_of(chatml)
    given = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**given, max_new_tokens=20)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(made) == "aa<|im_end|>"
    assert answer(model, tokenizer, PROMPT, max_new_tokens=20) == "aa"


@pytest.mark.parametrize("command", [["generate", "say a", "--adapter"], ["chat"]])
def test_the_commands_stop_there(run: Path, command: list[str]):
    done = CliRunner().invoke(app, [*command, str(run), "--max-new-tokens", "20"], input="say a\n")
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "aa", done.output


def test_without_the_file_a_conversation_still_stops(chatml: str, rows: str, run: Path):
    """Of adapters that were saved before it was written."""
    file = run / "adapter" / "generation_config.json"
    told = file.read_text()
    file.unlink()
    try:
        record, _ = run_evaluation(chatml, rows, adapter=run / "adapter")
        assert record["evaluation"]["rows"]["accuracy"] == 1.0
        assert stop_tokens(hotlora.load(run)[0]) == ids_of(chatml)[:1]
    finally:
        file.write_text(told)


def test_what_is_exported_merged_or_combined_needs_no_gpu(chatml: str, run: Path, tmp_path: Path, monkeypatch):
    """A base that trained in 4 bits, or offloaded, may not fit one as it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for format in ("merged", "peft"):
        export_saved(chatml, run / "adapter", tmp_path / format, format=format)
    combine_saved(chatml, [run / "adapter"] * 2, tmp_path / "combined")


def test_what_is_saved_says_so(chatml: str, rows: str, run: Path, tmp_path: Path):
    both = ids_of(chatml)
    export_saved(chatml, run / "adapter", tmp_path / "vllm", format="vllm", drop_router=True)
    assert GenerationConfig.from_pretrained(tmp_path / "vllm").eos_token_id == both
    combine_saved(chatml, [run / "adapter"] * 2, tmp_path / "combined")
    assert saved_stop_tokens(tmp_path / "combined") == both


def test_whole_models_that_are_saved_say_so(chatml: str, rows: str, run: Path, tmp_path: Path):
    both = ids_of(chatml)
    try:
        AutoModelForCausalLM.from_pretrained(chatml).save_pretrained(tmp_path / "as it is")
    except ValueError as error:
        pytest.skip(f"this transformers does not save such a model at all ({str(error).splitlines()[0]})")
    export_saved(chatml, run / "adapter", tmp_path / "merged", format="merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert whole.generation_config.eos_token_id == both and whole.generation_config.temperature == 0.6
    run_training(chatml, rows, tmp_path / "full", max_steps=1, batch_size=8, full=True)
    assert GenerationConfig.from_pretrained(tmp_path / "full" / "model").eos_token_id == both


def test_training_says_so_once(chatml: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    short: dict[str, Any] = {"max_steps": 1, "batch_size": 8, "preflight": False}
    hotlora.train(chatml, rows, tmp_path / "chat", **short)
    told = capsys.readouterr().err
    assert told.count("answers end with <|im_end|>") == 1 and "eos_token is <|endoftext|>" in told
    pairs = [{"prompt": "say a", "completion": " a"}] * 8
    for name, model, data in (("pairs", chatml, pairs), ("nano", "nano", rows)):
        hotlora.train(model, data, tmp_path / name, **short)
        assert "answers end with" not in capsys.readouterr().err
        assert not (tmp_path / name / "adapter" / "generation_config.json").exists()


def test_answers_that_are_cut_are_counted(chatml: str, rows: str, run: Path, tmp_path: Path):
    """How long one may get is an option of its own: exactly as long as an answer with its end is enough."""
    words = ["evaluate", "--data", rows, "--adapter", str(run), "-o"]
    cut = CliRunner().invoke(app, [*words, str(tmp_path / "cut"), "--max-new-tokens", "1"])
    assert "16 answers were cut at 1 tokens (--max-new-tokens)" in cut.output
    found = read_record(tmp_path / "cut")["evaluation"]["rows"]
    assert (found["unfinished"], found["max_new_tokens"]) == (16, 1)
    whole, _ = run_evaluation(chatml, rows, adapter=run / "adapter", max_new_tokens=3)
    assert "unfinished" not in whole["evaluation"]["rows"] and whole["evaluation"]["rows"]["accuracy"] == 1.0
    for wrong, data, told in (
        (0, rows, "max_new_tokens = 0 is out of range"),
        (4, "nano-choice", "nothing is answered"),
    ):
        with pytest.raises(HotLoraError, match=told):
            run_evaluation(chatml, data, adapter=run / "adapter", max_new_tokens=wrong)


def test_vllm_is_told(chatml: str, rows: str, monkeypatch: pytest.MonkeyPatch):
    """Where it is not installed: what its engine is given."""
    params: list[Any] = []

    class Engine:
        def generate(self, prompts: list, given: list, **_: Any) -> list:
            params.extend(given)
            return [SimpleNamespace(outputs=[SimpleNamespace(text="aa", finish_reason="stop")]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **given: given))
    tokenizer = hotlora.load_tokenizer(chatml)
    examples = load_examples(rows, tokenizer=tokenizer)
    list(vllm_answers(Engine(), None, tokenizer, examples, max_new_tokens=4))
    assert all(given["stop_token_ids"] == ids_of(chatml)[1:] for given in params) and len(params) == len(examples)
    params.clear()
    list(vllm_answers(Engine(), None, tokenizer, [hotlora.tasks.Example("a", "b")], max_new_tokens=4, ends=[7]))
    assert [given["stop_token_ids"] for given in params] == [[7]]


def test_vllm_has_room_for_the_longest_request_alone(monkeypatch: pytest.MonkeyPatch):
    """A model's window is 128k tokens, whose KV cache a small card has no room for."""
    engines: list[dict[str, Any]] = []

    class Engine:
        def __init__(self, **given: Any) -> None:
            engines.append(given)

        def generate(self, prompts: list, given: list, **_: Any) -> list:
            self.longest = max(
                len(p["prompt_token_ids"]) + g["max_tokens"] for p, g in zip(prompts, given, strict=True)
            )
            assert engines[-1].get("max_model_len", self.longest) == self.longest
            return [SimpleNamespace(outputs=[SimpleNamespace(text="aa", finish_reason="stop")]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **given: given, LLM=Engine))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=None))
    run_evaluation("nano", "nano-math", limit=4, engine="vllm", max_new_tokens=9)
    assert 20 < engines[-1]["max_model_len"] < 100
    run_evaluation("nano", "nano-math", limit=4, engine="vllm", max_new_tokens=500)
    assert "max_model_len" not in engines[-1], "nano's window is 512"


def test_a_file_that_is_none(run: Path, tmp_path: Path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["<|im_end|>"]}')
    with pytest.raises(FileError, match=r"eos_token_id is .*it must be a token id"):
        saved_stop_tokens(tmp_path)
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=3))
    add_stop_tokens(model, [3])
    assert model.generation_config.eos_token_id == 3
    add_stop_tokens(SimpleNamespace(), [3])
