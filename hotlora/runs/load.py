"""A run, or an adapter alone, as a model and a tokenizer to use."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..adapter.load import CONFIG_FILE, base_quantization, load_adapter
from ..base.errors import FileError, HotLoraError
from ..base.files import read_json
from ..base.quiet import quiet
from ..base.records import read_record
from ..hf.models import NANO, load_model, load_tokenizer
from .folder import load_base


@dataclass(frozen=True)
class Found:
    """What lies at a path: a base model, and a saved adapter for it, or none."""

    model: str
    adapter: Path | None
    tokenizer: str
    """Where the tokenizer lies."""
    is_chat: bool | None
    """Whether a run was trained on conversations, which its chat template wrote; None: nothing tells."""


def find(path: str | Path, model: str | None = None) -> Found:
    """A run's folder, an adapter's, or a model (a folder, a name on the Hub, nano).

    model: the base, in place of the one that the adapter notes.

    FileError: a folder with neither; an adapter that notes no base.
    """
    folder, is_chat = Path(path).expanduser(), None
    if not folder.exists() and folder.parent.is_dir() and str(path) != NANO:
        raise FileError(f"{path} does not exist: give a run's folder, an adapter's, or a model.")
    if folder.name in ("adapter", "model") and (folder.parent / "run.json").is_file():
        is_chat = "chat_template" in read_record(folder.parent).get("config", {})
    if (folder / "run.json").is_file():
        is_chat = "chat_template" in read_record(folder).get("config", {})
        there = [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]
        if not there:
            raise FileError(f"{folder} is a run without an adapter or model: it has not been trained to its end.")
        folder = there[0]
    if (folder / CONFIG_FILE).is_file():
        noted = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
        base = model or noted
        if not base:
            raise FileError(f"{folder / CONFIG_FILE} notes no base model: give it (model=, --model).")
        own = (folder / "tokenizer_config.json").is_file()
        return Found(base, folder, str(folder) if own else base, is_chat)
    if model is not None:
        raise HotLoraError(f"{path} is no adapter, so there is nothing to load onto {model}: leave one of them out.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileError(f"{folder} holds no run, adapter or model: give the folder that a training wrote.")
    name = str(folder) if folder.is_dir() else str(path)
    return Found(name, None, name, is_chat)


def load(
    path: str | Path, model: str | None = None, *, merge: bool = False, dtype: str = "auto", device: str = "auto"
) -> tuple[Any, Any]:
    """(model, tokenizer) of a run's folder, of an adapter's, or of a model; ready to generate.

    The adapter's base is the one that it notes, with its experts stored as in training, and with the adapters merged in
    that it was trained on top of.

    Args:
        model: the base, where it is not at the place that the adapter notes.
        merge: fold the adapter into the weights, in memory: faster, and rounded to their dtype.
        dtype, device: as `load_model` takes them.

    Raises:
        FileError, ModelError: nothing is there, or the base is not where it was. PlanError: the adapter is for another
        model. HotLoraError: an option that does not exist, or merging into quantized experts.
    """
    found = find(path, model)
    tokenizer = load_tokenizer(found.tokenizer)
    if found.adapter is None:
        return load_model(found.model, dtype=dtype, device=device).eval(), tokenizer
    stored = base_quantization(found.adapter)
    if stored and merge:
        raise HotLoraError(f"an adapter cannot be merged into {stored}: leave merge out.")
    loading: dict[str, Any] = {"quantize": stored.bits, "keep": stored.keep} if stored else {}
    base = load_base(found.model, adapter=found.adapter, dtype=dtype, device=device, **loading)
    with quiet():
        net: Any = load_adapter(base, found.adapter)
        return (cast(Any, net).merge_and_unload() if merge else net).eval(), tokenizer
