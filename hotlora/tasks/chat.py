"""A conversation as a model's chat template writes it, and which part of the text the assistant wrote.

The text is what the template gives for the whole conversation, to the character. The last answer begins where that
text leaves what a server would give the model to answer: all messages before it, with the generation prompt. A template
that rewrites those once the answer is there (gpt-oss drops their reasoning) says itself where the answer begins, by
`{% generation %}`, or TRL's training variant of it does, if that writes the same text.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, cast

from ..base.errors import DataError
from ..base.files import JSON_ERRORS
from . import Example
from .rows import Row

# What apply_chat_template is given by other ways than chat_template_kwargs.
_TAKEN = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers gives the template all, whichever a row has
_PLAIN = ("role", "content", "tool_call_id")  # an id says nothing that could be written
_DIRECTIVE = re.compile(r"%[-#]?[A-Za-z]")

Notes = dict[str, str]  # what a user should know of the data, once -> the first row that it is true of


@dataclass(frozen=True)
class Conversation:
    """A row's messages, and what else the template is given. `options` are its chat_template_kwargs."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 of what was read, which no template and no date is part of."""
        return hashlib.sha256(json.dumps([self.messages, self.tools, self.options]).encode()).hexdigest()


def read_conversation(row: Row, tools: Any = None, options: Mapping[str, Any] | None = None) -> Conversation:
    """The conversation of a row with `messages`; `tools` and `options` are the data set's, where the row has none.

    Raises:
        DataError: messages, tools or chat_template_kwargs of another form.
    """
    messages = row.values["messages"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DataError(
            f"{row.place}: 'messages' must be a list of objects with 'role' and 'content', a text or a list of "
            "{'type': 'text', 'text': …}; only an assistant's message with 'tool_calls' or reasoning needs no content."
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{row.place}: 'messages' must be a list of two or more, and the last one's role must be 'assistant'."
        )
    given = row.values.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise DataError(f"{row.place}: 'chat_template_kwargs' must be an object, this is {_short(given)}.")
    options = {**(options or {}), **given}
    if taken := sorted(set(options).intersection(_TAKEN)):
        raise DataError(f"{row.place}: 'chat_template_kwargs' cannot hold {', '.join(taken)}: leave it out.")
    own = row.values.get("tools")
    return Conversation(row.place, messages, _tools(row.place, tools if own is None else own), options)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return False
    if content is None:
        return message["role"] == "assistant" and bool(calls or _reasoning(message))
    parts = content if isinstance(content, list) else [{"text": content}]
    return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)


def _tools(place: str, tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):  # as TRL takes them, too: a column of one type for tools of many
        try:
            tools = json.loads(tools)
        except JSON_ERRORS as error:
            raise DataError(f"{place}: 'tools' is text that is no JSON ({error}); give a list of objects.") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{place}: 'tools' must be a list of objects (JSON schemas), this is {_short(tools)}.")
    return tools or None


class ChatTemplate:
    """A tokenizer's chat template at `now`: what the template writes of the date does not change within a run.

    Args:
        notes: gets what a user should know of the data.
    """

    def __init__(self, tokenizer: Any, now: datetime, notes: Notes) -> None:
        self.tokenizer, self.now, self.notes = tokenizer, now, notes
        self._tokens = tuple(tokenizer.get_added_vocab())

    def example(self, talk: Conversation) -> Example:
        """The conversation as an example of which the last message is trained.

        Raises:
            DataError: the template refuses the conversation, does not write its answer, or hides where that begins.
        """
        as_read = talk
        talk, text = self._accepted(talk)
        prompt = self.render(talk, -1, generation_prompt=True)
        start = self._start(talk, text, prompt)
        self._check(talk, text, start)
        self._note(talk, text, start)
        # What stands after the end-of-turn token is the template's: the model has stopped by then.
        end = len(text.rstrip())
        end = end if end > start and text[:end].endswith(self._tokens) else len(text)
        return Example(
            prompt, text[start:end], text=text, spans=((start, end),), place=talk.place, source_hash=as_read.hash
        )

    def render(self, talk: Conversation, number: int | None = None, *, generation_prompt: bool = False) -> str:
        """The text of the first `number` messages, as slices count, or of all."""
        try:
            return self.tokenizer.apply_chat_template(
                talk.messages[:number], tools=talk.tools, chat_template=self._template(talk), tokenize=False,
                add_generation_prompt=generation_prompt, **talk.options,
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may raise anything
            reason = str(error).strip().split("\n")[0]
            hint = ""
            if any(message.get("tool_calls") for message in talk.messages):
                hint = " The arguments of tool calls are an object for most templates, and JSON text for some."
            raise DataError(
                f"{talk.place}: the model's chat template refuses it ({type(error).__name__}: {reason}). Give messages "
                f"that the template takes, or another chat template.{hint}"
            ) from error

    def _template(self, talk: Conversation) -> str:
        return at_time(self.tokenizer.get_chat_template(tools=talk.tools), self.now)

    def _accepted(self, talk: Conversation) -> tuple[Conversation, str]:
        """The conversation and its text, with "" for no `content` where the template writes that whatever it is."""
        try:
            return talk, self.render(talk)
        except DataError as refused:
            filled = [{**m, "content": ""} if m.get("content") is None else m for m in talk.messages]
            if filled == talk.messages:
                raise
            talk = replace(talk, messages=filled)
            try:
                return talk, self.render(talk)
            except DataError:
                raise refused from None

    def _start(self, talk: Conversation, text: str, prompt: str) -> int:
        """Where the last message's part of the text begins."""
        if text.startswith(prompt):
            return len(prompt)
        before = self.render(talk, -1)
        size = _common(prompt, before)
        header, footer = prompt[size:], before[size:]  # some templates end every text, but for a generation prompt
        if text.startswith(before[:size]) and text.endswith(footer):
            # The generation prompt opens what this answer does not have, such as <think>. Both may go on alike by
            # chance ("<b>"), so what the message says is never left out.
            said = [at for part in _said(talk.messages[-1]) if (at := text.rfind(part)) >= size]
            return min([_common(text, prompt), *said])
        marked = self._marked_start(talk, text)
        if marked is None:
            raise DataError(
                f"{talk.place}: the chat template writes the messages before the answer otherwise once the answer is "
                "there, so nothing tells where the answer begins. Put {% generation %} and {% endgeneration %} around "
                "what the assistant writes in the template."
            )
        return marked + _common(header, text[marked:])

    def _marked_start(self, talk: Conversation, text: str) -> int | None:
        from transformers.utils.chat_template_utils import render_jinja_template
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        template = self.tokenizer.get_chat_template(tools=talk.tools)
        try:
            if not has_generation_markers(template):
                template = get_training_chat_template(self.tokenizer) or template
            rendered, marks = cast(Any, render_jinja_template)(
                [[{key: value for key, value in m.items() if value is not None} for m in talk.messages]],
                tools=talk.tools, chat_template=at_time(template, self.now), return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **talk.options},
            )  # fmt: skip
        except Exception:  # no variant, or one that takes less than the template itself
            return None
        turns = sum(message["role"] == "assistant" for message in talk.messages)
        return marks[0][-1][0] if rendered[0] == text and len(marks[0]) == turns else None

    def _check(self, talk: Conversation, text: str, start: int) -> None:
        """Nobody wants a model that learns to say nothing: the answer must be in what is trained."""
        message, trained = talk.messages[-1], text[start:]
        names = [_function(call).get("name") for call in message.get("tool_calls") or ()]
        if any(str(name) not in trained for name in names):
            raise DataError(
                f"{talk.place}: the chat template does not write the answer's tool calls, so there is nothing to learn "
                "from it. Leave the row out, or use a chat template that writes them."
            )
        for part in _texts(message):
            # Of a long text the last line: templates take away blanks, and reasoning.
            last = part.rpartition("</think>")[2].strip().rpartition("\n")[2].strip()
            if last not in trained:
                raise DataError(
                    f"{talk.place}: the chat template does not write the answer's content, {_short(last)}, where the "
                    "answer is. Give content in the form that the template reads: a text, or for some templates a list "
                    'of {"type": "text", "text": …}.'
                )
        if not trained:
            raise DataError(f"{talk.place}: the chat template writes nothing for the answer: give it some content.")

    def _note(self, talk: Conversation, text: str, start: int) -> None:
        """What is in the row and not in the text, or not as the user may think."""
        template, last = self._template(talk), talk.messages[-1]

        def reads(*names: str) -> bool:
            return any(re.search(rf"\b{re.escape(name)}\b", template) for name in names)

        def note(text: str) -> None:
            self.notes.setdefault(text, talk.place)

        if talk.tools and not reads("tools"):
            note("the chat template does not read 'tools'")
        for name in talk.options:
            if not reads(name):
                note(f"the chat template does not read {name!r} of 'chat_template_kwargs'")
        for message in talk.messages:
            for name, value in message.items():
                names = _REASONING if name in _REASONING else (name,)
                if value is not None and name not in _PLAIN and not reads(*names):
                    note(f"the chat template does not read {name!r} of 'messages'")
            for arguments in (_function(call).get("arguments") for call in message.get("tool_calls") or ()):
                if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                    note("the chat template writes the arguments of tool calls as quoted text; most want an object")
        thought = _reasoning(last) or next((t.partition("</think>")[0] for t in _texts(last) if "</think>" in t), "")
        if (reads(*_REASONING) or not _reasoning(last)) and thought.removeprefix("<think>").strip() not in text[start:]:
            note("the chat template does not write the reasoning of the last message")
        content = "".join(_texts(last)).rstrip()
        if content and not last.get("tool_calls") and text.rstrip().endswith(content):
            note("the chat template writes no end-of-turn token after an answer, so how to end one is not learned")


def template_source(tokenizer: Any, examples: Sequence[Example]) -> dict[str, str]:
    """What a run or a profile of these examples is of besides, as the data's hash has nothing of it: the hash of the
    tokenizer's chat templates, if any example was written by one."""
    if not any(example.text is not None for example in examples):
        return {}
    return {"chat_template": hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()}


def at_time(template: str, now: datetime) -> str:
    """The template with transformers' `strftime_now` of one moment, as a macro of Jinja before it."""
    if "strftime_now" not in template:
        return template
    value = "format"
    for directive in sorted(set(_DIRECTIVE.findall(template))):
        try:
            value += f" | replace({json.dumps(directive)}, {json.dumps(now.strftime(directive))})"
        except ValueError:  # no directive, but the start of a tag: {%if
            continue
    return f"{{% macro strftime_now(format) %}}{{{{ {value} }}}}{{% endmacro %}}\n{template}"


def as_plain_text(talk: Conversation, sized: bool) -> Example:
    """`User: …`, a blank line, `Assistant: …`: for tokenizers without a chat template.

    Args:
        sized: there is no tokenizer, so the text is for its size, or to be read.
    """
    if not sized and any(m.get("content") is None or m.get("tool_calls") for m in talk.messages):
        raise DataError(f"{talk.place}: the tokenizer has no chat template, which a row with tool calls needs.")
    told = [(m["role"], "".join(_texts(m)) or json.dumps(m.get("tool_calls") or "")) for m in talk.messages]
    prompt = "".join(f"{role.capitalize()}: {text}\n\n" for role, text in told[:-1])
    return Example(f"{prompt}Assistant:", f" {told[-1][1]}", place=talk.place, source_hash=talk.hash)


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The content of a message, in parts."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _reasoning(message: Mapping[str, Any]) -> str:
    return next((message[name] for name in _REASONING if isinstance(message.get(name), str)), "")


def _said(message: Mapping[str, Any]) -> list[str]:
    return [text for part in (_reasoning(message), *_texts(message)) if (text := part.strip())]


def _common(a: str, b: str) -> int:
    """The length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool call; some rows give it without the object around it."""
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _short(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:60]
