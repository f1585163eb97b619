"""What all recipes have in common that need no sweep of trainings."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import HotLoraError
from .result import Heading, Result

Tell = Callable[[str], None]


def holds_another(file: Path, what: str, made: object, asked: object) -> HotLoraError:
    """What a store has was made of another model, or with another option."""
    return HotLoraError(
        f"{file} holds {what} {made}, and {asked} is asked for: delete the file, or give another --output."
    )


@dataclass(frozen=True)
class Direct(Heading, ABC):
    """A table or figure made by profiles, benches or configs.

    Attributes:
        options: the user's, of every profile or bench.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    @abstractmethod
    def needs(self, tflops: float | None = None) -> list[str]:
        """What it needs before it starts, a line each. Downloads no data and no weights."""

    def reads(self) -> list[str]:
        """The data that it reads, as `load_examples` takes it."""
        return []

    def files(self, output: Path) -> list[tuple[str, Path, Path]]:
        """(what, where, the file that is there once it is made) of all that it makes in a store."""
        return []

    def state(self, output: Path) -> list[tuple[str, Path, str]]:
        """(what, where, "done" or "new") of the same."""
        return [(what, at, "done" if file.is_file() else "new") for what, at, file in self.files(output)]

    def run(self, output: Path, tell: Tell) -> None:
        """Makes what is missing in the store `output`; tell hears what is going on, in a line."""

    @abstractmethod
    def result(self, folder: Path) -> Result | None:
        """The table or figure from the store in `folder`; None where nothing of it is made. Loads no model."""

    def check_options(self, allowed: Collection[str]) -> None:
        """HotLoraError where the user gives an option that does not exist here."""
        if unknown := sorted(set(self.options) - set(allowed)):
            raise HotLoraError(
                f"{self.name} has no option {unknown[0]!r}: --set takes {', '.join(sorted(allowed)) or 'none here'}."
            )
