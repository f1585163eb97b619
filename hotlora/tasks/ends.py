"""With which tokens a chat template ends an assistant's turn: those that a model learns to end its answers with."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ..base.errors import DataError
from .chat import ChatTemplate
from .messages import Conversation

_MARK = "730518842100"  # digits alone, which no template changes
_USER = {"role": "user", "content": "1"}
_NOW = datetime(2026, 1, 1)


def turn_ends(tokenizer: Any) -> list[int]:
    """Ids of the tokens with which the tokenizer's chat template ends an answer, and an answer that calls tools: the
    last trained one of each. Empty: it has no template, or one that ends answers with no token of their own, such as a
    text of several."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    plain = _end(tokenizer, [{"role": "assistant", "content": _MARK}])
    if plain is None:
        return []
    called = _end(tokenizer, _calls({"city": "1"}), tools=True) or _end(tokenizer, _calls('{"city": "1"}'), tools=True)
    return sorted({plain} | ({called} if called is not None else set()))


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


def _end(tokenizer: Any, answers: Sequence[dict[str, Any]], *, tools: bool = False) -> int | None:
    """The token that ends the first of the answers that the template writes; None: there is none. A token that also
    stands before the end, as between two calls, ends no answer."""
    for answer in answers:
        behind = _behind(tokenizer, answer, tools)
        if behind is None:
            continue
        tokens = (token for token in tokenizer.get_added_vocab() if token and behind.endswith(token))
        token = max((*tokens, _eos(tokenizer, behind)), key=len)
        return tokenizer.convert_tokens_to_ids(token) if token and behind.count(token) == 1 else None
    return None


def _eos(tokenizer: Any, text: str) -> str:
    """Not every tokenizer in Python lists it among the added ones."""
    return tokenizer.eos_token if tokenizer.eos_token and text.endswith(tokenizer.eos_token) else ""


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
