"""A conversation as a row holds it: its messages, tools and options, and what is to be read in them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..base.errors import DataError
from ..base.files import JSON_ERRORS
from .rows import Row
from .task import Example

# What apply_chat_template is given by other ways than chat_template_kwargs.
_TAKEN = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
LOSS_MARKS = ("weight", "loss", "train")
REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers gives the template all, whichever a row has


@dataclass(frozen=True)
class Conversation:
    """A row's messages, and what else the template is given. `options` are its chat_template_kwargs; answers before
    message `first_trained` are of the prompt."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]
    first_trained: int = 0

    @property
    def hash(self) -> str:
        """SHA-256 of what was read, which no template and no date is part of."""
        more = [self.first_trained] if self.first_trained else []
        return hashlib.sha256(
            json.dumps([self.messages, self.tools, self.options, *more], default=str).encode()
        ).hexdigest()


def read_conversation(
    row: Row,
    tools: Any = None,
    options: Mapping[str, Any] | None = None,
    *,
    messages: Any = None,
    first_trained: int = 0,
) -> Conversation:
    """The conversation of a row, up to its last answer; `tools` and `options` are the data set's, where the row has
    none.

    messages: the row's, where it holds them otherwise than as `messages`.

    Raises:
        DataError: messages, tools or chat_template_kwargs of another form.
    """
    messages = row.values["messages"] if messages is None else messages
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DataError(
            f"{row.place}: 'messages' must be a list of objects with 'role' and 'content', a text or a list of "
            "one or more {'type': 'text', 'text': …}; only an assistant's message with 'tool_calls' or reasoning needs "
            "no content."
        )
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant" and carries_loss(m)), default=0)
    if last < max(1, first_trained):
        what = f"{'its completion has ' if first_trained else ''}{_roles(messages[first_trained:])}"
        raise DataError(
            f"{row.place}: has no answer to learn, {what}: one of the messages behind the first must be of role "
            "'assistant', and not marked as without loss ('weight': 0)."
        )
    given = template_options(row.place, row.values.get("chat_template_kwargs") or {})
    options = template_options(row.place, {**(options or {}), **given})
    own = row.values.get("tools")
    tools = tools_of(row.place, tools if own is None else own)
    return Conversation(row.place, messages[: last + 1], tools, options, first_trained)


def _roles(messages: list[dict[str, Any]]) -> str:
    return f"{len(messages)} messages of roles {short([message['role'] for message in messages])}"


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return False
    if content is None:
        return message["role"] == "assistant" and bool(calls or reasoning(message))
    parts = content if isinstance(content, list) else [{"text": content}]
    return bool(parts) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)


def carries_loss(message: Mapping[str, Any]) -> bool:
    """Whether a message is not marked as one that is not to be learned: by OpenAI's and Mistral's `weight`, ms-swift's
    `loss` or Axolotl's `train`."""
    weight = message.get("weight")
    is_zero = isinstance(weight, int | float) and weight == 0
    return not (is_zero or any(message.get(name) is False for name in LOSS_MARKS[1:]))


def template_options(place: str, options: Any) -> dict[str, Any]:
    """What a chat template is given besides messages and tools. DataError: no object, or it holds what has another
    place."""
    if not isinstance(options, dict):
        raise DataError(f"{place}: 'chat_template_kwargs' must be an object, this is {short(options)}.")
    if taken := sorted(set(options).intersection(_TAKEN)):
        raise DataError(f"{place}: 'chat_template_kwargs' cannot hold {', '.join(taken)}: leave it out.")
    return options


def tools_of(place: str, tools: Any) -> list[dict[str, Any]] | None:
    """Tools as a chat template takes them, of a list or its JSON text; None: there are none. DataError: neither."""
    if isinstance(tools, str):  # as TRL takes them, too: a column of one type for tools of many
        try:
            tools = json.loads(tools)
        except JSON_ERRORS as error:
            raise DataError(f"{place}: 'tools' is text that is no JSON ({error}); give a list of objects.") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{place}: 'tools' must be a list of objects (JSON schemas), this is {short(tools)}.")
    return tools or None


def as_plain_text(talk: Conversation, sized: bool, every_turn: bool = False) -> Example:
    """`User: …`, a blank line, `Assistant: …`: for tokenizers without a chat template.

    Args:
        sized: there is no tokenizer, so the text is for its size, or to be read.
        every_turn: the answers before the last one are trained, too.
    """
    if not sized and any(m.get("content") is None or m.get("tool_calls") for m in talk.messages):
        raise DataError(f"{talk.place}: the tokenizer has no chat template, which a row with tool calls needs.")
    trained = [number for number in trained_turns(talk) if every_turn]
    prompt, spans = "", []
    *before, last = [
        (m["role"], "".join(texts(m)) or json.dumps(m.get("tool_calls") or "", default=str)) for m in talk.messages
    ]
    for number, (role, text) in enumerate(before):
        prompt += f"{role.capitalize()}: {text}"
        if every_turn and number in trained:
            spans.append((len(prompt) - len(text) - 1, len(prompt)))
        prompt += "\n\n"
    answer = f" {last[1]}"
    return Example(f"{prompt}Assistant:", answer, spans=tuple(spans), place=talk.place, source_hash=talk.hash)


def trained_turns(talk: Conversation) -> list[int]:
    """The assistant's messages before the last one that are to be learned."""
    turns = [i for i, m in enumerate(talk.messages[:-1]) if m["role"] == "assistant" and carries_loss(m)]
    return [i for i in turns if i >= talk.first_trained]


def texts(message: Mapping[str, Any]) -> list[str]:
    """The content of a message, in parts."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def reasoning(message: Mapping[str, Any]) -> str:
    """What a message says under one of `REASONING`; empty where it has none."""
    return next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")


def said(message: Mapping[str, Any]) -> list[str]:
    """All of its texts, reasoning first, without blanks around them."""
    return [text for part in (reasoning(message), *texts(message)) if (text := part.strip())]


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message says nothing at all."""
    return not (message.get("tool_calls") or said(message))


def filled(talk: Conversation) -> Conversation:
    """The conversation with "" for no `content`."""
    return replace(talk, messages=[{**m, "content": ""} if m.get("content") is None else m for m in talk.messages])


def joined(talk: Conversation) -> Conversation:
    """The conversation with text for every list of parts."""
    return replace(talk, messages=[{**m, "content": "".join(texts(m))} if has_parts(m) else m for m in talk.messages])


def has_parts(message: Mapping[str, Any]) -> bool:
    """Whether the content is a list of parts, not one text."""
    return isinstance(message.get("content"), list)


def last_line(text: str) -> str:
    """What every template writes of a text that it writes: they may take away blanks, and reasoning."""
    return text.rpartition("</think>")[2].strip().rpartition("\n")[2].strip()


def marked(talk: Conversation) -> tuple[Conversation, list[list[str]]]:
    """The conversation with a number in place of each text that is no blank and of the last message's calls' names.

    Returns:
        It, and each message's numbers: digits alone, which no template changes.
    """
    count = 730518842100
    messages: list[dict[str, Any]] = []
    marks: list[list[str]] = []

    def mark() -> str:
        nonlocal count
        count += 1
        marks[-1].append(str(count))
        return str(count)

    for message in talk.messages:
        marks.append([])
        content = message.get("content")
        if isinstance(content, list):
            parts = [{**part, "text": mark()} if part["text"].strip() else part for part in content]
            message = {**message, "content": parts}
        elif content and content.strip():
            message = {**message, "content": mark()}
        messages.append(message)
    if calls := messages[-1].get("tool_calls"):
        messages[-1] = {**messages[-1], "tool_calls": [renamed(call, mark()) for call in calls]}
    return replace(talk, messages=messages), marks


def renamed(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    inner = call.get("function")
    return {**call, "function": {**inner, "name": name}} if isinstance(inner, Mapping) else {**call, "name": name}


def form(talk: Conversation, number: int) -> tuple[object, ...]:
    """What a template may go by whether it writes a message's content: all but the text itself."""
    message = talk.messages[number]
    content = message.get("content")
    alike = [i for i, other in enumerate(talk.messages) if other["role"] == message["role"]]
    return (
        *sorted(key for key, value in message.items() if value is not None),
        message["role"], number == len(talk.messages) - 1, number == alike[0], number == alike[-1],
        len(content) if isinstance(content, list) else -1, len(message.get("tool_calls") or ()),
        bool(talk.tools), json.dumps(talk.options, sort_keys=True, default=str),
    )  # fmt: skip


def function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool call; some rows give it without the object around it."""
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def short(value: Any) -> str:
    """For messages: the beginning of a value, as JSON."""
    return json.dumps(value, default=str, ensure_ascii=False)[:60]
