"""Where a page's made parts stand: between a mark of their own and the next end mark."""

END = "<!-- end -->"


def filled(text: str, mark: str, made: str) -> str:
    """`text` with `made` between `mark` and the next end mark."""
    head, rest = text.split(mark)
    return f"{head}{mark}\n{made}\n{END}{rest.split(END, 1)[1]}"
