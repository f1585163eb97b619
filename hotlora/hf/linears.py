"""Which linear layers of a model a base in few bits stores so, and what bitsandbytes has put in the place of some."""

from torch import nn
from transformers import PreTrainedModel

from .moe_layers import _ATTENTION, _attention_paths, _decoder_layers, _inside, _modules, moe_layers

_BITS = {"Linear4bit": 4, "Linear8bitLt": 8}


def quantized_bits_of(module: nn.Module) -> int | None:
    """Of one of bitsandbytes' linear layers; None: it is none. bitsandbytes need not be installed."""
    kind = type(module)
    return _BITS.get(kind.__name__) if kind.__module__.startswith("bitsandbytes.") else None


def plain_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Path -> layer: attention, shared experts and dense MLPs of the text decoder.

    Not routers, nor gates of one output; not the mixers of state space models, whose kernels read a layer's weight
    themselves; nothing that the family keeps in float32 (`_keep_in_fp32_modules`). The head is in no decoder layer.

    ModelError: as `moe_layers`.
    """
    modules = dict(_modules(model))
    routers = tuple(layer.router for layer in moe_layers(model))
    in_float32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    found: dict[str, nn.Linear] = {}
    for decoder in _decoder_layers(model, modules).values():
        inside = _inside(decoder, modules)

        def part(path: str, decoder: str = decoder) -> str:
            return path.removeprefix(f"{decoder}.").split(".")[0]

        linears = {path: module for path, module in inside.items() if type(module) is nn.Linear}
        mixers = {part(path) for path in linears if _ATTENTION.fullmatch(path.rpartition(".")[2])}
        mixers -= {part(path) for path in _attention_paths(decoder, inside)}
        for path, module in linears.items():
            is_router = any(path == router or path.startswith(f"{router}.") for router in routers)
            kept = is_router or module.out_features == 1 or any(name in path for name in in_float32)
            if not kept and part(path) not in mixers:
                found[path] = module
    return found
