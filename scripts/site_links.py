"""A hook of mkdocs: links that lead out of docs/ work on the site, as they do in a checkout.

Pictures and tables of results are copied to the site's `repository/`. What is no page there (a folder, another Markdown
file) is shown by its name, without a link.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
COPIED = "repository"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/."""
    for page in files.documentation_pages():
        for _, _, target in _LINK.findall(page.content_string):
            for path in _copied(target):
                name = f"{COPIED}/{path.relative_to(ROOT).as_posix()}"
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links to them."""

    def turned(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if "://" in target or (target.endswith(".md") and not target.startswith("../")):
            return match[0]
        if copied := _copied(target):
            return f"{picture}[{text}]({COPIED}/{copied[0].relative_to(ROOT).as_posix()})"
        return text if (ROOT / "docs" / target).is_dir() or target.startswith("../") else match[0]

    return _LINK.sub(turned, markdown)


def _copied(target: str) -> list[Path]:
    """The file itself, and the pictures that a page of tables shows; none of what stays in docs/ or is not there."""
    path = (ROOT / "docs" / target).resolve()
    if not target.startswith("../") or not path.is_relative_to(ROOT) or not path.is_file():
        return []
    if path.suffix != ".md":
        return [path]
    tables = path.with_suffix(".html")
    return [tables, *sorted(path.parent.glob("*.png"))] if tables.is_file() else []
