"""Where a page's made parts stand, between a mark of their own and the next end mark; and tables in Markdown."""

END = "<!-- end -->"


def filled(text: str, mark: str, made: str) -> str:
    """`text` with `made` between `mark` and the next end mark."""
    head, rest = text.split(mark)
    return f"{head}{mark}\n{made}\n{END}{rest.split(END, 1)[1]}"


def table(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are text."""
    line = "|---" * left + "|---:" * (len(heads) - left) + "|"
    return "\n".join(["| " + " | ".join(heads) + " |", line, *("| " + " | ".join(row) + " |" for row in rows)])
