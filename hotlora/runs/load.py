"""A run, or an adapter alone, as a model and a tokenizer to use."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapter import load as saved
from ..adapter.load import CONFIG_FILE, base_quantization
from ..base.errors import FileError, HotLoraError
from ..base.files import read_json, read_json_lines
from ..base.quiet import quiet
from ..base.records import read_record
from ..hf.hub import adapter_on_hub, can_be_on_hub
from ..hf.models import NANOS, checked_device, load_tokenizer
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from .folder import adapter_in, check_has_no_perft, load_base


@dataclass(frozen=True)
class Found:
    """What lies at a path: a base model, and a saved adapter for it, or none."""

    model: str
    adapter: Path | None
    tokenizer: str
    """Where the tokenizer lies."""
    is_chat: bool | None
    """Whether a run was trained on conversations, which its chat template wrote; None: nothing tells."""
    dtype: str
    """What a run was asked to train in; auto: nothing tells."""


def find(path: str | Path, model: str | None = None) -> Found:
    """A run's folder, an adapter's, or a model (a folder, a name on the Hub, nano); an adapter's name on the Hub.

    model: the base, in place of the one that the adapter notes.

    FileError: a folder with neither; an adapter that notes no base, one that is gone, or a revision of one.
    """
    # The command line's Path of a name on the Hub has backslashes on Windows.
    name = Path(path).as_posix()
    folder = _local(name)
    if not folder.exists() and folder.parent.is_dir() and name not in NANOS:
        raise FileError(f"{path} does not exist: give a run's folder, an adapter's, or a model.")
    within = folder.parent if folder.name in ("adapter", "model") else folder
    run = next((at for at in (folder, within) if (at / "run.json").is_file()), None)
    config = {} if run is None else read_record(run).get("config", {})
    is_chat, dtype = None if run is None else "chat_template" in config, config.get("dtype", "auto")
    if run == folder:
        there = [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]
        if not there:
            raise FileError(f"{folder} is a run without an adapter or model: it has not been trained to its end.")
        folder = there[0]
    if (folder / CONFIG_FILE).is_file():
        base = model or _noted_base(folder / CONFIG_FILE)
        own = (folder / "tokenizer_config.json").is_file()
        return Found(base, folder, str(folder) if own else base, is_chat, dtype)
    if model is not None:
        raise HotLoraError(f"{path} is no adapter, so there is nothing to load onto {model}: leave one of them out.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileError(f"{folder} holds no run, adapter or model: give the folder that a training wrote.")
    name = str(folder) if folder.is_dir() else name
    return Found(name, None, name, is_chat, dtype)


def _local(name: str) -> Path:
    """A folder; of an adapter on the Hub the one that it is downloaded to. A name in a folder that is here is not asked
    for there: it was mistyped."""
    folder = Path(name).expanduser()
    is_here = folder.exists() or folder.parent.is_dir() or name in NANOS
    return folder if is_here else adapter_on_hub(name) or folder


def _noted_base(file: Path) -> str:
    """The base that an adapter's config notes."""
    config = read_json(file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise FileError(f"{file} notes no base model: give it (model=, --model).")
    if revision not in (None, "main"):
        raise FileError(
            f"{file} notes revision {revision!r} of {base}, and models are loaded from their main one: give a folder "
            f"with that revision (model=, --model), as hf download {base} --revision {revision} --local-dir FOLDER "
            "makes it."
        )
    if not can_be_on_hub(base) and not os.path.exists(os.path.expanduser(base)):
        raise FileError(f"{file} notes the base {base}, which is not there: give its folder or name (model=, --model).")
    return base


def load(
    path: str | Path, model: str | None = None, *, merge: bool = False, dtype: str = "auto", device: str = "auto",
    offload: str = "none", offload_folder: str | Path | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(model, tokenizer) of a run's folder, of an adapter's, or of a model; ready to generate.

    The adapter's base is the one that it notes, with its experts stored as in training, and with the adapters merged in
    that it was trained on top of.

    Args:
        model: the base, where it is not at the place that the adapter notes.
        merge: fold the adapter into the weights, in memory: faster, and rounded to their dtype.
        dtype, device: as `load_model` takes them; on a GPU "auto" is what the run was trained in.
        offload, offload_folder: as in training: none, cold or all.

    Raises:
        FileError, ModelError: nothing is there, or the base is not where it was.
        PlanError: the adapter is for another model.
        HotLoraError: an option that does not exist, or merging into quantized experts.
    """
    found = find(path, model)
    if dtype == "auto" and checked_device(device).type != "cpu":  # where half precision is slower
        dtype = found.dtype
    tokenizer = load_tokenizer(found.tokenizer)
    loading: Any = {"dtype": dtype, "device": device, "offload": offload, "offload_folder": offload_folder}
    if found.adapter is None:
        return load_base(found.model, **loading).eval(), tokenizer
    base = _base_of(found, can_merge=merge, **loading)
    with quiet():
        net: Any = saved.load_adapter(base, found.adapter)
        return (net.merge_and_unload() if merge else net).eval(), tokenizer


def load_adapter(
    base_model: nn.Module | str | Path,
    path: str | Path | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """A saved adapter on its base model, as `PeftModel.save_pretrained` or a training wrote it.

        model = hotlora.load_adapter(base_model, "runs/mine")      # onto a model that is loaded
        model = hotlora.load_adapter("runs/mine")                  # the base is the one that the adapter notes
        model = hotlora.load_adapter("path/of/base", "runs/mine")  # or another copy of it

    A plain model is wrapped, in place as in PEFT, and the adapter is active. To a `PeftModel` the adapter is
    added under `adapter_name`; call `set_adapter` to use it. On an error the model is as it was.

    Args:
        base_model: a model; its folder or name; or, with no `path`, the adapter's.
        path: the adapter's folder, or a run's.
        is_trainable: with gradients, and in training mode.

    Raises:
        FileError: no such folder, not a hotlora adapter, a truncated file, weights that are not those that were saved,
            or that do not fit the config.
        PlanError: the adapter was made for another model, or on top of an adapter that is not merged into this one.
        HotLoraError: an adapter_name that is taken, or that torch cannot take.
    """
    if isinstance(base_model, nn.Module):
        if path is None:
            raise FileError(
                "path is not given: give the folder of the adapter, or of the run, that goes onto the model."
            )
        return saved.load_adapter(base_model, adapter_in(_local(Path(path).as_posix())), adapter_name, is_trainable)
    found = find(base_model) if path is None else find(path, str(base_model))
    if found.adapter is None:
        name = base_model if path is None else path
        what = "no folder here, and no adapter on the Hub"
        if str(name) in NANOS or Path(name).expanduser().is_dir():
            what = "no adapter but a model (hotlora.load_model)"
        raise FileError(f"{name} is {what}: give an adapter's folder, or a run's.")
    return saved.load_adapter(_base_of(found), found.adapter, adapter_name, is_trainable)


def _base_of(found: Found, *, can_merge: bool = False, **options: Any) -> Any:
    """The adapter's base, stored as in training, and with the adapters merged in that it was trained on top of."""
    assert found.adapter is not None
    stored = base_quantization(found.adapter)
    if stored and can_merge:
        raise HotLoraError(
            f"an adapter cannot be merged into {stored}: leave merge out, or merge first (hotlora merge)."
        )
    if can_merge:
        check_has_no_perft([found.adapter])
    loading: dict[str, Any] = {"quantize": 0} if can_merge else {}
    if stored:
        loading = {"quantize": stored.bits, "keep": stored.keep, "quantize_linear": stored.linear}
    return load_base(found.model, adapter=found.adapter, **options, **loading)


class Run:
    """What a training left in its folder: its record, and what to go on with.

        run = hotlora.Run("runs/mine")          # what `hotlora.train` returns
        run.model.generate(**run.tokenizer("Question: …", return_tensors="pt"))

    FileError: no run there; of what it does not have, or what is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.record = read_record(self.folder)
        """`run.json`: options, parameters, losses, scores with intervals, versions"""

    @property
    def model(self) -> Any:
        """With its adapter (of full fine-tuning: itself), ready to generate. Loaded when first asked for."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load(self.folder)

    @cached_property
    def plan(self) -> ExpertPlan:
        """The experts that the adapter has: after re-profiling, or with ranks of their own, not those of plan.json."""
        adapter = self.folder / "adapter"
        if (adapter / CONFIG_FILE).is_file():
            return ExpertPlan.from_dict(saved.saved_config(adapter).plan)
        return ExpertPlan.load(self.folder / "plan.json")

    @cached_property
    def profile(self) -> RoutingProfile:
        """The routing that they were chosen by."""
        path = self.record.get("profile", {}).get("path", "profile.safetensors")
        return RoutingProfile.load(self.folder / path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row for each optimizer step, for `pandas.DataFrame(run.metrics)`."""
        return read_json_lines(self.folder / "metrics.jsonl")

    def __repr__(self) -> str:
        told = [self.record["name"], self.record["status"]]
        if training := self.record.get("training"):
            told.append(f"{training['steps']} steps, loss {training['loss_first']:.4f} → {training['loss_last']:.4f}")
        for task, result in (self.record.get("evaluation") or {}).items():
            told.append(f"{task} {result['metric']} {result['accuracy']:.1%}")
        return f"Run({str(self.folder)!r}: {', '.join(told)})"
