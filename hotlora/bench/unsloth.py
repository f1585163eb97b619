"""The baseline `unsloth`: the LoRA of PEFT's `target_parameters`, computed by Unsloth's MoE code.

Unsloth patches torch, transformers and PEFT for the whole process when it is imported. So it is imported in `adapted`
and nowhere else, and `bench` gives each contender a process of its own.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..base.errors import ModelError
from ..cost.activations import autocast
from ..hf.moe_layers import moe_layers

_ON_CPU = "UNSLOTH_ALLOW_CPU"  # Unsloth's own switch
_TOKENS = 8  # of the forward that shows whose code runs
_TOLERANCE = 0.03  # of a layer's output in norm: rounding is well within, a norm or an activation left out is not
_GROUPED = ("forward_native_grouped_mm", "forward_triton_grouped_gemm", "forward_sonic_moe")  # of its moe_utils
_LOOP = "forward_native_moe_loop"  # its stand-in without a GPU
_BY_PEFT = ("_activate_lora", "_fold_moe_lora_without_parametrization")  # W + BA, by PEFT or as PEFT does


def missing() -> str | None:
    """Why Unsloth cannot take part here, or None. Imports nothing of it."""
    if any(importlib.util.find_spec(name) is None for name in ("unsloth", "unsloth_zoo")):
        return "not installed"
    if not torch.cuda.is_available() and os.environ.get(_ON_CPU) != "1":
        return "installed, but it needs a GPU"
    return None


def adapted(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` with PEFT's adapters, the experts' computed by Unsloth. All else stays as it is for the others: PEFT's
    LoRA on attention, transformers' attention, the loss that the model has.

    config: with the experts' fused weights as `target_parameters`.

    Raises:
        ModelError: Unsloth does not compute this family's experts (PEFT would, and nothing would say so), or computes
            something else.
    """
    calls = _calls_of_experts(model)
    _import_unsloth()
    import peft  # Unsloth puts its get_peft_model here

    model.set_experts_implementation("unsloth")
    wrapped = cast(PeftModel, peft.get_peft_model(model, config)).train()
    _check(model, calls)
    return wrapped


def _import_unsloth() -> None:
    """Imports it as its users do, without its greeting, and with the folder of copies of its code that it makes in
    the current one made elsewhere."""
    if "UNSLOTH_COMPILE_LOCATION" not in os.environ:
        folder = os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp(prefix="hotlora-unsloth-")
        Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=0)  # atexit does not run in bench's processes
    os.environ["UNSLOTH_FUSED_FORWARD"] = "0"  # the loss is TRL's, as for all
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # "should be imported before transformers"
        import unsloth  # noqa: F401


def _calls_of_experts(model: PreTrainedModel) -> dict[str, tuple[Any, Any, Tensor]]:
    """Path of each experts module -> what it gets and gives in a forward on a few tokens."""
    calls: dict[str, tuple[Any, Any, Tensor]] = {}

    def keeper(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: calls.__setitem__(path, (args, kwargs, output))

    hooks = [
        model.get_submodule(layer.experts).register_forward_hook(keeper(layer.experts), with_kwargs=True)
        for layer in moe_layers(model)
    ]
    with torch.no_grad(), autocast(model.device.type, model.dtype):
        model(input_ids=torch.arange(_TOKENS, device=model.device)[None])
    for hook in hooks:
        hook.remove()
    return calls


def _check(model: PreTrainedModel, calls: dict[str, tuple[Any, Any, Tensor]]) -> None:
    """Gives the adapted experts, whose B is 0, what they had before, and compares what they give. Counts which
    functions run, and looks for gradients."""
    ran: Counter[str] = Counter()
    errors, untouched = [], 0
    for path, (args, kwargs, expected) in calls.items():
        experts = model.get_submodule(path)
        leaves, named = [_leaf(value) for value in args], {name: _leaf(value) for name, value in kwargs.items()}
        with autocast(model.device.type, model.dtype):
            experts(*leaves, **named)  # at first Unsloth runs it several times, to see what its patches do
            with _count_calls() as counted:
                found = experts(*leaves, **named)
        found.float().square().mean().backward()
        ran += counted
        errors.append(((found.float() - expected.float()).norm() / expected.float().norm()).item())
        gradients = [p.grad for name, p in experts.named_parameters() if "lora_B" in name]
        untouched += sum(gradient is None or not gradient.any() for gradient in gradients)
    model.zero_grad()
    grouped, by_peft = (sum(ran[name] for name in names) for names in (_GROUPED, _BY_PEFT))
    allowed = grouped if model.device.type != "cpu" else grouped + ran[_LOOP]
    if allowed != len(calls) or by_peft or untouched or not all(error <= _TOLERANCE for error in errors):
        raise ModelError(
            f"Unsloth {version('unsloth_zoo')} does not compute LoRA on the experts of {model.config.model_type} here "
            f"(in {len(calls)} layers its grouped products ran {grouped} times, its loop over experts {ran[_LOOP]} "
            f"times, and W + BA was built {by_peft} times; {untouched} adapters got no gradient; its output differs "
            f"from transformers' by {max(errors):.1%}): leave the contender unsloth out."
        )


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _count_calls() -> Iterator[Counter[str]]:
    """The names of all Python functions called, with how often. Names, since Unsloth runs a copy of its module, which
    it makes itself."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)
