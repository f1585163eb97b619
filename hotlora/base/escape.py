"""Text from others (names in records, paths, messages) as terminals, Markdown, LaTeX and spreadsheets may show it."""

import re

_HTML = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": "$<$", ">": "$>$", "±": r"$\pm$", "−": "$-$", "–": "--", "Δ": r"$\Delta$", "δ": r"$\delta$",
}  # fmt: skip


def one_line(text: str) -> str:
    """On one line, without what a terminal would obey: white space is a space, and what cannot be shown is U+FFFD."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in text)


def lines(text: str) -> str:
    """The same with its line breaks."""
    return "\n".join(map(one_line, text.split("\n")))


def markdown(text: str) -> str:
    """In a heading, an item or a table's cell: no HTML, no link or picture, no cell's end."""
    text = one_line(text).replace("\\", "\\\\").replace("|", "\\|").replace("](", "]\\(")
    return _HTML.sub(r"\\\g<0>", text)


def latex(text: str) -> str:
    """In a table of LaTeX: no command, on one line."""
    return "".join(_LATEX.get(sign, sign) for sign in one_line(text))


def csv(value: object) -> object:
    """A text that a spreadsheet would take for a formula begins with an apostrophe; numbers are as they are."""
    is_formula = isinstance(value, str) and value.lstrip(" ")[:1] in tuple("=+-@\t\r\n")
    return f"'{value}" if is_formula and value else value
