"""What plain PEFT does, as values that can be compared: run with hotlora imported, and in a process without it."""

import hashlib
import importlib
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.optimizers import create_lorafa_optimizer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tiny import fill, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM


def facts(folder: str) -> dict[str, Any]:
    """Name -> what was found. Everything in `folder` is written anew."""
    found = {of.__name__: of(Path(folder) / of.__name__) for of in (tables, adapters, files, refusals, conversion)}
    return {f"{of}: {name}": value for of, facts in found.items() for name, value in facts.items()}


def facts_and_changes(folder: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The facts without hotlora, and what of PEFT is another object once hotlora is imported -> whose it is now."""
    assert "hotlora" not in sys.modules
    found = facts(folder)
    assert "hotlora" not in sys.modules
    ours = ("transformers.integrations.peft", "transformers.modeling_utils")
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "peft" or name in ours]
    before = _held(modules)
    for name in (
        "adapter",
        "adapter.load",
        "adapter.formats.export",
        "adapter.formats.import_peft",
        "adapter.quantize",
        "training.rank_growth",
        "training.reprofile",
        "training.gradient_checkpointing",
        "training.trainer",
    ):
        importlib.import_module(f"hotlora.{name}")
    after = _held(modules)
    assert after.keys() >= before.keys()
    return found, {name: _where(value) for name, value in after.items() if value is not before.get(name)}


def loaded(folder: str, way: str) -> str:
    """Whether an adapter loads where nobody has imported hotlora, and whether it has been imported by then; or the
    error."""
    assert "hotlora" not in sys.modules
    warnings.simplefilter("ignore")
    try:
        base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
        if way == "peft":
            PeftModel.from_pretrained(base, f"{folder}/adapter")
        else:
            base.load_adapter(f"{folder}/adapter")
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return f"loaded {'hotlora' in sys.modules}"


def _held(modules: list[ModuleType]) -> dict[str, Any]:
    """Every function, class and table entry of PEFT's modules, and what its classes hold."""
    held = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            inner = vars(value) if isinstance(value, type) else value if isinstance(value, dict) else {}
            whose = getattr(value, "__module__", module.__name__)
            if whose == module.__name__ and not isinstance(value, ModuleType):
                held[f"{module.__name__}.{name}"] = value
                held |= {f"{module.__name__}.{name}.{key}": part for key, part in inner.items()}
    ignored = ("__builtins__", ".__doc__", ".__abstractmethods__", "._abc_impl", ".__dict__", ".__weakref__")
    return {name: value for name, value in held.items() if not any(part in name for part in ignored)}


def _where(value: Any) -> str:
    """The module whose code runs: `functools.wraps` gives a function its original's name."""
    return str(getattr(value, "__func__", value).__globals__["__name__"])


def _lora(seed: int = 0, family: str = "mixtral", **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(tiny_model(family), config)
    fill(model, seed)
    return model.eval()


def _digest(tensors: Any) -> str:
    return hashlib.sha256(
        b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


def _sorted(config: dict[str, Any]) -> dict[str, Any]:
    """With target_modules, a set, in order."""
    return {name: sorted(value) if isinstance(value, list | set) else value for name, value in config.items()}


def _logits(model: Any) -> str:
    with torch.no_grad():
        return _digest([model(**tiny_batch()).logits])


def _message(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}: {error}"
    return "no error"


def tables(folder: Path) -> dict[str, Any]:
    config, tuner = PEFT_TYPE_TO_CONFIG_MAPPING["LORA"], PEFT_TYPE_TO_TUNER_MAPPING["LORA"]
    return {
        "config": config is LoraConfig,
        "isinstance": isinstance(LoraConfig(), config),
        "tuner": tuner is peft.LoraModel,
        "get_peft_config": repr(peft.get_peft_config({"peft_type": "LORA", "r": 3})),
    }


def adapters(folder: Path) -> dict[str, Any]:
    """Injection, status, several adapters, merging, LoRA-FA's optimizer."""
    model = _lora()
    found: dict[str, Any] = {
        "type": str(type(model.base_model)),
        "repr": repr(model),
        "status": asdict(model.get_model_status()),
        "layers": [asdict(status) for status in model.get_layer_status()],
        "logits": _logits(model),
    }
    with model.disable_adapter():
        found["disabled"] = _logits(model)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    fill(model, 1, "b")
    model.add_adapter("c", LoraConfig(r=4, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[]))
    model.add_weighted_adapter(["default", "default"], [0.5, 0.25], "both", "cat")
    for name in ("b", "c", "both"):
        model.set_adapter(name)
        found[f"logits of {name}"] = _logits(model)
        found[f"trained of {name}"] = [n for n, p in model.named_parameters() if p.requires_grad]
    model.delete_adapter("c")
    found["merged"] = _logits(model.merge_and_unload(adapter_names=["both"]))
    model = _lora()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1)
    model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    optimizer.step()
    found["lorafa"] = _digest(p for n, p in model.named_parameters() if "lora_" in n)
    return found


def files(folder: Path) -> dict[str, Any]:
    """Saving, loading in PEFT's and transformers' ways, swapping; with a key that this PEFT does not know, too."""
    first, second = _lora(1), _lora(2)
    first.save_pretrained(folder / "first")
    second.save_pretrained(folder / "second")
    config = folder / "first" / "adapter_config.json"
    found: dict[str, Any] = {
        "config": _sorted(json.loads(config.read_text())),
        "keys": sorted(load_file(folder / "first" / "adapter_model.safetensors")),
    }
    config.write_text(config.read_text().replace('"r": 4', '"of_a_newer_peft": 1, "r": 4'))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        configs = [kind.from_pretrained(folder / "first") for kind in (PeftConfig, LoraConfig)]
    found["configs"] = [(str(type(config)), _sorted(config.to_dict())) for config in configs]
    found["warnings"] = sorted({str(w.message) for w in caught if "of_a_newer_peft" in str(w.message)})
    for low in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model("mixtral"), folder / "first", "x", low_cpu_mem_usage=low).eval()
        found[f"loaded, {low}"] = [
            _logits(loaded),
            str(type(loaded.base_model)),
            [n for n, _ in loaded.named_parameters()],
        ]
    loaded.load_adapter(folder / "second", "y")
    loaded.set_adapter("y")
    found["loaded second"] = _logits(loaded)
    hotswap_adapter(loaded, str(folder / "first"), "y")
    found["swapped"] = _logits(loaded)
    loaded.load_adapter(folder / "second", "y", token=False)
    found["loaded over another"] = _logits(loaded)
    of_transformers = tiny_model("mixtral")
    of_transformers.load_adapter(str(folder / "second"))
    found["loaded by transformers"] = _logits(of_transformers)
    found["loaded twice"] = _message(lambda: of_transformers.load_adapter(str(folder / "first"), "default"))
    of_transformers.load_adapter(str(folder / "first"), "default", hotswap=True)
    found["swapped by transformers"] = _logits(of_transformers)
    return found


def refusals(folder: Path) -> dict[str, Any]:
    model = _lora()
    _lora(use_dora=True).save_pretrained(folder)
    return {
        "nothing to adapt": _message(lambda: model.add_adapter("b", LoraConfig(target_modules=["none"]))),
        "after it": [(name, str(type(module))) for name, module in model.named_modules()],
        "swap": _message(lambda: hotswap_adapter(model, str(folder), "default")),
        "an option that is not there": _message(lambda: LoraConfig(plan={})),
        "a plan that is no object": _message(lambda: PeftConfig.from_peft_type(peft_type="LORA", plan=1, r=3)),
    }


def conversion(folder: Path) -> dict[str, Any]:
    """Names that PEFT converts for transformers 5: a router's and experts' adapters of Mixtral."""
    names = {"target_modules": ["w1", "w2", "w3", "q_proj"]}
    model = _lora(3, **names)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), folder).eval()
    return {
        "modules": [(name, str(type(m))) for name, m in model.named_modules() if "lora_" not in name],
        "keys": sorted(load_file(folder / "adapter_model.safetensors")),
        "loaded": _logits(loaded),
    }
