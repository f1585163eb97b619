"""The formats of people's rows: which fields one is known by, and what is made of it.

A row is a conversation, which a chat template writes, or a prompt and its completion as they are.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..base.errors import DataError
from ..base.files import JSON_ERRORS
from ..base.options import suggest
from .messages import LOSS_MARKS, REASONING
from .rows import Row, need_text

ALLOWED_FIELDS = (
    "prompt + completion, messages, conversations (ShareGPT), instruction + output (Alpaca), question + answer "
    "(GSM8K's), or text"
)
CHAT_FIELDS = ("tools", "chat_template_kwargs")
# ShareGPT's names of who speaks, as LLaMA-Factory and FastChat have them; a role by its own name is left.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip


class Found(NamedTuple):
    """A row as one of the formats.

    Attributes:
        format: its name, as the log and `hotlora data` say it.
        read: the fields that are read.
        messages: of a conversation.
        first_trained: the answers before this message are of the prompt.
        is_text: it is a prompt and its completion; Alpaca's rows are both.
        prompt, completion: where the fields are called so, or it is a text alone.
        note: what of the row is not taken.
    """

    format: str
    read: tuple[str, ...]
    messages: Any = None
    first_trained: int = 0
    is_text: bool = False
    prompt: str = ""
    completion: str = ""
    note: str = ""


def detect(row: Row) -> Found:
    """A field that is null is none: pandas writes one where a row has none.

    DataError: the row is of no format, or a field of its format holds what it cannot.
    """
    fields = {name for name, value in row.values.items() if value is not None}
    if {"prompt", "completion"} <= fields:
        return _prompt_completion(row)
    if "messages" in fields:
        return Found("messages", ("messages", *CHAT_FIELDS), _listed(row, "messages"))
    for name in ("conversations", "conversation"):
        if name in fields:
            return _sharegpt(row, name)
    if {"instruction", "output"} <= fields:
        return _alpaca(row)
    if {"question", "answer"} <= fields:
        return Found("question + answer", ("question", "answer"), is_text=True)
    if "text" in fields and not fields & {"prompt", "completion", "question", "answer", "instruction", "output"}:
        (text,) = need_text(row, "text")
        return Found("text", ("text",), is_text=True, completion=text)
    null = sorted(row.values.keys() - fields)
    nulls = f" ({', '.join(null)}: null)" if null else ""
    advice = ""
    if {"chosen", "rejected"} <= fields:
        advice = " To train on the chosen answers alone: --columns completion=chosen."
    raise DataError(
        f"{row.place}: has {', '.join(sorted(fields)) or 'no fields'}{nulls}; a row needs {ALLOWED_FIELDS}. Other "
        f"names: --columns prompt=NAME,completion=NAME.{advice}"
    )


def renamed_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its fields under the formats' names. DataError: it has no such field."""
    for column in columns.values():
        if column not in row.values:
            raise DataError(
                f"{row.place} has no field {column!r}, which --columns names; it has "
                f"{', '.join(sorted(row.values)) or 'none'}."
            )
    kept = {name: value for name, value in row.values.items() if name not in columns.values()}
    return Row(row.place, kept | {name: row.values[column] for name, column in columns.items()})


def read_columns(text: str | Mapping[str, str]) -> dict[str, str]:
    """`prompt=question,completion=answer` as {format's name: column}, which is taken, too. DataError: it is not of that
    form."""
    if isinstance(text, Mapping):
        text = ",".join(f"{name}={column}" for name, column in text.items())
    found: dict[str, str] = {}
    for pair in text.split(","):
        name, sign, column = (part.strip() for part in pair.partition("="))
        if not (name and sign and column) or name in found:
            raise DataError(f"columns = {text!r}: give each name once, as in prompt=question,completion=answer.")
        if name not in _NAMES:
            turned = f" (did you mean {column}={name}?)" if column in _NAMES else ""
            raise DataError(f"columns = {text!r} names what no format has: {suggest([name], _NAMES)}{turned}.")
        found[name] = column
    return found


_NAMES = (
    "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system", "history",
    "question", "answer", "text", *CHAT_FIELDS,
)  # fmt: skip


def _prompt_completion(row: Row) -> Found:
    """Texts, or messages as TRL's conversational prompt-completion has them: the completion's answers are trained."""
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        read = ("prompt", "completion", *CHAT_FIELDS)
        return Found("prompt + completion of messages", read, [*prompt, *completion], len(prompt))
    prompt, completion = need_text(row, "prompt", "completion")
    return Found("prompt + completion", ("prompt", "completion"), is_text=True, prompt=prompt, completion=completion)


def _sharegpt(row: Row, name: str) -> Found:
    turns = _listed(row, name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{row.place}: {name!r} must be a list of objects with 'from' and 'value'.")
    if all("role" in turn and "content" in turn for turn in turns):
        return Found(name, (name, *CHAT_FIELDS), turns)
    messages = [_message(row, name, turn) for turn in turns]
    system = row.values.get("system") or ""
    if not isinstance(system, str):
        raise DataError(f"{row.place}: 'system' must be text.")
    if system.strip() and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    elif system.strip() and system.strip() != messages[0]["content"].strip():
        note = "'system' is left out, as the first turn is another one of it"
        return Found("ShareGPT", (name, "system", *CHAT_FIELDS), messages, note=note)
    return Found("ShareGPT", (name, "system", *CHAT_FIELDS), messages)


def _message(row: Row, name: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    who, value = turn.get("from"), turn.get("value")
    if not isinstance(who, str) or not isinstance(value, str):
        raise DataError(f"{row.place}: each of {name!r} needs 'from' and 'value', both texts.")
    role = _ROLES.get(who, who)
    marks = {mark: turn[mark] for mark in (*LOSS_MARKS, *REASONING) if mark in turn}
    if who != "function_call":
        return {"role": role, "content": value, **marks}
    try:
        calls = json.loads(value)
    except JSON_ERRORS as error:
        raise DataError(f"{row.place}: a function_call's value must be JSON, name and arguments ({error}).") from error
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": role, "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls], **marks
    }  # fmt: skip


def _alpaca(row: Row) -> Found:
    """As a conversation, the input stands behind the instruction."""
    instruction, output = need_text(row, "instruction", "output")
    values = row.values
    more = values.get("input") or ""
    system, history = values.get("system") or "", values.get("history") or []
    for name, value in (("input", more), ("system", system)):
        if not isinstance(value, str):
            raise DataError(f"{row.place}: {name!r} must be text.")
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise DataError(f"{row.place}: 'history' must be a list of pairs of texts, [instruction, answer].")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for asked, said in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages += [
        {"role": "user", "content": f"{instruction}\n{more}" if more.strip() else instruction},
        {"role": "assistant", "content": output},
    ]
    # The text that Alpaca's models read has no place for a system message or turns before.
    is_text = not system.strip() and not history
    return Found("Alpaca", ("instruction", "input", "output", "system", "history"), messages, is_text=is_text)


def _listed(row: Row, name: str) -> Any:
    """A list; a table of texts (CSV) has it as JSON."""
    value = row.values[name]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except JSON_ERRORS:
        return value
