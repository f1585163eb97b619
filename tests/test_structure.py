"""The import contract: a folder imports only from those before it, and no two modules import each other."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hotlora

ROOT = Path(hotlora.__file__).parent
FOLDERS = (
    "base", "nano", "hf", "routing", "layer", "adapter", "tasks", "training", "evaluation", "runs", "engines",
    "report", "cost", "bench", "papers", "api", "data", "plots", "cli",
)  # fmt: skip
"""In the order of dependence, as CONTRIBUTING.md has it; `MODULES_ALONE` are no folders."""
MODULES_ALONE = {"api", "data", "plots"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str, path: Path) -> set[str]:
    """The package's modules that a module imports, inside functions too; for type checkers alone does not count."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return found & MODULES.keys() - {name}


def folder(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def test_every_folder_has_its_place():
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert there == set(FOLDERS) - MODULES_ALONE
    assert {path.stem for path in ROOT.glob("*.py")} == MODULES_ALONE | {"__init__", "__main__"}


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name) in FOLDERS])
def test_a_folder_imports_only_from_those_before_it(name):
    allowed = FOLDERS[: FOLDERS.index(folder(name)) + 1]
    wrong = sorted(other for other in imports(name, MODULES[name]) if folder(other) not in (*allowed, ""))
    assert not wrong, f"{name} imports {wrong}, which come after it"


def test_no_two_modules_import_each_other():
    TopologicalSorter({name: imports(name, path) for name, path in MODULES.items()}).prepare()  # CycleError names them


def test_what_shows_results_loads_no_trainer():
    """Pages are made, and plans, without TRL and PEFT. (`cost.estimate` builds adapted layers, so it needs PEFT.)"""
    patterns = ("report/*", "routing/*", "cost/__init__", "cost/flops")
    names = [module_name(path) for pattern in patterns for path in sorted(ROOT.glob(f"{pattern}.py"))]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    if found := {{"trl", "peft"}} & sys.modules.keys():
        sys.exit(f"{{name}} loads {{found}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"hotlora.report.card", "hotlora.routing.plan", "hotlora.cost.flops"} <= set(names)


def test_only_the_experts_view_reads_the_flags_of_experts():
    flags = {"has_gate", "has_bias", "is_concatenated", "_apply_gate", "_is_expert_parallel", "has_post_expert_norm"}
    readers = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            read = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            readers |= {name} if isinstance(read, str) and read in flags else set()
    assert readers == {"hotlora.hf.experts_view"}
