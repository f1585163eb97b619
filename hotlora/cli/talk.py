"""The commands that let a trained model answer: `generate` and `chat`."""

import sys
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
    if raw and system is not None:
        raise HotLoraError("A system message needs the chat template: leave --system out, or give --chat.")
    if merge and adapter is None:
        raise HotLoraError("there is no adapter to merge: give one (--adapter), or leave merge out.")
    path, base = (adapter, model) if adapter is not None else (model, None)
    found = find(str(path), base)
    net, tokenizer = load(str(path), base, merge=merge, **given)
    if raw is None:
        raw = not found.is_chat if found.is_chat is not None else tokenizer.chat_template is None
        if found.is_chat is None and not raw:
            err.print("the prompt is put into the model's chat template (--raw: as it is)")
    if raw and system is not None:
        raise HotLoraError("A system message needs the chat template: leave --system out, or give --chat.")
    asked: Any = prompt if raw else [*_system(system), {"role": "user", "content": prompt}]
    answer(net, tokenizer, asked, max_new_tokens=max_new_tokens, sampling=sampling, stream=True)


@options_of(LoadOptions, only=("dtype", "device", "offload", "offload_folder"))
def chat(
    run: Annotated[Path, typer.Argument(help="A run's folder, a saved adapter, or a model.")],
    model: _Base = None,
    system: _System = None,
    max_new_tokens: _Tokens = 512,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    **given: Any,
) -> None:
    """Talk to a model: it sees the whole conversation. /clear starts anew, /exit or Ctrl-D ends."""
    from ..evaluation.generate import Sampling, end_ids
    from ..evaluation.talk import answer, check_answering, prompt_ids
    from ..runs.load import load

    sampling = Sampling(1, temperature, top_p, seed)
    check_answering(max_new_tokens, sampling)
    net, tokenizer = load(str(run), model, **given)
    prompt_ids(
        tokenizer, [*_system(system), {"role": "user", "content": "?"}]
    )  # no template is told before a word is typed
    ends = end_ids(net, tokenizer, chat=True)
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
            net, tokenizer, messages, max_new_tokens=max_new_tokens, sampling=sampling, stream=True, ends=ends
        )
        messages.append({"role": "assistant", "content": text.strip()})


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]
