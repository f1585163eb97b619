"""The docs: every page in the site's navigation, every link and name in them there, and the site builds."""

import ast
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import trl
import typer
import yaml

import hotlora
from hotlora.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# What is written about the past keeps the names of its day.
CURRENT = [page for page in TEXTS if page.name != "log.md"]


class Loader(yaml.SafeLoader):
    """mkdocs.yml names a Python function for headings' anchors."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)


APP = typer.main.get_command(app)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without code blocks and comments."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def entries(nav: list) -> list[str]:
    found = [value for item in nav for value in (item.values() if isinstance(item, dict) else [item])]
    return [page for value in found for page in (entries(value) if isinstance(value, list) else [value])]


def test_every_page_is_in_the_navigation_once():
    assert sorted(entries(SITE["nav"])) == [page.name for page in PAGES]


def test_the_start_page_names_every_page():
    linked = set(_LINK.findall((DOCS / "index.md").read_text("utf-8")))
    assert {page.name for page in PAGES if page.name != "index.md"} <= {link.split("#")[0] for link in linked}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_and_anchors_are_there(page):
    lost = []
    for link in _LINK.findall(prose(page)):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if "://" not in link and (not file.exists() or (anchor and anchor not in anchors(file))):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_begins_with_what_it_is_for(page):
    title, first, *_ = [block for block in prose(page).split("\n\n") if block.strip()]
    assert re.fullmatch(r"# .+", title.strip())
    assert not re.match(r"\s{4}|[-|#>*]|\d+\.", first), "a sentence comes before code, lists and tables"
    assert re.search(r"[.:](\s|$)", first)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lists_begin_after_an_empty_line(page):
    """Without one the site's Markdown, unlike GitHub's, reads on in the paragraph."""
    lines = prose(page).splitlines()
    late = [
        line
        for before, line in itertools.pairwise(lines)
        if re.match(r"(- |1\. )", line) and before.strip() and not re.match(r"(- |\s)", before)
    ]
    assert late == []


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_files_and_names_of_the_code_are_there(page):
    text = page.read_text("utf-8")
    files = re.findall(r"`((?:hotlora|tests|scripts|benchmarks|configs|findings|examples)/[\w./-]*[\w/])`?", text)
    lost = [file for file in files if not (ROOT / file).exists()]
    for name in set(re.findall(r"`(hotlora(?:\.\w+)+)[`(]", text)) | set(
        re.findall(r"from (hotlora[\w.]*) import", text)
    ):
        if not found(name):
            lost.append(name)
    assert lost == []


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Of every `hotlora COMMAND …` in a page's code: the command, and the options that follow in its line."""
    text = re.sub(r"\\\n", " ", page.read_text("utf-8"))
    lines = re.findall(r"^(?: {4}|\t).*$", text, re.M) + re.findall(r"`[^`\n]+`", text)
    lines += [
        line
        for block in re.findall(r"^```(?:sh|bash|text)?\n(.*?)^```", text, re.M | re.S)
        for line in block.splitlines()
    ]
    found = []
    for line in lines:
        line = line.split("  #")[0]
        for command, words in re.findall(r"(?<![\w/.-])hotlora ([a-z]+)\b([^|`]*)", line):
            found.append((command, re.findall(r"(?<=\s)--[a-z][\w-]*", words)))
    return found


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_and_their_options_are_there(page):
    lost = []
    for command, options in commands(page):
        if command not in APP.commands:
            lost.append(f"hotlora {command}")
            continue
        known = {
            name for parameter in APP.commands[command].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        lost += [f"hotlora {command} {option}" for option in options if option not in {*known, "--help"}]
    assert lost == []


def found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one; files' formats (`hotlora.mask`) are names as well."""
    if name in ("hotlora.mask", "hotlora.profile"):
        return True
    module, _, last = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    try:
        return hasattr(importlib.import_module(module or name), last)
    except ModuleNotFoundError:
        return False


def test_tables_have_a_head_of_as_many_cells():
    """Else Markdown shows a paragraph of bars."""
    wrong = []
    for page in DOCS.rglob("*.md"):
        lines = page.read_text("utf-8").split("\n")
        for number, line in enumerate(lines):
            if re.fullmatch(r"\|(?:\s*:?-+:?\s*\|)+", line):
                head = re.sub(r"\\\|", "", lines[number - 1])
                if not head.startswith("|") or head.count("|") != line.count("|") or lines[number - 2].startswith("|"):
                    wrong.append(f"{page.name}:{number + 1}")
    assert wrong == []


def test_the_reference_has_every_public_name():
    listed = set(re.findall(r"^::: ([\w.]+)", (DOCS / "api.md").read_text("utf-8"), re.M))
    public = [getattr(hotlora, name) for name in hotlora.__all__ if name != "__version__"]
    for module in filter(inspect.ismodule, public):
        public += [getattr(module, name) for name in module.__all__]
    things = [thing for thing in public if not inspect.ismodule(thing)]
    assert [thing for thing in things if f"{thing.__module__}.{thing.__qualname__}" not in listed
            and thing.__module__ not in listed] == []  # fmt: skip


def _docstrings():
    docstrings = {}
    for file in (ROOT / "hotlora").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                docstrings[f"{file.name}: {getattr(node, 'name', '')}"] = ast.get_docstring(node) or ""
    return docstrings


def test_errors_in_docstrings_stand_a_line_each():
    """The site reads a line of Raises as `error: when`, and one that is indented further as its continuation."""
    item = re.compile(r"([A-Z]\w+(, )?)+: (?!.*\. [A-Z]\w+: )")
    sections = {
        name: text.partition("Raises:\n")[2].partition("\n\n")[0]
        for name, text in _docstrings().items()
        if "Raises:\n" in text
    }
    assert len(sections) > 50
    lines = {(name, line) for name, text in sections.items() for line in re.findall(r"^    (?! )(.*)", text, re.M)}
    assert {line for line in lines if not item.match(line[1])} == set()


def test_code_in_docstrings_is_shown_as_code():
    """Indented: else the site runs its lines together."""
    docstrings = _docstrings()
    assert sum("    run = hotlora." in text for text in docstrings.values()) >= 2
    flush = re.compile(r"\n\n((?:\w+ *= |with )\w[\w.]*\(.*)")
    assert {name: found[1] for name, text in docstrings.items() if (found := flush.search(text))} == {}


def test_every_function_of_the_reference_is_where_the_page_says():
    """`import hotlora, then by these names`; those of `hotlora.data` and `hotlora.plots` stand there."""
    listed = re.findall(r"^::: ([\w.]+)", (DOCS / "api.md").read_text("utf-8"), re.M)
    names = [name.rpartition(".")[2] for name in listed if name != "hotlora.base.errors"]
    places = (hotlora, hotlora.data, hotlora.plots)
    assert [name for name in names if not any(name in place.__all__ for place in places)] == []


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    for package in ("material", "mkdocs", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[docs]', or make site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and the page of what is not found
    for page in pages:
        tags = re.findall(r"<(?:script|link|img|source)\b[^>]*>", page.read_text("utf-8"))
        outside = [tag for tag in tags if re.search(r"(?:src|href|srcset)=\"?(?:https?:)?//", tag)]
        assert outside == [], page.name
    assert (tmp_path / "repository" / "benchmarks" / "cpu-nano-tokens.png").is_file()


def python_block(page: str) -> str:
    (block, *_) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
    return block


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """On nano, in place of OLMoE."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n' * 4)
    on_a_cpu = '"checkpoints", bf16=False, max_steps=2, save_strategy="no", report_to="none"'
    code = python_block("README.md").replace("allenai/OLMoE-1B-7B-0924", "nano").replace('"checkpoints"', on_a_cpu)
    labels = []

    class Watched(trl.SFTTrainer):
        def train(self):
            labels.extend(self.train_dataset["labels"])
            return super().train()

    monkeypatch.setattr(trl, "SFTTrainer", Watched)
    exec(code, {})
    tokenizer = hotlora.load_tokenizer("nano")
    answers = {tokenizer.decode([i for i in row if i != -100]) for row in labels}
    assert answers == {" 4" + tokenizer.eos_token}, "the loss is on the answer alone"
    model, _ = hotlora.load("adapter")
    assert any(p.any() for name, p in model.named_parameters() if ".lora_B" in name or "_B" in name), "it was trained"
    assert {len(ids) for ids in model.peft_config["default"].plan["experts"].values()} == {8}


def test_the_sweep_of_the_docs_is_one():
    defined: dict = {}
    exec(python_block("docs/sweep.md"), defined)
    assert len(defined["SWEEP"].conditions) == 5
