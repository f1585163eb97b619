"""What a callback tells of its events, a JSON line each, in a run that may be killed and go on from a checkpoint."""

import json
from pathlib import Path
from typing import Any

from ..base.files import append_to, read_json_lines, write_text
from ..base.processes import is_main, wait_for_all


class EventLog:
    """The events in `file`; each has `names`, "step" among them."""

    def __init__(self, file: Path, *names: str) -> None:
        self.file, self.names = file, names

    def rows(self) -> list[dict[str, Any]]:
        return read_json_lines(self.file, *self.names) if self.file.is_file() else []

    def go_back_to(self, step: int) -> None:
        """Leaves out what came after `step`, the checkpoint's. All processes call it together."""
        rows = [row for row in self.rows() if row["step"] <= step]
        wait_for_all()  # until each has read them
        if is_main():
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, row: dict[str, Any]) -> None:
        """By the main process alone."""
        if is_main():
            with append_to(self.file) as file:
                file.write(json.dumps(row) + "\n")
