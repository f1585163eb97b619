"""WikiText-2: plain text of Wikipedia's good articles; data to profile and train on, without a scorer.

Lines of ``wiki.test.tokens`` (CC BY-SA 3.0; also called ``test.txt``)::

     = Robert Boulter =

     Robert Boulter is an English film , television and theatre actor . He had a guest @-@ starring role on the
     television series The Bill in 2000 . …

The rows of the hub's ``Salesforce/wikitext`` (wikitext-2-raw-v1) are the same lines, ``{"text": " = Robert Boulter
= \\n"}``; raw means without the ``<unk>`` of the other. An example is a paragraph: it has no prompt, and all of it
carries the loss. Headings and blank lines are left out.
"""

from pathlib import Path

from ..base.errors import DataError
from .rows import Row, hub_rows, need_text, split_file
from .task import Example, Task

HUB_ID = "Salesforce/wikitext"
_FILES = {
    split: [f"wiki.{split}.tokens", f"wiki.{split}.raw", f"{split}.txt"] for split in ("train", "test")
}  # fmt: skip


def paragraphs(lines: list[Row]) -> list[Example]:
    """Every line that is neither blank nor a heading."""
    texts = [need_text(row, "text")[0].strip() for row in lines]
    return [Example("", text) for text in texts if text and not (text.startswith("= ") and text.endswith(" ="))]


def read_lines(path: Path) -> list[Row]:
    """A text file's lines in the form of the hub's rows."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); it must be UTF-8 text.") from error
    return [Row(f"{path} line {number}", {"text": line}) for number, line in enumerate(text.split("\n"), start=1)]


def read(split: str, source: str | None, limit: int | None, seed: int) -> list[Example]:
    """17,556 train and 2,185 test paragraphs: the hub, a text file, or a folder with the published files."""
    path = None if source is None or source == HUB_ID else Path(source).expanduser()
    if path is None:
        rows = list(hub_rows(HUB_ID, split, "wikitext-2-raw-v1"))
    else:
        rows = read_lines(split_file(path, _FILES[split]) if path.is_dir() else path)
    examples = paragraphs(rows)
    if not examples:
        raise DataError(f"{source or HUB_ID} holds no paragraph; give a text file with one in a line.")
    return examples


TASK = Task("wikitext2", "text", "loss", read)
