"""Every trained turn is treated alike: empty answers, calls that are not written, and ends that are no single token."""

from pathlib import Path

import pytest
from test_chat import ANSWER, CHATML, TOOL, TOOLS, USER, call, read, tokenizer_of
from test_turns import LAST, SUNNY
from tiny_tokenizer import byte_tokenizer

from hotlora.base.errors import DataError
from hotlora.tasks.tokens import tokenize

AGAIN = {"role": "user", "content": "And now?"}
SILENT = {"role": "assistant", "content": ""}
NEVER = r"line 1: the chat template does not write the tool calls of message 2,.*\"weight\": 0.*--train-on last"


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("name", ["get_weather", "now"])
def test_a_call_that_is_not_written_is_refused_in_every_turn(train_on: str, name: str, tmp_path: Path):
    """Also where its name stands in what others say."""
    asked = call(content="")
    asked["tool_calls"][0]["function"]["name"] = name
    row = {"messages": [USER, asked, TOOL, SUNNY, AGAIN, ANSWER], "tools": TOOLS}
    with pytest.raises(DataError, match=NEVER):
        read(tmp_path, row, tokenizer=tokenizer_of(CHATML), train_on=train_on)
    assert read(tmp_path, row, tokenizer=tokenizer_of(CHATML), train_on="last")
    marked = {**row, "messages": [USER, {**asked, "weight": 0}, *row["messages"][2:]]}
    assert read(tmp_path, marked, tokenizer=tokenizer_of(CHATML), train_on=train_on)
    assert read(tmp_path, row, tokenizer=tokenizer_of("qwen3"), train_on=train_on)


@pytest.mark.parametrize(("train_on", "told"), [("assistant", "2 of 5"), ("all", "2 of 5"), ("last", "1 of 2")])
@pytest.mark.parametrize("template", [CHATML, None])
def test_empty_answers_are_counted_by_turn(
    train_on: str, told: str, template: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tokenizer = byte_tokenizer() if template is None else tokenizer_of(template)
    rows = [{"messages": [USER, SILENT, AGAIN, SUNNY, AGAIN, ANSWER]}, {"messages": [USER, SUNNY, AGAIN, SILENT]}]
    read(tmp_path, *rows, tokenizer=tokenizer, train_on=train_on)
    (line,) = [r.getMessage() for r in caplog.records if "answers are empty" in r.getMessage()]
    assert line.startswith(told)
    assert line.endswith("rows.jsonl line 1, message 2" if train_on != "last" else "rows.jsonl line 2")


def test_reasoning_alone_that_is_not_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    thought = {"role": "assistant", "content": "", "reasoning_content": "Look at the sky."}
    read(tmp_path, {"messages": [USER, thought, AGAIN, LAST]}, tokenizer=tokenizer_of("qwen3"))
    assert "reasoning of an earlier answer that has nothing else" in caplog.text


@pytest.mark.parametrize("template", [CHATML, "qwen3", "qwen2_5", "gemma3"])
def test_an_end_of_several_tokens_is_trained_in_every_turn(
    template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer_of(template).chat_template
    row = {"messages": [USER, SUNNY, AGAIN, SUNNY, AGAIN, LAST]}
    (example,) = read(tmp_path, row, tokenizer=tokenizer)
    parts = [str(example.text)[a:b] for a, b in example.spans]
    end = "<end_of_turn>" if template == "gemma3" else "<|im_end|>"
    assert parts[:2] == [f"Sunny.{end}"] * 2 and parts[2].endswith(f"It is sunny.{end}")
    assert f"ends an answer with '{end}', which is no token of this tokenizer" in caplog.text
    (made,) = tokenize([example], tokenizer, 10**6)
    kept = [i for i, one in zip(made["input_ids"], made["completion_mask"], strict=True) if one]
    assert tokenizer.decode(kept) == "".join(parts)
    caplog.clear()
    read(tmp_path, row, tokenizer=tokenizer_of(template))
    assert "no token of this tokenizer" not in caplog.text


def test_blanks_that_end_an_answer_are_trained_in_every_turn(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (example,) = read(tmp_path, {"messages": [USER, SUNNY, AGAIN, LAST]}, tokenizer=tokenizer)
    assert [str(example.text)[a:b] for a, b in example.spans] == ["Sunny.\n\n", "It is sunny.\n\n"]
