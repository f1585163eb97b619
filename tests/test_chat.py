"""Conversations: the trained text is what the chat template writes, and the loss is on the answer alone.

The templates are those that TRL bundles, so that they are real ones and no network is needed.
"""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import trl
from tiny_tokenizer import byte_tokenizer

from hotlora.base.errors import DataError
from hotlora.tasks.chat import ChatTemplate, at_time
from hotlora.tasks.data import data_hash, load_examples
from hotlora.tasks.messages import read_conversation
from hotlora.tasks.rows import Row
from hotlora.tasks.tokens import encode_prompt, tokenize

TEMPLATES = {
    file.stem: file.read_text("utf-8") for file in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
}
NOW = datetime(2026, 2, 3, 4, 5, 6)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
USER = {"role": "user", "content": "What is the weather in Paris?"}
ANSWER = {"role": "assistant", "content": "It is sunny."}
THOUGHT = {**ANSWER, "reasoning_content": "Look at the sky."}
TOOL = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "sunny, 21 C"}


def call(arguments: object = None, **more: object) -> dict:
    function = {"name": "get_weather", "arguments": arguments or {"city": "Paris"}}
    return {"role": "assistant", **more, "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]}


TALKS = {
    "single": [USER, ANSWER],
    "turns": [USER, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And now?"}, ANSWER],
    "system": [{"role": "system", "content": "Be brief."}, USER, ANSWER],
    "reasoning": [USER, {**THOUGHT, "content": "Sunny."}, {"role": "user", "content": "And now?"}, THOUGHT],
    "call": [USER, call(content="")],
    "call without content": [USER, call()],
    "call with null": [USER, call(content=None)],
    "call with text": [USER, call('{"city": "Paris"}', content="")],
    "tool": [USER, call(content=""), TOOL, ANSWER],
    "tool and reasoning": [USER, call(content="", reasoning_content="Ask for it."), TOOL, THOUGHT],
}
# What a template must take; of the rest it may refuse a row, or write nothing of it.
WRITES_CALLS = (
    "deepseek", "diffusion", "gemma4", "glm", "gptoss", "lfm2_2_5", "llama3_1", "llama3_2", "muse", "nemotron",
    "qwen2_5.", "qwen3",
)  # fmt: skip
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")  # they read no plain text
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKS = {mark for text in TEMPLATES.values() for mark in re.findall(r"<[|｜]?[\w▁/]+[|｜]?>", text)}
TOKENIZER = byte_tokenizer(extra_special_tokens=sorted(_MARKS))


def tokenizer_of(template: str):
    TOKENIZER.chat_template = TEMPLATES.get(template, template)
    return TOKENIZER


def read(folder: Path, *rows: dict, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(path), **options)


def trained(example) -> str:
    row = tokenize([example], TOKENIZER, 10**6)[0]
    return TOKENIZER.decode([i for i, kept in zip(row["input_ids"], row["completion_mask"], strict=True) if kept])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_is_trained_is_what_the_template_writes(name: str, tmp_path: Path):
    tokenizer, learned = tokenizer_of(name), set()
    for kind, messages in TALKS.items():
        if name.startswith(PARTS_ONLY):
            messages = [{**m, "content": [{"type": "text", "text": m.get("content") or ""}]} for m in messages]
        row = {"messages": messages, "tools": TOOLS if "tool_calls" in json.dumps(messages) else None}
        try:
            whole, prompt = (
                tokenizer.apply_chat_template(some, tokenize=False, tools=row["tools"], add_generation_prompt=asked)
                for some, asked in ((messages, False), (messages[:-1], True))
            )
        except Exception:
            whole = prompt = None  # the template refuses it
        try:
            (example,) = read(tmp_path, row, tokenizer=tokenizer)
        except DataError as error:
            assert "rows.jsonl line 1" in str(error)
            calls = "the answer's tool calls" if kind.startswith("call") else "the tool calls of message 2"
            assert whole is None or (f"does not write {calls}" in str(error) and kind.startswith(("call", "tool")))
            continue
        ids = tokenize([example], tokenizer, 10**6)[0]["input_ids"]
        if whole is not None:
            assert tokenizer.decode(ids) == whole
            assert tokenizer.decode(encode_prompt(example, tokenizer)) == prompt
        learned.add(kind)
        answer = trained(example)
        for said in ("get_weather", "Paris") if kind.startswith("call") else ("It is sunny.",):
            assert said in answer
        assert "weather in" not in answer and "21 C" not in answer and "And now" not in answer
        assert "<|im_start|>" not in answer and "<|start_header_id|>" not in answer and "<start_of_turn>" not in answer
        if kind.endswith("reasoning") and "Look at the sky." in (whole or "")[len(prompt or "") - 30 :]:
            assert "Look at the sky." in answer
        # The end-of-turn token is learned, and nothing after it, nor a second one. GLM-4's ends with the next turn.
        end = (whole or tokenizer.decode(ids)).rstrip()
        assert answer.endswith(end[-12:]) and (name.startswith("glm4moe") or end.endswith((">", "]")))
    assert {"single", "turns"} <= learned
    if f"{name}.".startswith(WRITES_CALLS) and not name.startswith("deepseek_r1_distill"):
        assert {"call without content", "call with text", "tool"} & learned


@pytest.mark.parametrize("name", ["nemotron_3_nano", "nemotron_3_5_lightning", "deepseekv3", "deepseek_r1_distill"])
def test_an_answer_does_not_land_inside_of_an_open_think(name: str, tmp_path: Path):
    """The generation prompt opens <think>; a conversation without reasoning does not have it, or closes it at once."""
    (example,) = read(tmp_path, {"messages": TALKS["single"]}, tokenizer=tokenizer_of(name))
    assert example.prompt.endswith("<think>\n") and example.text is not None
    assert "<think>\nIt is" not in example.text
    assert trained(example) in ("</think>It is sunny.<|im_end|>", "It is sunny.<｜end▁of▁sentence｜>")


def test_an_answer_that_begins_as_the_generation_prompt_goes_on_is_learned_whole(tmp_path: Path):
    (example,) = read(
        tmp_path, {"messages": [USER, {"role": "assistant", "content": "<b>E"}]}, tokenizer=tokenizer_of("deepseekv3")
    )
    assert trained(example) == "<b>E<｜end▁of▁sentence｜>"


def test_a_template_may_end_every_text(tmp_path: Path):
    ends = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    ends += "{{ '<assistant><think>' if add_generation_prompt else eos_token }}"
    (example,) = read(tmp_path, {"messages": [USER, ANSWER]}, tokenizer=tokenizer_of(ends))
    assert trained(example) == "It is sunny.<eos>"


def test_marks_tell_the_answer_where_a_template_rewrites_what_came_before(tmp_path: Path):
    """gpt-oss drops the reasoning before a tool call once the final answer is there."""
    # It reads `thinking`, which transformers before 5.23 does not give it for `reasoning_content`.
    talk = [
        {**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m
        for m in TALKS["tool and reasoning"]
    ]
    row = {"messages": talk, "tools": TOOLS}
    (example,) = read(tmp_path, row, tokenizer=tokenizer_of("gptoss"), train_on="last")
    assert "Ask for it." in example.prompt and "Ask for it." not in str(example.text)
    assert trained(example) == (
        "<|channel|>analysis<|message|>Look at the sky.<|end|><|start|>assistant<|channel|>final<|message|>It is sunny."
        "<|return|>"
    )
    counts = "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"line 1: .* nothing tells where the answer begins. Put \{% generation %\}"):
        read(tmp_path, {"messages": [USER, ANSWER]}, tokenizer=tokenizer_of(counts))


def test_tools_and_options_reach_every_rendering(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer, row = tokenizer_of("qwen3"), {"messages": [USER, ANSWER]}
    given = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    (plain,) = read(tmp_path, row, tokenizer=tokenizer)
    (full,) = read(tmp_path, {**row, **given}, tokenizer=tokenizer)
    assert "# Tools" in full.prompt and full.prompt.endswith("<think>\n\n</think>\n\n") and plain.prompt != full.prompt
    assert full.prompt == tokenizer.apply_chat_template(
        [USER], tools=TOOLS, enable_thinking=False, tokenize=False, add_generation_prompt=True
    )
    assert str(full.text).startswith(full.prompt) and trained(full) == "It is sunny.<|im_end|>"
    assert [full] == read(tmp_path, {**row, **given, "tools": json.dumps(TOOLS)}, tokenizer=tokenizer)
    # For all rows: in Python, or in a file beside.
    assert [full] == read(tmp_path, row, tokenizer=tokenizer, **given)
    (tmp_path / "rows.chat.json").write_text(json.dumps(given))
    assert [full] == read(tmp_path, row, tokenizer=tokenizer)
    assert data_hash([full]) != data_hash([plain])
    # A row's own come before the data set's.
    own = {"tools": [], "chat_template_kwargs": {"enable_thinking": True}}
    (other,) = read(tmp_path, {**row, **own}, tokenizer=tokenizer)
    assert other.prompt == plain.prompt
    (tmp_path / "rows.chat.json").write_text('{"tool": []}')
    with pytest.raises(DataError, match=r"rows.chat.json: has tool; it may hold tools and chat_template_kwargs"):
        read(tmp_path, row, tokenizer=tokenizer)
    (tmp_path / "rows.chat.json").unlink()
    assert not caplog.records
    for wrong, message in (
        ({"tools": "no"}, "line 1: 'tools' is text that is no JSON"),
        ({"tools": {"name": "f"}}, "line 1: 'tools' must be a list"),
        ({"chat_template_kwargs": [1]}, "line 1: 'chat_template_kwargs' must be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "line 1: 'chat_template_kwargs' cannot hold tokenize"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path, {**row, **wrong}, tokenizer=tokenizer)


def test_what_nothing_reads_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [
        {"messages": [USER, {**THOUGHT, "rating": 1}], "tools": TOOLS, "source": "x", "chat_template_kwargs": {"a": 1}},
        {"prompt": "a", "completion": "b", "id": 7},
        {"prompt": "a", "completion": "b", "id": 8},
        {"messages": [USER, call(content="Wait."), TOOL, ANSWER]},
    ]
    read(tmp_path, *rows[:3], tokenizer=tokenizer_of("gemma3"))
    told = [record.getMessage().replace(str(tmp_path), "") for record in caplog.records]
    assert told == [
        "/rows.jsonl: nothing reads id, source",
        "/rows.jsonl line 1: the chat template does not read 'tools' (told once)",
        "/rows.jsonl line 1: the chat template does not read 'a' of 'chat_template_kwargs' (told once)",
        "/rows.jsonl line 1: the chat template does not read 'reasoning_content' of 'messages' (told once)",
        "/rows.jsonl line 1: the chat template does not read 'rating' of 'messages' (told once)",
    ]
    caplog.clear()
    read(tmp_path, rows[3], tokenizer=tokenizer_of("llama3"), train_on="last")
    read(tmp_path, {"messages": TALKS["call with text"], "tools": TOOLS}, tokenizer=tokenizer_of("llama3_1"))
    read(tmp_path, {"messages": TALKS["single"]}, tokenizer=tokenizer_of("glm4moe"))
    text = "\n".join(record.getMessage() for record in caplog.records)
    for said in ("does not read 'tool_calls'", "as quoted text", "writes no end-of-turn token"):
        assert text.count(said) == 1


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("gemma", TALKS["system"], "refuses it .*System role not supported"),
        ("gemma", [USER, USER, ANSWER], "refuses it .*must alternate"),
        ("deepseekv3", [USER, call(content="")], "refuses it .*not \"dict\".* JSON text for some"),
        ("qwen3_5_think", [USER, call("{}", content="")], "refuses it .*arguments of tool calls are an object"),
        ("gemma3", [USER, call()], "does not write the answer's tool calls"),
        ("smolvlm", [USER, ANSWER], "does not write the answer's content"),
        ("qwen3", [USER, {"role": "assistant"}], "needs no content"),
        ("qwen3", [{"role": "user", "content": None}, ANSWER], "must be a list of objects"),
        ("qwen3", [USER, {**ANSWER, "tool_calls": ["f"]}], "must be a list of objects"),
        ("qwen3", [USER, {"role": "assistant", "content": [{"type": "image"}]}], "must be a list of objects"),
        ("{{ messages[0].content.no.such }}", [USER, ANSWER], "refuses it .*UndefinedError"),
        ("{% for", [USER, ANSWER], "refuses it .*TemplateSyntaxError"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_learned_is_one_error_with_its_line(template: str, messages, message: str, tmp_path: Path):
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=f"rows.jsonl line 2: .*{message}"):
        read(tmp_path, good, {"messages": messages, "tools": TOOLS}, good, tokenizer=tokenizer_of(template))


def test_a_message_that_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"messages": [{"role": "system", "content": f"Be brief {i}."}, USER, ANSWER]} for i in range(2)]
    users = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert len(read(tmp_path, *rows, tokenizer=tokenizer_of(users))) == 2
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith(
        "line 1: the chat template does not write the content of a message of role 'system' (told once)"
    )


def test_conversations_without_a_template_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (example, _) = read(
        tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}, tokenizer=byte_tokenizer()
    )
    assert example.prompt.startswith("User: ") and example.prompt.endswith("\n\nAssistant:")
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the tokenizer has no chat template, so conversations are written as 'User: …'" in told


def test_tool_calls_need_a_template(tmp_path: Path):
    plain = byte_tokenizer()
    with pytest.raises(DataError, match="line 1: the tokenizer has no chat template"):
        read(tmp_path, {"messages": TALKS["call"]}, tokenizer=plain)
    (example,) = read(tmp_path, {"messages": TALKS["call"]})  # for its size
    assert "get_weather" in example.completion


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_the_date_is_no_part_of_the_hash_and_is_the_runs_own(name: str, tmp_path: Path):
    tokenizer, rows = tokenizer_of(name), [{"messages": TALKS["single"]}, {"messages": TALKS["turns"]}]
    first, next_day = (read(tmp_path, *rows, tokenizer=tokenizer, now=NOW.replace(day=day)) for day in (3, 4))
    assert first == read(tmp_path, *rows, tokenizer=tokenizer, now=NOW)
    assert first[0].text != next_day[0].text and data_hash(first) == data_hash(next_day)
    assert re.search("2026-02-03|03 Feb 2026", str(first[0].text)) and "2026" in first[0].prompt
    today = tokenizer.apply_chat_template(TALKS["single"], tokenize=False)
    assert read(tmp_path, *rows, tokenizer=tokenizer)[0].text == today  # else as transformers writes it


def test_every_directive_of_a_date_is_the_moments():
    day = "{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}{{ day('%A %-d. %B %Y, %H:%M') }}"
    tokenizer = tokenizer_of(at_time(f"{{%if true%}}\n{day}{{% endif %}}", NOW))
    assert tokenizer.apply_chat_template([USER], tokenize=False) == "Tuesday 3. February 2026, 04:05"
    assert at_time("no date", NOW) == "no date"


def test_the_same_rows_have_one_hash_whatever_writes_them(tmp_path: Path):
    row = {"messages": TALKS["turns"]}
    hashes = {data_hash(read(tmp_path, row, tokenizer=tokenizer_of(name))) for name in ("qwen3", "gemma", "phi3")}
    hashes.add(data_hash(read(tmp_path, row, tokenizer=byte_tokenizer())))
    assert len(hashes) == 1
    assert hashes != {data_hash(read(tmp_path, {"messages": TALKS["single"]}, tokenizer=tokenizer_of("phi3")))}


def test_blanks_at_the_edges_are_told_apart_by_tokenizers_that_leave_them_out_of_offsets(tmp_path: Path):
    """As Llama 3's (trim_offsets): a token that is all blank has no characters there."""
    from tokenizers import processors

    tokenizer = byte_tokenizer(extra_special_tokens=["<|im_end|>", "<|im_start|>"])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = TEMPLATES["qwen2_5"]
    messages = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": " \n é 日 \n "}]
    (example,) = read(tmp_path, {"messages": messages}, tokenizer=tokenizer)
    row = tokenize([example], tokenizer, 10**6)[0]
    kept = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(kept) == " \n é 日 \n <|im_end|>" and tokenizer.decode(row["input_ids"]) == example.text
    assert row["completion_mask"][-1] == 0  # the line break after the end of the turn


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_content_in_parts_is_written_as_text_is(name: str, tmp_path: Path):
    """Where a template writes a list as Python does, or nothing of it, it is given the text of the parts."""
    messages = [{"role": "system", "content": "Be brief."}] if not name.startswith("gemma") else []
    messages += [HI, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "a\nb"}, ANSWER]
    listed = {"messages": [{**m, "content": parts(m["content"])} for m in messages]}
    (example,) = read(tmp_path, listed, tokenizer=tokenizer_of(name))
    assert "'text'" not in str(example.text) and '"text"' not in str(example.text)
    if name.startswith(PARTS_ONLY):  # which refuse a text by an error, and write none silently
        for number in range(1, 5):
            row = [dict(m) if i == number else {**m, "content": parts(m["content"])} for i, m in enumerate(messages)]
            if number != 2:  # what an assistant said before
                with pytest.raises(
                    DataError, match=r"line 1: the (chat template does not write|model's chat template)"
                ):
                    read(tmp_path, {"messages": row}, tokenizer=tokenizer_of(name))
    else:
        (plain,) = read(tmp_path, {"messages": messages}, tokenizer=tokenizer_of(name))
        # DiffusionGemma puts a blank behind the parts of a system message.
        assert str(example.text).replace("brief. ", "brief.") == plain.text and trained(example) == trained(plain)
        assert example.source_hash != plain.source_hash  # what was read


def test_parts_that_a_template_takes_no_list_of_are_joined_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    row = {"messages": [{"role": "user", "content": parts("h", "i")}, {"role": "assistant", "content": parts("s")}]}
    as_json = CHATML.replace("m.content }}", "m.content if m.content is string else m.content | tojson }}")
    for template in (CHATML, as_json):
        (example,) = read(tmp_path, row, tokenizer=tokenizer_of(template))
        assert example.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\ns<|im_end|>\n"
        assert trained(example) == "s<|im_end|>"
    assert "takes no list as content" in caplog.text
    silent = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}")
    with pytest.raises(DataError, match=r"rows.jsonl line 1: the chat template does not write the user's content"):
        read(tmp_path, row, tokenizer=tokenizer_of(silent))
    with pytest.raises(DataError, match="line 1: 'messages' must be a list of objects"):
        read(tmp_path, {"messages": [HI, {"role": "assistant", "content": []}]}, tokenizer=tokenizer_of(CHATML))
    # What it takes out of a user's text (/no_think of some) is its own affair.
    rewrites = CHATML.replace("{{ m.content }}", "{{ m.content | replace(' /no_think', '') }}")
    row = {"messages": [{"role": "user", "content": "A long question? /no_think"}, ANSWER]}
    (example,) = read(tmp_path, row, tokenizer=tokenizer_of(rewrites))
    assert example.prompt.count("A long question?<|im_end|>") == 1


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m.role }}: {% if loop.last %}!{% endif %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.mark.parametrize("content", ["Apples\nare fine", "A: fine", "A"])
def test_an_answer_that_begins_as_its_header_is_learned_whole_behind_marks(content: str, tmp_path: Path):
    row = {"messages": [HI, {"role": "assistant", "content": content}]}
    (example,) = read(tmp_path, row, tokenizer=tokenizer_of(MARKED))
    assert trained(example) == f"{content}<|im_end|>"
    inside = MARKED.replace("A: {% generation %}", "{% generation %}A: ")
    (example,) = read(tmp_path, row, tokenizer=tokenizer_of(inside))
    assert trained(example) == f"{content}<|im_end|>"


@pytest.mark.parametrize("opens", ["<think>", "THINK:", "[THINK]"])
def test_a_call_that_begins_as_the_generation_prompt_goes_on_is_learned_whole(opens: str, tmp_path: Path):
    written = {"<think>": "<tcall>", "THINK:": "TOOL:", "[THINK]": "[TOOL]"}[opens]
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for t in m.tool_calls or [] %}" + written
        + "{{ t.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>"
        + opens + "\n{% endif %}"
    )  # fmt: skip
    (example,) = read(tmp_path, {"messages": [HI, call()]}, tokenizer=tokenizer_of(template))
    assert trained(example).startswith(f'{written}{{"name": "get_weather"')


def test_the_end_of_the_users_turn_is_not_learned_by_chance(tmp_path: Path):
    """The generation prompt changes the last user's turn, and what ends that ends the answer too."""
    more = "{{ m.content }}{% if add_generation_prompt and loop.last %} /t{% endif %}"
    switch = CHATML.replace("{{ m.content }}", more)
    with pytest.raises(DataError, match=r"line 1: .* nothing tells where the answer begins. Put \{% generation %\}"):
        read(tmp_path, {"messages": [USER, ANSWER]}, tokenizer=tokenizer_of(switch))
    marks = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    )
    marks = f"{marks}{{% endgeneration %}}{{% else %}}{more}<|im_end|>"
    marks += "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    (example,) = read(tmp_path, {"messages": [USER, ANSWER]}, tokenizer=tokenizer_of(marks))
    assert trained(example) == "It is sunny.<|im_end|>"


def test_a_short_answer_that_is_not_written_is_not_found_elsewhere(tmp_path: Path):
    users = "{% for m in messages %}<{{ m.role }}>{{ m.content if m.role == 'user' }}<eos>{% endfor %}"
    users += "{% if add_generation_prompt %}<assistant>{% endif %}"
    for last, message in (
        ({"role": "assistant", "content": "s"}, "content"),
        ({"role": "assistant", "content": parts("s")}, "content"),
        ({"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "e"}}]}, "tool calls"),
    ):
        with pytest.raises(DataError, match=f"line 2: the chat template does not write the answer's {message}"):
            read(tmp_path, {"prompt": "a", "completion": "b"}, {"messages": [HI, last]}, tokenizer=tokenizer_of(users))


def test_short_rows_of_one_form_are_rendered_once_more_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer, count = tokenizer_of("qwen3"), []
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *a, **k: count.append(1) or render(*a, **k))
    rows = [{"messages": [HI, {"role": "assistant", "content": f"{i}"}]} for i in range(20)]
    assert len(read(tmp_path, *rows, tokenizer=tokenizer)) == 20 and len(count) <= 20 * 2 + 5


def test_empty_answers_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    silent = [
        {"prompt": "a", "completion": ""},
        {"messages": [HI, {"role": "assistant", "content": " \n"}]},
        {"messages": [HI, {"role": "assistant", "content": parts("")}]},
    ]
    said = [{"messages": TALKS["call"], "tools": TOOLS}, {"messages": [HI, {**THOUGHT, "content": ""}]}]
    for tokenizer in (tokenizer_of("qwen3"), None):
        caplog.clear()
        assert len(read(tmp_path, {"prompt": "a", "completion": "b"}, *silent, *said, tokenizer=tokenizer)) == 6
        (told,) = [r.getMessage() for r in caplog.records if "answers are empty" in r.getMessage()]
        assert told.startswith("3 of 6 answers are empty") and told.endswith("rows.jsonl line 2")


def test_a_template_may_go_by_what_stands_around_a_message(tmp_path: Path):
    """What a row of the same form has shown refuses no later one: each is looked at before it is refused."""
    first = "{% for m in messages %}{{ m.role }}:"
    first += "{{ m.content if messages[0].role != 'developer' or m.role == 'assistant' }}<eos>"
    first += "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    template = ChatTemplate(tokenizer_of(first), NOW, {})
    talk, before = [HI, {"role": "assistant", "content": "ho"}], {"role": "developer", "content": "x"}
    with pytest.raises(DataError, match="line 1: the chat template does not write the user's content"):
        template.example(read_conversation(Row("line 1", {"messages": [before, *talk]})))
    assert template.example(read_conversation(Row("line 2", {"messages": talk}))).prompt == "user:hi<eos>assistant:"
