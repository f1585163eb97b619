"""What of a conversation carries loss, under each --train-on: token by token against TRL's own masks."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import Dataset
from jinja2 import TemplateError
from test_chat import CHATML, NOW, PARTS_ONLY, TALKS, TEMPLATES, TOKENIZER, TOOLS, USER, call, read, tokenizer_of
from tiny_tokenizer import byte_tokenizer
from trl import SFTConfig, SFTTrainer, get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from hotlora.base.errors import DataError
from hotlora.tasks.chat import ChatTemplate
from hotlora.tasks.messages import read_conversation
from hotlora.tasks.rows import Row
from hotlora.tasks.tokens import tokenize

SUNNY = {"role": "assistant", "content": "Sunny."}
LAST = {"role": "assistant", "content": "It is sunny."}
# Written by diffusion-gemma's template behind a tool's answer and a call, where TRL's variant has no marks.
UNMARKED = {"<|turn>model\n", "<|tool_response>"}
# TRL's variant of these writes another text than the template, or there is none.
NOT_COMPARED = (
    "gemma4", "glm4moe.", "llama3_1.", "llama3_2.", "qwen3.", "qwen3_5_nothink.", "qwen3_5_think.", "qwen3_6.",
)  # fmt: skip


def row_of(name: str, kind: str) -> dict[str, Any]:
    messages = TALKS[kind]
    if name.startswith(PARTS_ONLY):
        messages = [{**m, "content": [{"type": "text", "text": m.get("content") or ""}]} for m in messages]
    return {"messages": messages, "tools": json.dumps(TOOLS) if "tool_calls" in json.dumps(messages) else None}


def of_trl(row: dict[str, Any], folder: Path, *, assistant_only: bool = False) -> tuple[list[int], list[int]]:
    """(token ids, 1 for each that carries loss), by SFTTrainer's own preparation.

    ValueError: it has no marks for this template.
    """
    args = SFTConfig(
        output_dir=str(folder), max_length=None, assistant_only_loss=assistant_only, report_to="none", use_cpu=True
    )
    marked = not assistant_only or has_generation_markers(TOKENIZER.chat_template)
    trainer: Any = SimpleNamespace(
        _tokenizer=TOKENIZER, chat_template=None if marked else get_training_chat_template(TOKENIZER),
        completion_only_loss="prompt" in row,
    )  # fmt: skip
    made = SFTTrainer._prepare_dataset(trainer, Dataset.from_list([row]), TOKENIZER, args, False, None, "train")[0]
    return made["input_ids"], [int(label != -100) for label in made["labels"]]


def of_ours(example: Any) -> tuple[list[int], list[int]]:
    row = tokenize([example], TOKENIZER, 10**6)[0]
    return row["input_ids"], row["completion_mask"]


def unlike(ids: list[int], ours: list[int], theirs: list[int]) -> set[tuple[str, str]]:
    """The stretches on which two masks differ: (who trains it, text)."""
    found: list[tuple[str, list[int]]] = []
    last = None
    for token, a, b in zip(ids, ours, theirs, strict=True):
        who = "hotlora" if a > b else "TRL" if b > a else None
        if who is not None and who == last:
            found[-1][1].append(token)
        elif who is not None:
            found.append((who, [token]))
        last = who
    return {(who, TOKENIZER.decode(tokens)) for who, tokens in found}


def parts(messages: list[dict[str, Any]], template: str, tools: Any = None, train_on: str = "assistant") -> list[str]:
    talk = read_conversation(Row("row 1", {"messages": messages, "tools": tools}))
    example = ChatTemplate(tokenizer_of(template), NOW, {}, train_on).example(talk)
    assert example.text is not None
    return [example.text[a:b] for a, b in example.spans]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_turn_is_trained_as_by_trl(name: str, tmp_path: Path):
    """But for what the generation prompt gives the model, which it need not write, and for blanks behind the
    end-of-turn token."""
    compared = 0
    for kind in ("turns", "tool and reasoning"):
        row = row_of(name, kind)
        try:
            (example,) = read(tmp_path, row, tokenizer=tokenizer_of(name))
        except DataError as error:
            told = ("refuses", "does not write the tool calls of message 2")
            assert kind != "turns" and any(part in str(error) for part in told)
            continue
        try:
            theirs = of_trl(row, tmp_path, assistant_only=True)
        except (ValueError, TemplateError):
            continue
        except TypeError:  # datasets 4 gives each message the fields of all, as None, and some templates take no None
            assert datasets.__version__ < "5"
            continue
        ids, mask = of_ours(example)
        if ids != theirs[0]:
            continue
        compared += 1
        given = [
            TOKENIZER.apply_chat_template(
                row["messages"][:n], tools=json.loads(row["tools"] or "null"), tokenize=False,
                add_generation_prompt=True,
            )[-60:]
            for n, message in enumerate(row["messages"]) if message["role"] == "assistant"
        ]  # fmt: skip
        for who, text in unlike(ids, mask, theirs[1]):
            if who == "hotlora":
                assert name.startswith("diffusion_gemma") and text in UNMARKED
            else:
                assert not text.strip() or any(text in prompt for prompt in given)
    assert compared or f"{name}.".startswith(NOT_COMPARED)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_last_answer_and_the_whole_are_trained_as_by_trl(name: str, tmp_path: Path):
    row = row_of(name, "turns")
    (example,) = read(tmp_path, row, tokenizer=tokenizer_of(name), train_on="last")
    ids, mask = of_ours(example)
    *prompt, answer = row["messages"]
    their_ids, theirs = of_trl({"prompt": prompt, "completion": [answer]}, tmp_path)
    assert ids == their_ids
    assert all(who == "TRL" and not text.strip() for who, text in unlike(ids, mask, theirs))
    (whole,) = read(tmp_path, row, tokenizer=TOKENIZER, train_on="all")
    assert of_ours(whole) == of_trl(row, tmp_path) == (ids, [1] * len(ids))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_turns_are_found_where_nothing_marks_them(name: str, monkeypatch: pytest.MonkeyPatch):
    """Each turn ends as the last one does, has its content, and nothing of what others said."""
    monkeypatch.setattr("hotlora.tasks.turns.Marks.spans", lambda *_: None)
    row = row_of(name, "turns")
    first, last = parts(row["messages"], name)
    assert "Sunny." in first and "It is sunny." in last
    assert not any(said in first + last for said in ("weather", "now", "assistant"))
    if not name.startswith(("gptoss", "glm4moe", "phi3")):  # another token ends what is not the last turn, or none
        assert first[-8:] == last[-8:] or not last.endswith(">")


def test_a_turn_is_found_where_the_template_rewrites_it():
    """Qwen3 leaves the reasoning out of turns before the last one, and writes an empty one into that."""
    thought = {"role": "assistant", "content": "Sunny.", "reasoning_content": "Look."}
    first, last = parts([USER, thought, {"role": "user", "content": "And now?"}, LAST], "qwen3")
    assert (first, last) == ("Sunny.<|im_end|>", "<think>\n\n</think>\n\nIt is sunny.<|im_end|>")
    tool = {"role": "tool", "name": "get_weather", "content": "sunny"}
    talk = [USER, call(), tool, SUNNY, {"role": "user", "content": "And now?"}, LAST]
    asked, told, last = parts(talk, "qwen3", TOOLS)
    assert asked.startswith("<tool_call>") and asked.endswith("</tool_call><|im_end|>") and told == "Sunny.<|im_end|>"


def test_a_repeated_answer_is_found_where_it_stands():
    same = {"role": "user", "content": "Sunny."}
    template = TEMPLATES["qwen3"]
    assert parts([same, SUNNY, same, SUNNY, same, SUNNY], "qwen3")[:2] == ["Sunny.<|im_end|>"] * 2
    talk = read_conversation(Row("row 1", {"messages": [same, SUNNY, same, SUNNY]}))
    example = ChatTemplate(tokenizer_of(template), NOW, {}).example(talk)
    (start, _), _ = example.spans
    assert str(example.text)[:start].endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_that_nothing_tells_is_one_error(tmp_path: Path):
    """A template that begins with all answers but the last, and writes them in their places, too."""
    told = "{% if m.role == 'assistant' and not loop.last %}{{ m.content }};{% endif %}"
    answers = f"{{% for m in messages %}}{told}{{% endfor %}}"
    talk = {"messages": [USER, SUNNY, {"role": "user", "content": "And?"}, LAST]}
    with pytest.raises(DataError, match=r"line 1: nothing tells where .* message 2, an answer. .*--train-on last"):
        read(tmp_path, talk, tokenizer=tokenizer_of(answers + CHATML))
    (example,) = read(tmp_path, talk, tokenizer=TOKENIZER, train_on="last")
    assert [str(example.text)[a:b] for a, b in example.spans] == ["It is sunny.<|im_end|>"]


def test_answers_of_the_prompt_are_not_trained(tmp_path: Path):
    """TRL's conversational prompt and completion: what is trained is the completion's."""
    turns = [USER, SUNNY, {"role": "user", "content": "And now?"}, LAST, {"role": "user", "content": "Sure?"}, SUNNY]
    (example,) = read(tmp_path, {"prompt": turns[:3], "completion": turns[3:]}, tokenizer=tokenizer_of(CHATML))
    assert [str(example.text)[a:b] for a, b in example.spans] == ["It is sunny.<|im_end|>", "Sunny.<|im_end|>"]


def test_what_follows_the_last_answer_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"messages": [USER, SUNNY, {"role": "user", "content": "Thanks!"}]}, {"messages": [USER, SUNNY]}]
    ended, plain = read(tmp_path, *rows, tokenizer=tokenizer_of(CHATML))
    assert (ended.text, ended.spans, ended.source_hash) == (plain.text, plain.spans, plain.source_hash)
    assert "line 1: what follows the last answer carries no loss and is left out" in caplog.text


def test_without_a_template_every_turn_is_trained_too(tmp_path: Path):
    tokenizer = byte_tokenizer()
    row = {"messages": [USER, SUNNY, {"role": "user", "content": "And now?"}, LAST]}

    def trained(train_on: str) -> str:
        (made,) = tokenize(read(tmp_path, row, tokenizer=tokenizer, train_on=train_on), tokenizer, 10**6)
        kept = [i for i, one in zip(made["input_ids"], made["completion_mask"], strict=True) if one]
        return tokenizer.decode(kept)

    assert trained("assistant") == f" Sunny. It is sunny.{tokenizer.eos_token}"
    assert trained("last") == f" It is sunny.{tokenizer.eos_token}"
    assert trained("all") == (
        "User: What is the weather in Paris?\n\nAssistant: Sunny.\n\nUser: And now?\n\nAssistant: It is sunny."
        f"{tokenizer.eos_token}"
    )
