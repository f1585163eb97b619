"""With which tokens a chat template ends an assistant's turn: those that a model learns to end its answers with."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ..base.errors import DataError
from .chat import ChatTemplate
from .messages import Conversation

_MARK = "730518842100"  # digits alone, which no template changes
_IN_BRACKETS = re.compile(r"<[^<>\s]{2,}>|\[[^\[\]\s]{2,}\]")
_USER = {"role": "user", "content": "1"}
_NOW = datetime(2026, 1, 1)


def turn_ends(tokenizer: Any) -> list[int]:
    """Ids of the tokens with which the tokenizer's chat template ends an answer, and an answer that calls tools: the
    last trained one of each. Empty: it has no template, or one that ends answers with no token of their own, such as a
    text of several."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    plain = _ends(tokenizer, [{"role": "assistant", "content": _MARK}])
    if not plain:
        return []
    if _ends_an_earlier_turn(tokenizer, plain[0]):
        plain = plain[:1]  # else it ends the conversation, and the one before it a turn
    called = _ends(tokenizer, _calls({"city": "1"}), tools=True)
    called = called or _ends(tokenizer, _calls('{"city": "1"}'), tools=True)
    return sorted({*plain, *called[:1]})


def told_ends(tokenizer: Any, ends: Sequence[int]) -> str:
    """A line on how answers end, where it is not with the tokenizer's end-of-text token alone."""
    names = " or ".join(tokenizer.convert_ids_to_tokens(list(ends)))
    return (
        f"answers end with {names}, as the chat template writes them: generation stops there, too, and the saved "
        f"generation_config.json says so (the tokenizer's eos_token is {tokenizer.eos_token})"
    )


def _calls(arguments: object) -> list[dict[str, Any]]:
    """One that calls two tools, and one that calls a tool, as some templates write no more."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": _MARK, "arguments": arguments}}
    other = {"id": "abcdefghj", "type": "function", "function": {"name": f"{_MARK}1", "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": calls} for calls in ([call, other], [call])]


def _ends(tokenizer: Any, answers: Sequence[dict[str, Any]], *, tools: bool = False) -> list[int]:
    """The token that ends the first of the answers that the template writes, and the one before it, and so on. None of
    them stands anywhere else, as between two calls."""
    for answer in answers:
        behind = _behind(tokenizer, answer, tools)
        if behind is None:
            continue
        found = []
        while (token := _at_the_end(tokenizer, behind)) and behind.count(token) == 1:
            found.append(tokenizer.convert_tokens_to_ids(token))
            behind = behind.removesuffix(token).rstrip()
        return found
    return []


def _ends_an_earlier_turn(tokenizer: Any, end: int) -> bool:
    """Whether this token stands between an answer and the question after it, too; so it is taken to be where the
    template does not write two turns."""
    answer, question = {"role": "assistant", "content": _MARK}, {"role": "user", "content": f"{_MARK}2"}
    turns = [_USER, answer, question, {"role": "assistant", "content": "1"}]
    try:
        example = ChatTemplate(tokenizer, _NOW, {}, "last").example(Conversation("", turns, None, {}))
    except DataError:
        return True
    _, _, behind = str(example.text).partition(_MARK)
    return tokenizer.convert_ids_to_tokens(end) in behind.partition(f"{_MARK}2")[0]


def _at_the_end(tokenizer: Any, text: str) -> str:
    """The special token with which a text ends, or one in brackets; "" if there is none. Other added tokens, such as
    line breaks, may stand in an answer. Not every tokenizer in Python lists its eos_token among the added ones."""
    added = tokenizer.added_tokens_decoder.values()
    names = [str(token) for token in added if token.special or _IN_BRACKETS.fullmatch(str(token))]
    ends = (name for name in (*names, tokenizer.eos_token or "") if name and text.endswith(name))
    return max(ends, key=len, default="")


def _behind(tokenizer: Any, answer: dict[str, Any], tools: bool) -> str | None:
    """What is trained behind the answer's text or the name of its first call; None: the template does not write it."""
    tool = {"type": "function", "function": {"name": _MARK, "description": "", "parameters": {"type": "object"}}}
    template = ChatTemplate(tokenizer, _NOW, {}, "last")
    for user, said in ((_USER, answer), *([] if tools else [(_in_parts(_USER), _in_parts(answer))])):
        try:
            example = template.example(Conversation("", [user, said], [tool] if tools else None, {}))
        except DataError:
            continue
        start, end = example.spans[-1]
        return str(example.text)[start:end].partition(_MARK)[2]
    return None


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
