"""Where in a conversation's text the assistant's turns before the last one stand.

The template says so itself where it has `{% generation %}`, or TRL's training variant of it does, if that writes the
same text. Else a turn is what changes when its message does: the conversation is written once more with another text in
the message's place, and once with another text in the next one's.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..base.errors import DataError
from ..hf.internals import internal
from .messages import REASONING, Conversation, has_parts, renamed, texts

Span = tuple[int, int]  # characters of the text
Render = Callable[..., str]  # ChatTemplate.render
Ends = tuple[str, ...]

_OTHERS = ("70184436", "30184435", "50184434")  # no template changes digits, and of three one begins and ends otherwise
_UNIT = re.compile(r"<[^<>\n]*>|\[[^\[\]\s]*\]|\w+")  # never begun in its middle
_FAR = 500  # characters: more than any template writes between an answer's header and its content


class Marks:
    """What `{% generation %}` encloses, by a tokenizer's chat template or TRL's training variant of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._variants: dict[str, str | None] = {}

    def spans(self, talk: Conversation, at_time: Callable[[str], str], text: str) -> list[Span] | None:
        """The marked parts of the text, in order. None: nothing marks it, or the variant writes another text.

        at_time: a template as it is used.
        """
        variant = self._variant(self.tokenizer.get_chat_template(tools=talk.tools))
        if variant is None:
            return None
        render = internal("transformers.utils.chat_template_utils:render_jinja_template")
        try:
            rendered, marks = render(
                [[{key: value for key, value in m.items() if value is not None} for m in talk.messages]],
                tools=talk.tools, chat_template=at_time(variant), return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **talk.options},
            )  # fmt: skip
        except Exception:  # a template is a program; a variant may take less than the template itself
            return None
        return marks[0] if rendered[0] == text else None

    def _variant(self, template: str) -> str | None:
        """The template if it has marks, else TRL's variant of it, if there is one."""
        if template not in self._variants:
            from trl import get_training_chat_template

            if internal("trl.chat_template_utils:has_generation_markers")(template):
                self._variants[template] = template
            else:
                try:
                    self._variants[template] = get_training_chat_template(self.tokenizer)
                except ValueError:  # TRL knows no variant
                    self._variants[template] = None
        return self._variants[template]


def trimmed(span: Span, text: str, header: str = "") -> Span | None:
    """A marked part without what is in it of the header that the generation prompt writes, and without the blanks at
    its end: there the model has stopped. None: nothing is left."""
    start, end = span
    inside = (header[i:] for i in range(len(header)) if text.endswith(header[:i], 0, start))
    start += next((len(rest) for rest in inside if text.startswith(rest, start)), 0)
    end = start + len(text[start:end].rstrip())
    return (start, end) if start < end else None


def turn_span(render: Render, talk: Conversation, number: int, text: str, end_token: str, tokens: Ends) -> Span | None:
    """Where message `number`, which is not the last one, stands in the text. None: nothing tells.

    Args:
        end_token: what ends the last answer; "" if nothing does.
        tokens: all special tokens; of these one ends this answer if `end_token` does not.
    """
    prompt, whole = render(talk, number, generation_prompt=True), render(talk, number + 1).rstrip()
    if len(prompt) < len(whole) and text.startswith(whole) and text.startswith(prompt):
        return len(prompt), len(whole)
    before, here, after = (_changed(render, talk, i, text) for i in (number - 1, number, number + 1))
    if here is None or after is None:
        return None
    (first, end), bound = here, after[0]
    start = _behind(header_of(prompt, render(talk, number)), text, first)
    if text.startswith(whole) and start < len(whole):
        end = len(whole)
    elif end_token and (found := text.find(end_token, end, bound)) >= 0:
        end = found + len(end_token)
    elif end_token and (ends := [token for token in tokens if text.startswith(token, end)]):
        end += max(map(len, ends))
    return (start, end) if (before[1] if before else 0) <= start < end <= bound else None


def header_of(prompt: str, before: str) -> str:
    """What the generation prompt adds to the messages before an answer."""
    return prompt[parting(prompt, before) :]


def _changed(render: Render, talk: Conversation, number: int, text: str) -> Span | None:
    """The part of the text that another content in message `number` changes. None: there is none, or no such
    message."""
    if number < 0:
        return None
    message = talk.messages[number]
    said = "".join(texts(message)).strip()
    other = next(o for o in _OTHERS if not said or (o[0] != said[0] and o[-1] != said[-1]))
    content = [{"type": "text", "text": other}] if has_parts(message) else other
    changed = {**{key: value for key, value in message.items() if key not in REASONING}, "content": content}
    calls = changed.pop("tool_calls", None)
    tried = [changed] if not calls else [changed, {**changed, "tool_calls": [renamed(c, other) for c in calls]}]
    for one in tried:
        messages = [*talk.messages[:number], one, *talk.messages[number + 1 :]]
        try:
            written = render(replace(talk, messages=messages))
        except DataError:  # a tool's answer may need the call before it
            continue
        if other in written:
            first = _same(text, written)
            return first, max(first, len(text) - _same(text[first:][::-1], written[first:][::-1]))
    return None


def _behind(header: str, text: str, first: int) -> int:
    """The end of as much of the header as stands before the content, which begins at or after `first`."""
    unit = _UNIT.search(header)
    if unit is None:
        return len(text[:first].rstrip())
    opening = header[: unit.end()]
    at = text.rfind(opening, max(0, first - _FAR), first + len(opening))
    return first if at < 0 else at + parting(header, text[at : at + len(header)])


def parting(a: str, b: str) -> int:
    """Where two texts part, which is never inside of a word, a tag or a special token of either."""
    size = _same(a, b)
    if size == min(len(a), len(b)):
        return size
    near = [unit for text in (a, b) for unit in _UNIT.finditer(text, max(0, size - 80), size + 80)]
    inside = [unit.start() for unit in near if unit.start() < size < unit.end()]
    return min(inside, default=size)


def _same(a: str, b: str) -> int:
    """How long the texts' common beginning is."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    low, high = 0, size  # halved, as one comparison of slices is faster than a loop
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
