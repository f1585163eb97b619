"""The commands that let a trained model answer: `generate` and `chat`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import HotLoraError
from ..runs.options import LoadOptions
from .options import err, options_of, out

_Tokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens of an answer at most.")]
_Temperature = Annotated[float, typer.Option(help="0: the likeliest token each time.")]
_TopP = Annotated[float, typer.Option(help="Draw from this share of the probability.")]
_Seed = Annotated[int, typer.Option(help="Of the draws.")]
_System = Annotated[str | None, typer.Option(help="A system message that stands first.")]
_Tools = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="A JSON list of tools that the chat template is given, as a row's `tools`."),
]
_Kwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs", metavar="JSON", help="More that it is given: '{\"enable_thinking\": false}'."
    ),
]
_Base = Annotated[
    str | None,
    typer.Option("--model", "-m", help="The base model, where it is not at the place that the adapter notes."),
]


@options_of(LoadOptions, only=("dtype", "device", "offload", "offload_folder"))
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt (default: what is piped in).", show_default=False)
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A run's folder, or a saved adapter.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model, or the base where the adapter's is not at its place.")
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="The prompt as it is, or as a user's message in the chat template (default: as the run was trained; "
            "else by the template, if there is one).",
        ),
    ] = None,
    system: _System = None,
    tools: _Tools = None,
    chat_template_kwargs: _Kwargs = None,
    max_new_tokens: _Tokens = 512,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into the weights first: faster.")] = False,
    **given: Any,
) -> None:
    """Answer one prompt; the text appears as it is written."""
    from ..evaluation.generate import Sampling
    from ..evaluation.talk import answer, check_answering
    from ..runs.load import find, load

    if adapter is None and model is None:
        raise HotLoraError("Give --adapter, a run's folder or a saved adapter, or --model.")
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    if not prompt:
        raise HotLoraError('There is no prompt: give one, as in hotlora generate --adapter runs/mine "3 + 4 =".')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise HotLoraError("The prompt is no valid UTF-8: give it as text.") from error
    sampling = Sampling(1, temperature, top_p, seed)
    check_answering(max_new_tokens, sampling)
    given_template = _given_template(tools, chat_template_kwargs)
    of_template = {"--system": system, "--tools": tools, "--chat-template-kwargs": chat_template_kwargs}
    _check_template(raw, of_template)
    if merge and adapter is None:
        raise HotLoraError("there is no adapter to merge: give one (--adapter), or leave merge out.")
    path: Any = adapter or model
    base = model if adapter is not None else None
    found = find(path, base)
    net, tokenizer = load(path, base, merge=merge, **given)
    if raw is None:
        raw = not found.is_chat if found.is_chat is not None else tokenizer.chat_template is None
        if found.is_chat is None and not raw:
            err.print("the prompt is put into the model's chat template (--raw: as it is)")
    _check_template(raw, of_template)
    asked: Any = prompt if raw else [*_system(system), {"role": "user", "content": prompt}]
    answer(
        net, tokenizer, asked, max_new_tokens=max_new_tokens, sampling=sampling, stream=True, **given_template
    )  # fmt: skip


@options_of(LoadOptions, only=("dtype", "device", "offload", "offload_folder"))
def chat(
    run: Annotated[Path, typer.Argument(help="A run's folder, a saved adapter, or a model.")],
    model: _Base = None,
    system: _System = None,
    tools: _Tools = None,
    chat_template_kwargs: _Kwargs = None,
    max_new_tokens: _Tokens = 512,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    **given: Any,
) -> None:
    """Talk to a model: it sees the whole conversation. /clear starts anew, /exit or Ctrl-D ends."""
    from ..evaluation.generate import Sampling, end_ids
    from ..evaluation.talk import answer, check_answering, prompt_ids
    from ..runs.load import find, load

    sampling = Sampling(1, temperature, top_p, seed)
    check_answering(max_new_tokens, sampling)
    given_template = _given_template(tools, chat_template_kwargs)
    net, tokenizer = load(run, model, **given)
    prompt_ids(
        tokenizer, [*_system(system), {"role": "user", "content": "?"}], **given_template
    )  # no template is told before a word is typed
    ends = end_ids(net, tokenizer, chat=True)
    if find(run, model).is_chat is False:
        err.print("it was trained on plain texts; chat writes by the chat template, `hotlora generate` does not")
    err.print(f"{run} answers; /clear starts anew, /exit ends.")
    messages = _system(system)
    while True:
        if sys.stdin.isatty():
            out.print("you: ", style="bold", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip() == "/clear":
            messages = _system(system)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        text = answer(
            net, tokenizer, messages, max_new_tokens=max_new_tokens, sampling=sampling, stream=True, ends=ends,
            **given_template,
        )  # fmt: skip
        messages.append({"role": "assistant", "content": text.strip()})


def _given_template(tools: Path | None, kwargs: str | None) -> dict[str, Any]:
    """What the chat template is given besides the messages, as `answer` takes it."""
    from ..base.files import JSON_ERRORS
    from ..tasks.messages import template_options, tools_of

    given: dict[str, Any] = {}
    if tools is not None:
        try:
            given["tools"] = tools_of(str(tools), tools.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise HotLoraError(f"{tools} is no UTF-8 text: give a JSON list of tools.") from error
    if kwargs is not None:
        try:
            options = json.loads(kwargs)
        except JSON_ERRORS as error:
            raise HotLoraError(f"--chat-template-kwargs is no JSON ({error}): {kwargs}") from error
        given["chat_template_kwargs"] = template_options("--chat-template-kwargs", options)
    return given


def _check_template(raw: bool | None, given: Mapping[str, Any]) -> None:
    """HotLoraError: the prompt goes to the model as it is, and something was given for the chat template."""
    if raw and (unread := [flag for flag, value in given.items() if value is not None]):
        raise HotLoraError(f"for the chat template alone: {', '.join(unread)}. Leave that out, or give --chat.")


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]
