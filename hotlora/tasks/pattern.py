"""What a template writes around the contents of conversations of one form: most rows of a data set are of a few."""

from collections.abc import Sequence
from typing import NamedTuple

from .messages import Conversation, marked
from .turns import Span

Edge = tuple[int, int]  # the literal that it is in, and characters from that one's begin


class Pattern(NamedTuple):
    """A text with a hole for each message's content.

    Attributes:
        literals: what stands before, between and behind the holes.
        spans: what carries loss, each by its two edges.
    """

    literals: tuple[str, ...]
    spans: tuple[tuple[Edge, Edge], ...]

    def filled(self, contents: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
        """The text with these contents, and its spans."""
        text, starts = self.literals[0], [0]
        for content, literal in zip(contents, self.literals[1:], strict=True):
            text += content
            starts.append(len(text))
            text += literal
        return text, tuple((starts[i] + a, starts[j] + b) for (i, a), (j, b) in self.spans)


def form_of(talk: Conversation) -> tuple[str, ...] | None:
    """What all conversations of one pattern have alike. None: this one has more than roles and plain contents."""
    if talk.tools or talk.options:
        return None
    for message in talk.messages:
        content = message.get("content")
        if not isinstance(content, str) or not content or content != content.strip() or "think>" in content:
            return None
        if any(value is not None for name, value in message.items() if name not in ("role", "content")):
            return None
    return (str(talk.first_trained), *(message["role"] for message in talk.messages))


def with_marks(talk: Conversation) -> tuple[Conversation, list[str]]:
    """A conversation of the same form, and its contents, of which none is in another or in what a template writes."""
    other, marks = marked(talk)
    return other, [mark for (mark,) in marks]


def pattern_of(text: str, spans: Sequence[Span], contents: Sequence[str]) -> Pattern | None:
    """The pattern of the text that was written of these contents. None: one of them is not there once, in order."""
    literals, starts, at = [], [], 0
    for content in contents:
        if text.count(content) != 1 or text.find(content) < at:
            return None
        starts.append(at)
        literals.append(text[at : text.index(content)])
        at = text.index(content) + len(content)
    starts.append(at)
    literals.append(text[at:])

    def edge(place: int) -> Edge | None:
        inside = (i for i, start in enumerate(starts) if start <= place <= start + len(literals[i]))
        return next(((i, place - starts[i]) for i in inside), None)

    edges = [(edge(a), edge(b)) for a, b in spans]
    found = tuple((a, b) for a, b in edges if a is not None and b is not None)
    return Pattern(tuple(literals), found) if len(found) == len(edges) else None
