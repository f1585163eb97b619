"""Names of other libraries that they do not promise to keep: each is there, and none is used that is not listed."""

import ast
import importlib
import inspect
import pkgutil
import re
from importlib.metadata import version

import pytest
from test_structure import MODULES
from transformers import TrainerCallback
from trl import SFTTrainer

from hotlora.base.errors import HotLoraError
from hotlora.hf.internals import NAMES, internal

LIBRARIES = ("transformers", "trl", "peft", "torch", "accelerate", "datasets", "safetensors")
# Modules that their library's documentation imports from, besides the libraries themselves.
DOCUMENTED = {
    "accelerate.utils", "safetensors.torch", "torch.distributed", "torch.distributed.tensor", "torch.nn.functional",
    "torch.overrides", "torch.utils.tensorboard", "transformers.distributed",
    "transformers.integrations:TensorBoardCallback", "transformers.integrations:WandbCallback",
    "transformers.integrations.sdpa_attention", "transformers.masking_utils:sdpa_mask",
    "transformers.quantizers", "transformers.utils.logging",
    "transformers.utils.quantization_config", "peft.tuners.lora:LoraLayer", "peft.tuners.lora:LoraModel",
    "peft.utils:CONFIG_NAME", "peft.utils:SAFETENSORS_WEIGHTS_NAME", "peft.utils:get_peft_model_state_dict",
    "peft.utils:set_peft_model_state_dict",
}  # fmt: skip
# transformers has these since the version given.
SINCE = {
    "transformers.integrations.moe#has_post_expert_norm": (5, 20),
    "transformers.integrations.moe#_is_expert_parallel": (5, 18),
}
# What other packages of the bench are asked for is checked when it runs: it refuses what does not compute LoRA.
ELSEWHERE = {"hotlora.bench.unsloth", "hotlora.bench.axolotl"}
# Run in an engine's own environment, and are held to what that engine says of itself (hotlora verify).
ELSEWHERE |= {name for name in MODULES if name.startswith("hotlora.engines.") and name.endswith("_runner")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items() if name not in ELSEWHERE}
LISTED = {part for name in NAMES for part in re.split(r"[:#.]", name)}


def is_there(name: str) -> bool:
    module, _, given = name.partition("#")
    try:
        found = pkgutil.resolve_name(module)
    except (ImportError, AttributeError):
        return False
    return not given or re.search(rf"\b{given}\b", inspect.getsource(found)) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_still_there(name):
    library = name.partition(":")[0].partition(".")[0]
    installed = tuple(map(int, version(library).split(".")[:2]))
    if installed < SINCE.get(name, (0,)):
        pytest.skip(f"{library} has it since {SINCE[name]}")
    assert is_there(name), f"{library} {version(library)} has no {name} any more. Without it: {NAMES[name]}"


def test_what_is_gone_is_told(monkeypatch):
    monkeypatch.setitem(NAMES, "transformers.integrations.moe:GONE", "no adapter on experts")
    assert not is_there("transformers.integrations.moe:GONE") and not is_there("transformers.integrations.moe#gone")
    with pytest.raises(HotLoraError, match=r"transformers [\d.]+ has no .*GONE, without which no adapter on experts"):
        internal("transformers.integrations.moe:GONE")


def imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> `module:name`, of all that a module imports from these libraries."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: f"{alias.name}:" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
    return {local: name for local, name in found.items() if re.split(r"[.:]", name)[0] in LIBRARIES}


def is_public(name: str) -> bool:
    module, _, attribute = name.partition(":")
    documented = module in (*LIBRARIES, "torch.nn") or {module, name, f"{module}.{attribute}"} & DOCUMENTED
    return bool(documented) and not re.search(r"[.:]_[a-z]", name)


@pytest.mark.parametrize("module", TREES)
def test_no_import_of_what_is_not_listed(module):
    names = {name for name in imported(TREES[module]).values() if not is_public(name)}
    known = {prefix for listed in NAMES for prefix in (listed, listed.partition("#")[0].rpartition(".")[0])}
    known |= {listed.partition(":")[0] for listed in NAMES}
    unknown = {name for name in names if name not in known and name.replace(":", ".") not in known}
    assert not unknown, f"{module}: list {unknown} in hf/internals.py, with what breaks without"


@pytest.mark.parametrize("module", TREES)
def test_transformers_and_trl_are_not_asked_for_internals_at_import(module):
    top = ast.Module([node for node in TREES[module].body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    found = {name for name in imported(top).values() if name.split(".")[0].partition(":")[0] in ("transformers", "trl")}
    assert all(map(is_public, found)), f"{module} imports {found}: use hf.internals.internal where it is needed"


def own_names(tree: ast.AST) -> set[str]:
    """Names with an underscore that some code gives to something itself."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if is_private(name)}


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-zA-Z]\w*", name) is not None and name != "_exit"  # os._exit


def test_no_attribute_with_an_underscore_that_is_not_listed():
    used: dict[str, str] = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                used[node.attr] = module
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                used[getattr(node.args[1], "value", "")] = module
    known = LISTED.union(*map(own_names, TREES.values()))
    unknown = {name: module for name, module in used.items() if is_private(name) and name not in known}
    assert not unknown, f"list these in hf/internals.py: {unknown}"


def classes() -> dict[type, ast.ClassDef]:
    """The package's classes that have one of a library's above them."""
    found = {}
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                made = getattr(importlib.import_module(name), node.name)
                if any(base.__module__.split(".")[0] in LIBRARIES for base in made.__mro__):
                    found[made] = node
    return found


def test_no_method_with_an_underscore_is_overridden_that_is_not_listed():
    unknown = set()
    for made, node in classes().items():
        bases = [base for base in made.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        names = own_names(node) - LISTED
        unknown |= {f"{base.__module__}:{base.__qualname__}.{n}" for base in bases for n in names & set(vars(base))}
    assert not unknown, f"list these in hf/internals.py, or name ours otherwise: {unknown}"


def test_callbacks_and_the_trainer_override_what_is_there():
    """A method that its library calls by another name would never run."""
    own = {"_check", "_end", "_own_rows", "_read_from"}
    for made in classes():
        methods = {name for name, value in vars(made).items() if inspect.isfunction(value)}
        if issubclass(made, TrainerCallback):
            assert not {name for name in methods if name.startswith("on_") and not hasattr(TrainerCallback, name)}
        if issubclass(made, SFTTrainer):
            assert not {name for name in methods if not hasattr(SFTTrainer, name)} - own


def test_only_the_hooks_change_peft():
    """Assignments to what was imported from another library."""
    found = set()
    for module, tree in TREES.items():
        names = imported(tree)
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name | ast.Attribute):
                    root = (
                        target.value.id if isinstance(target.value, ast.Name) else getattr(target.value.value, "id", "")
                    )
                    found |= {(module, names[root].partition(":")[0].partition(".")[0])} if root in names else set()
    while_counting = {("hotlora.cost.activations", "transformers"), ("hotlora.cost.activations", "torch")}
    hooks = {("hotlora.hf.peft_hooks", "peft"), ("hotlora.hf.peft_hooks", "transformers")}
    assert found == hooks | while_counting
