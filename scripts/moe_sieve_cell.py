"""A number that MoE-Sieve prints, beside the same from its published data, and why the two are not one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "benchmarks" / "configs"
CONFIG_OF = {
    "OLMoE-1B-7B": "olmoe-1b-7b", "Qwen1.5-MoE-A2.7B": "qwen1.5-moe-a2.7b", "DeepSeek-MoE-16B": "deepseek-moe-16b",
}  # fmt: skip
OLMOE = "OLMoE-1B-7B"
LESS = 0.001
"""A printed p of "<.001"."""
SAMPLE, SORTED = "ddof 1", "each condition's scores sorted before pairing"

EXPLAINED: dict[tuple[str, str, str], str] = {
    ("Table 7", "layer 13", "covered by 16"): (
        "by count it is 72.47; by mass it is 72.71, but then layer 15 (74.70) is not the printed 74: no one reading "
        "gives all sixteen"
    ),
    ("Table 3", "Qwen1.5-MoE-A2.7B, hellaswag", "hot"): "89.248 rounds to 89.2; rounded to 89.25 first it gives 89.3",
    ("Table 5", "Qwen1.5-MoE-A2.7B, hellaswag", "uniform"): "as in table 3",
    ("Table 4", OLMOE, "checkpoint, saved, %"): "340 MB over 1.25 GB, with a GB of 1,024 MB; by parameters it is 72.7%",
    ("Table 4", "Qwen1.5-MoE-A2.7B", "checkpoint, saved, %"): "as OLMoE's: 606 MB over 2.04 GB of 1,024 MB each",
    ("Table 4", "Qwen1.5-MoE-A2.7B", "checkpoint, hot, MB"): "605.3 MB of float32 weights; the file has a header, too",
}
"""(table, row, column) -> why it is not what is printed."""


@dataclass(frozen=True)
class Cell:
    """A printed number and what the data give. Percentages and points are what they say, not shares.

    Attributes:
        form: of both numbers, as `format` takes it; "" where they are words.
        here: None where the data do not have it.
        others: another reading -> its number.
    """

    table: str
    row: str
    column: str
    form: str
    printed: float | str
    here: float | str | None
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.table, self.row, self.column

    @property
    def status(self) -> str:
        """equal, explained, differs, or absent."""
        if self.here is None:
            return "absent"
        if self._is(self.here):
            return "equal"
        return "explained" if self.told else "differs"

    @property
    def told(self) -> str:
        """Why the number here is not the printed one."""
        if self.here is None or self._is(self.here):
            return ""
        by = next((f"comes out with {name}" for name, value in self.others.items() if self._is(value)), "")
        return by or EXPLAINED.get(self.key, "")

    def _is(self, value: float | str) -> bool:
        """A number in the middle of two prints is either."""
        if isinstance(value, str) or isinstance(self.printed, str):
            return value == self.printed
        if self.form == "p" and self.printed == LESS:
            return value < LESS
        digits = 3 if self.form == "p" else int(self.form.strip("+.fg") or 0)
        return abs(value - self.printed) <= 0.5 * 10**-digits + 1e-9
