"""A conversation as a model's chat template writes it, and which parts of the text the assistant wrote.

The text is what the template gives for the whole conversation, to the character. Where the turns before the last one
stand, `turns` finds. The last answer begins where that
text leaves what a server would give the model to answer: all messages before it, with the generation prompt. A template
that rewrites those once the answer is there (gpt-oss drops their reasoning) says itself where the answer begins, by
`{% generation %}`, or TRL's training variant of it does, if that writes the same text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, cast

from ..base.errors import DataError
from .messages import (
    LOSS_MARKS,
    REASONING,
    Conversation,
    filled,
    form,
    function,
    has_parts,
    joined,
    last_line,
    marked,
    reasoning,
    renamed,
    said,
    short,
    texts,
    trained_turns,
)  # fmt: skip
from .pattern import Pattern, form_of, pattern_of, with_marks
from .task import Example
from .turns import Marks, Span, header_of, parting, trimmed, turn_span

_PLAIN = ("role", "content", "tool_call_id")  # an id says nothing that could be written
_DIRECTIVE = re.compile(r"%[-#]?[A-Za-z]")
_SHORT = 8  # characters: what is shorter is in many a text by chance
_MARK = "730518842100"  # digits alone, which no template changes
_CONTENT = (
    " Give content in the form that the template reads: a text, or for some templates a list of "
    '{"type": "text", "text": …}.'
)

Notes = dict[str, str]  # what a user should know of the data, once -> the first row that it is true of


class ChatTemplate:
    """A tokenizer's chat template at `now`: what the template writes of the date does not change within a run.

    Args:
        notes: gets what a user should know of the data.
        train_on: the assistant's turns, the last one alone, or all of the text.
    """

    def __init__(self, tokenizer: Any, now: datetime, notes: Notes, train_on: str = "assistant") -> None:
        self.tokenizer, self.now, self.notes, self.train_on = tokenizer, now, notes, train_on
        self._marks = Marks(tokenizer)
        self._patterns: dict[tuple[str, ...], Pattern | None] = {}
        self._headers: dict[tuple[str, str], str] = {}
        self._tokens = tuple(tokenizer.get_added_vocab())
        self._closings: dict[str, str] = {}
        self._written: dict[tuple[object, ...], bool] = {}  # a message's form -> whether the template writes it

    def example(self, talk: Conversation) -> Example:
        """The conversation as an example; `spans` says what of it is trained.

        Raises:
            DataError: the template refuses the conversation, does not write its answer, or hides where one begins.
        """
        form = form_of(talk)
        if form is None or form not in self._patterns:
            example = self._example(talk)
            if form is not None:
                self._patterns[form] = self._pattern(talk)
            return example
        return self._by_pattern(talk, self._patterns[form]) or self._example(talk)

    def _pattern(self, talk: Conversation) -> Pattern | None:
        """Of conversations of this one's form."""
        other, contents = with_marks(talk)
        notes, self.notes = self.notes, {}
        try:
            example = self._example(other)
        except DataError:
            return None
        finally:
            self.notes = notes
        start = len(example.prompt)
        last = (start, start + len(example.completion))
        return pattern_of(str(example.text), (*example.spans, last), contents)

    def _by_pattern(self, talk: Conversation, pattern: Pattern | None) -> Example | None:
        """The example, if the template writes the conversation by the pattern: then all that is looked for is there."""
        if pattern is None:
            return None
        text, prompt = self.render(talk), self.render(talk, -1, generation_prompt=True)
        expected, (*spans, (start, end)) = pattern.filled([message["content"] for message in talk.messages])
        if text != expected or text[:start] != prompt:
            return None
        return Example(prompt, text[start:end], text=text, spans=tuple(spans), place=talk.place, source_hash=talk.hash)

    def _example(self, talk: Conversation) -> Example:
        as_read = talk
        talk, text = self._accepted(talk)
        prompt = self.render(talk, -1, generation_prompt=True)
        start = self._start(talk, text, prompt)
        self._check(talk, text, start)
        self._note(talk, text, start)
        # What stands after the end of the turn is the template's: the model has stopped by then.
        end, written = len(text), text.rstrip()
        ended = max((token for token in self._tokens if token and written.endswith(token)), key=len, default="")
        closing = ended or self._closing(talk)
        if closing.strip() and len(written) > start and written.endswith(closing):
            end = len(written)
        spans: tuple[Span, ...] = ((start, end),)
        if self.train_on == "all":
            spans = ((0, len(text)),)
            for number in trained_turns(talk):
                self._check_calls(talk, number, text)
        elif self.train_on == "assistant":
            spans = (*self._earlier(talk, text, start, closing if text[:end].endswith(closing) else ""), *spans)
        if closing.strip() and not ended:
            self.notes.setdefault(
                f"the chat template ends an answer with {closing!r}, which is no token of this tokenizer: it is "
                "trained as a text, and generation does not stop there; add it to the tokenizer as a special token",
                talk.place,
            )
        return Example(prompt, text[start:end], text=text, spans=spans, place=talk.place, source_hash=as_read.hash)

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
        """The conversation in the first form that the template takes and writes, and its text: as it was read, with ""
        for no `content`, with text for content in parts."""
        found: tuple[Conversation, str] | None = None
        refused: DataError | None = None
        tried: list[Conversation] = []
        for other in (talk, filled(talk), joined(talk), joined(filled(talk))):
            if other in tried:
                continue
            tried.append(other)
            try:
                text = self.render(other)
            except DataError as error:
                refused = refused or error
                continue
            found = found or (other, text)
            if all(self._writes(other, n) for n, message in enumerate(other.messages) if has_parts(message)):
                found = (other, text)
                break
        if found is None:
            raise cast(DataError, refused)
        for message, written in zip(talk.messages, found[0].messages, strict=True):
            if has_parts(message) and len(message["content"]) > 1 and not has_parts(written):
                note = "the chat template takes no list as content, so the texts of one are written as one text"
                self.notes.setdefault(note, talk.place)
        return found

    def _writes(self, talk: Conversation, number: int) -> bool:
        """Whether the template writes the content, and the last calls' names, of messages of this one's form."""
        key = form(talk, number)
        if key not in self._written:
            written = self._probe(talk) or [True] * len(talk.messages)  # unknown: what _check finds must do
            for i, found in enumerate(written):
                self._written[form(talk, i)] = self._written.get(form(talk, i), True) and found
        return self._written[key]

    def _writes_here(self, talk: Conversation, number: int) -> bool:
        """The same of this very message, before it is refused."""
        probed = self._probe(talk)
        return probed is not None and probed[number]

    def _probe(self, talk: Conversation) -> list[bool] | None:
        """Whether the template writes each message, by a rendering of numbers in place of texts; None: it refuses."""
        probe, marks = marked(talk)
        try:
            text = self.render(probe)
        except DataError:
            return None
        # A list may be written as Python or JSON writes it, which has the text, and more.
        raw = r"""['"]text['"]: *['"]"""
        return [all(mark in text and not re.search(raw + mark, text) for mark in own) for own in marks]

    def _start(self, talk: Conversation, text: str, prompt: str) -> int:
        """Where the last message's part of the text begins."""
        if text.startswith(prompt):
            return len(prompt)
        before = self.render(talk, -1)
        size = parting(prompt, before)
        header, footer = prompt[size:], before[size:]  # some templates end every text, but for a generation prompt
        # What the message says is never left out.
        parts = said(talk.messages[-1])
        places = [at for part in parts if (at := text.rfind(part)) >= size]
        if text.startswith(before[:size]) and text.endswith(footer):
            # The generation prompt opens what this answer does not have, such as <think>.
            start = min([max(size, parting(text, prompt)), *places])
            # Else that is the end of the message before, which the generation prompt changes.
            if not footer or (not text.startswith(before) and (start > size or size in places)):
                return start
        first = self._marked_start(talk, text)
        if first is None:
            raise DataError(
                f"{talk.place}: the chat template writes the messages before the answer otherwise once the answer is "
                "there, so nothing tells where the answer begins. Put {% generation %} and {% endgeneration %} around "
                "what the assistant writes in the template."
            )
        behind = first + len(header)
        whole = all(part in text[behind:] for part in parts if part in text[first:])
        return behind if text.startswith(header, first) and whole else first

    def _marked(self, talk: Conversation, text: str) -> list[Span] | None:
        return self._marks.spans(talk, lambda template: at_time(template, self.now), text)

    def _marked_start(self, talk: Conversation, text: str) -> int | None:
        marks = self._marked(talk, text)
        turns = sum(message["role"] == "assistant" for message in talk.messages)
        return marks[-1][0] if marks and len(marks) == turns else None

    def _closing(self, talk: Conversation) -> str:
        """What the template writes behind the last answer, where no token ends it: a text, or blanks alone."""
        template = self._template(talk)
        if template not in self._closings:
            answer = {"role": "assistant", "content": _MARK}
            try:
                text = self.render(replace(talk, messages=[{"role": "user", "content": "1"}, answer]))
            except DataError:
                text = ""
            behind = text.rpartition(_MARK)[2] if _MARK in text else ""
            self._closings[template] = behind.strip() or behind
        return self._closings[template]

    def _earlier(self, talk: Conversation, text: str, start: int, closing: str) -> list[Span]:
        """Where the assistant's turns before the last one stand.

        closing: what ends the last answer; "" if nothing does.
        """
        numbers = [i for i, m in enumerate(talk.messages[:-1]) if m["role"] == "assistant"]
        trained = trained_turns(talk)
        if not trained:
            return []
        marks = [span for span in self._marked(talk, text) or () if span[1] <= start]
        if len(marks) > len(numbers) and trained == numbers:  # a template may mark a turn in parts
            return [span for mark in marks if (span := trimmed(mark, text))]
        found: dict[int, Span | None] = {}
        if len(marks) == len(numbers):
            found = {i: trimmed(mark, text, self._header(talk, i)) for i, mark in zip(numbers, marks, strict=True)}
        spans: list[Span] = []
        for i in trained:
            span = found[i] if i in found else turn_span(self.render, talk, i, text, closing, self._tokens)
            if span is not None and not closing.strip() and text.startswith(closing, span[1]):
                span = (span[0], span[1] + len(closing))  # blanks, where nothing else ends an answer
            written = text[slice(*span)] if span is not None else ""
            self._check_calls(talk, i, written)
            said_here = said(talk.messages[i])
            if said_here and not any(last_line(part) in written for part in said_here):
                self._note_silent(talk, i)
            lines = [line for line in map(last_line, texts(talk.messages[i])) if line and line in text]
            lost = span is None or any(line not in written for line in lines)
            if lost and not self._writes_here(talk, i):
                continue  # which _note tells
            if span is None or lost or (spans and span[0] < spans[-1][1]):
                raise DataError(
                    f"{talk.place}: nothing tells where the chat template writes message {i + 1}, an answer. Put "
                    "{% generation %} and {% endgeneration %} around what the assistant writes in the template, or "
                    "train on the last answer alone (--train-on last)."
                )
            spans.append(span)
        return spans

    def _check_calls(self, talk: Conversation, number: int, written: str) -> None:
        """A turn whose calls of tools the template does not write would be learned as an empty answer."""
        message = talk.messages[number]
        names = [str(function(call).get("name")) for call in message.get("tool_calls") or ()]
        if all(name in written and len(name) >= _SHORT for name in names):
            return
        calls = [renamed(call, _MARK) for call in message["tool_calls"]]
        changed = [*talk.messages[:number], {**message, "tool_calls": calls}, *talk.messages[number + 1 :]]
        try:
            is_written = _MARK in self.render(replace(talk, messages=changed))
        except DataError:  # a tool's answer may have to name the call before it
            is_written = all(name in written for name in names)
        if not is_written:
            raise DataError(
                f"{talk.place}: the chat template does not write the tool calls of message {number + 1}, so there is "
                'nothing to learn from it. Leave the row out, mark the message ("weight": 0), train on the last answer '
                "alone (--train-on last), or use a chat template that writes them."
            )

    def _note_silent(self, talk: Conversation, number: int) -> None:
        if reasoning(talk.messages[number]) and not any(part.strip() for part in texts(talk.messages[number])):
            self.notes.setdefault(
                "the chat template does not write the reasoning of an earlier answer that has nothing else, so an "
                "empty answer is learned from it",
                talk.place,
            )

    def _header(self, talk: Conversation, number: int) -> str:
        """`header_of` its prompt, which is the same behind messages of one role."""
        key = (self._template(talk), talk.messages[number - 1]["role"] if number else "")
        if key not in self._headers:
            self._headers[key] = header_of(self.render(talk, number, generation_prompt=True), self.render(talk, number))
        return self._headers[key]

    def _check(self, talk: Conversation, text: str, start: int) -> None:
        """Nobody wants a model that learns to say nothing, or to answer nothing: the answer must be in what is trained,
        and what the user says before it. Of other messages a template may leave out some."""
        number = len(talk.messages) - 1
        message, trained = talk.messages[number], text[start:]
        names = [str(function(call).get("name")) for call in message.get("tool_calls") or ()]
        lines = [last_line(part) for part in texts(message)]
        probed = self._needs_probe(message, [*names, *lines])
        unwritten = probed and not self._writes(talk, number) and not self._writes_here(talk, number)
        if any(name not in trained for name in names) or (unwritten and names and not any(lines)):
            raise DataError(
                f"{talk.place}: the chat template does not write the answer's tool calls, so there is nothing to learn "
                "from it. Leave the row out, or use a chat template that writes them."
            )
        for line in lines:
            if line not in trained or unwritten:
                raise DataError(_unwritten(talk.place, "answer's", line) + ", where the answer is." + _CONTENT)
        if not trained:
            raise DataError(f"{talk.place}: the chat template writes nothing for the answer: give it some content.")
        self._check_users(talk, text[:start])

    def _check_users(self, talk: Conversation, prompt: str) -> None:
        at = 0
        for number, message in enumerate(talk.messages):
            if message["role"] != "user":
                continue
            lines = [last_line(part) for part in texts(message)]
            for line in lines:
                found = prompt.find(line, at)
                if found < 0:  # a template may rewrite what a user says: leave out a switch such as /no_think
                    written = False
                else:
                    at = found + len(line)
                    written = not self._needs_probe(message, lines) or self._writes(talk, number)
                if not written and not self._writes_here(talk, number):
                    raise DataError(_unwritten(talk.place, "user's", line) + "." + _CONTENT)

    def _needs_probe(self, message: Mapping[str, Any], lines: Sequence[str]) -> bool:
        """Whether finding the lines in a text does not tell that the template writes them."""
        return has_parts(message) or any(0 < len(line) < _SHORT for line in lines)

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
        for number, message in enumerate(talk.messages[:-1]):
            lost = any(last_line(part) not in text for part in texts(message))
            if message["role"] != "user" and lost and not self._writes(talk, number):
                note(f"the chat template does not write the content of a message of role {message['role']!r}")
        for message in talk.messages:
            for name, value in message.items():
                names = REASONING if name in REASONING else (name,)
                is_known = name in _PLAIN or (name in LOSS_MARKS and value in (0, 1))
                if value is not None and not is_known and not reads(*names):
                    note(f"the chat template does not read {name!r} of 'messages'")
            for arguments in (function(call).get("arguments") for call in message.get("tool_calls") or ()):
                if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                    note("the chat template writes the arguments of tool calls as quoted text; most want an object")
        thought = reasoning(last) or next((t.partition("</think>")[0] for t in texts(last) if "</think>" in t), "")
        if (reads(*REASONING) or not reasoning(last)) and thought.removeprefix("<think>").strip() not in text[start:]:
            note("the chat template does not write the reasoning of the last message")
        content = "".join(texts(last)).rstrip()
        if content and not last.get("tool_calls") and text.rstrip().endswith(content):
            note("the chat template writes no end-of-turn token after an answer, so how to end one is not learned")


def template_source(tokenizer: Any, examples: Iterable[Example]) -> dict[str, str]:
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


def _unwritten(place: str, whose: str, line: str) -> str:
    return f"{place}: the chat template does not write the {whose} content, {short(line)}"
