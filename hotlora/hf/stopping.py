"""The tokens at which a model's answers end, in the one place where transformers, vLLM and SGLang look for them: the
`eos_token_id` of its generation config, which is one token or a list."""

from collections.abc import Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..base.errors import FileError
from ..base.files import read_json

FILE = "generation_config.json"


def stop_tokens(model: Any) -> list[int]:
    """Of its generation config; empty where it has none."""
    return _listed(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def add_stop_tokens(model: Any, ids: Iterable[int]) -> None:
    """Further ones; the generation config stays as it is where it has them all."""
    config, own = getattr(model, "generation_config", None), stop_tokens(model)
    new = sorted(set(ids).difference(own))
    if config is None or not new:
        return
    # Read from a file, as transformers refuses to save a config that was changed and has, as published ones do,
    # `temperature` beside `do_sample: false`.
    with TemporaryDirectory() as temporary:
        told = {name: value for name, value in config.to_dict().items() if name != "_from_model_config"}
        changed = type(config).from_dict({**told, "eos_token_id": [*own, *new]})
        changed.to_json_file(Path(temporary) / FILE)
        model.generation_config = type(config).from_pretrained(temporary)


def saved_stop_tokens(folder: str | Path) -> list[int]:
    """Of the generation config that lies beside a saved adapter; empty where there is none.

    FileError: it is no such file.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return []
    found = _listed(read_json(file).get("eos_token_id"))
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
        raise FileError(f"{file}: eos_token_id is {found!r}; it must be a token id, or a list of them.")
    return found


def save_stop_tokens(model: Any, ids: Collection[int], folder: Path) -> None:
    """The model's generation config beside a saved adapter, where it has one of these tokens."""
    if set(ids).intersection(stop_tokens(model)):
        model.generation_config.to_json_file(folder / FILE)  # save_pretrained of transformers 5.17 refuses such ones


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
